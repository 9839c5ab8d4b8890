"""WD14 Tag and Download Tagger: captions by the WD taggers that are there, and a way to get one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .sockets import Dataset
from .step_progress import teller

EXISTING = ("replace", "append", "merge")
RATINGS = ("off", "first", "last")
COMBINE = ("union", "vote")
DEVICES = ("auto", "cpu")


def tagger_names() -> list[str]:
    """Return what the tagger widget offers: auto, the known ones, and others that are there."""
    from ..trainer.data.tagger_models import AUTO, KNOWN_NAMES
    from . import host_taggers

    return list(dict.fromkeys([AUTO, *KNOWN_NAMES, *sorted(host_taggers.find())]))


class WD14Tag(io.ComfyNode):
    """Caption every image of a dataset with one or several taggers; nothing is downloaded here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftWD14Tag",
            display_name="WD14 Tag",
            category="LoraGraft/dataset",
            description="Writes captions of booru tags with the WD taggers (wd-v1-4 v2 to v3), by "
            "onnxruntime or timm. Taggers of the WD14 Tagger pack are found. Files are not changed, and "
            "an image is only looked at again when its pixels change.",
            search_aliases=["tagger", "wd14", "booru tags", "auto caption", "interrogate"],
            inputs=[
                Dataset.Input("dataset", tooltip="The images to caption."),
                io.Combo.Input(
                    "tagger",
                    options=tagger_names(),
                    default="auto",
                    tooltip="Which tagger. auto takes the first that is there; get one with Download Tagger.",
                ),
                io.Float.Input(
                    "general_threshold",
                    default=0.35,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=False,
                    tooltip="Tags surer than this are taken. Lower finds more, and more wrong ones.",
                ),
                io.Float.Input(
                    "character_threshold",
                    default=0.85,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=False,
                    tooltip="Names of known characters are taken when surer than this.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Trigger words, put first in every caption. The word class in braces stands "
                    "for the words of the image's folder.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    tooltip="Tags to leave out: names, wildcards (*hat) and groups: [hair], [eyes], "
                    "[body], [clothes], [features]. What you leave out is learned into the trigger "
                    "word; what you keep stays controllable.",
                ),
                io.Combo.Input(
                    "existing",
                    options=list(EXISTING),
                    default="replace",
                    tooltip="Captions that are there: replace them, append new tags behind them, or "
                    "merge (the tagger's tags first, then the others).",
                ),
                io.Boolean.Input(
                    "replace_underscore",
                    default=True,
                    tooltip="Write spaces for underscores; drawn faces such as >_< keep them.",
                ),
                io.String.Input(
                    "more_taggers",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Further taggers to run as well, names separated by commas.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default="union",
                    optional=True,
                    advanced=True,
                    tooltip="Several taggers: union takes every tag, vote those of more than half of "
                    "the taggers that know it.",
                ),
                io.String.Input(
                    "always_first",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Tags that stand in front where they are found, for instance: 1girl, solo.",
                ),
                io.Combo.Input(
                    "rating",
                    options=list(RATINGS),
                    default="off",
                    optional=True,
                    advanced=True,
                    tooltip="Write the image's rating (general, sensitive, ...) into its caption.",
                ),
                io.Boolean.Input(
                    "character_first",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Names of characters before general tags.",
                ),
                io.Boolean.Input(
                    "general_mcut",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Find the threshold of general tags per image, at the widest gap between scores.",
                ),
                io.Boolean.Input(
                    "character_mcut",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="The same for characters, never below 0.15.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Images at once, where the tagger allows it.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto takes a GPU where onnxruntime has one; the report says what worked.",
                ),
            ],
            outputs=[
                Dataset.Output(
                    "dataset", display_name="dataset", tooltip="The images with their new captions."
                ),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The captions, one per image.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What ran, what was found, how often each tag occurs.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, tagger: str | None = None, more_taggers: str = "", **others: Any) -> str:
        """Change when a tagger's files do."""
        from . import host_taggers

        found = host_taggers.find()
        files = [found[name] for name in sorted(found)]
        paths = [path for file in files for path in (file.labels, file.graph, file.weights) if path]
        return repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()])

    @classmethod
    def execute(
        cls,
        dataset: Any,
        tagger: str,
        more_taggers: str = "",
        batch_size: int = 8,
        device: str = "auto",
        **settings: Any,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host, host_taggers

        names = [tagger, *(name for part in more_taggers.split(",") if (name := part.strip()))]
        taggers = api.choose_taggers(names, host_taggers.find(), host_taggers.searched())
        if device != "cpu":
            host_taggers.make_room()
        edited = api.tag_dataset(
            dataset,
            taggers,
            api.TagSettings(**settings),
            device=device,
            batch_size=batch_size,
            cache=host.places().cache,
            progress=teller(),
        )
        captions = [record.caption for record in edited.dataset.records]
        return io.NodeOutput(edited.dataset, captions, "\n".join(edited.lines))


class DownloadTagger(io.ComfyNode):
    """Fetch a tagger from a fixed table, verified; the only node of this pack that downloads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..trainer.data.tagger_models import KNOWN_NAMES

        return io.Schema(
            node_id="LoraGraftDownloadTagger",
            display_name="Download Tagger",
            category="LoraGraft/dataset",
            description="Fetches a WD tagger from Hugging Face into models/loragraft_taggers: only "
            "known files at a fixed commit, verified by their sha256. Nothing is fetched unless "
            "'download' is on.",
            search_aliases=["tagger model", "wd14 model", "fetch", "hugging face"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "tagger",
                    options=list(KNOWN_NAMES),
                    default=KNOWN_NAMES[0],
                    tooltip="swinv2-v3 is quick and good, eva02-large-v3 the best and slowest; "
                    "v1-4-swinv2-v2 is the one that older guides name.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="Off: only say whether it is there and what would be fetched. On: fetch it "
                    "when this node runs.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report", display_name="report", tooltip="What is there, or what was or would be fetched."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, tagger: str | None = None, **others: Any) -> str:
        """Change when the files in the folder do."""
        from . import host_taggers

        folder = host_taggers.downloads_folder()
        files = sorted(path for path in folder.glob("*/*") if path.is_file())
        return repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])

    @classmethod
    def execute(cls, tagger: str, download: bool) -> io.NodeOutput:
        from ..trainer import api
        from . import host_taggers

        folder = host_taggers.downloads_folder()
        lines = []
        others = [files for name, files in host_taggers.find().items() if name == tagger]
        if others and not (folder / tagger).is_dir():
            lines.append(f"{tagger} is there already: {others[0].labels.parent}")
        elif download:
            files = api.download_tagger(tagger, folder, progress=teller())
            lines.append(f"{files.name} is in {files.labels.parent}, verified.")
        else:
            lines += api.download_lines(tagger, folder)
        report = "\n".join(lines)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
