"""Load Dataset Config and Export Dataset: from and to the files of other trainers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainer.errors import LoraGraftError
from .build_dataset import ANY_KIND, kind_input, outputs, shown
from .sockets import TrainSet
from .step_progress import teller

ON_BAD = ("stop", "skip")
MISSING = ("stop", "empty")
FORMATS = ("png", "jpeg", "webp")
# What images were like when they were last decoded, so that one changed image is decoded alone.
_seen: dict[Any, Any] = {}


class LoadDatasetConfig(io.ComfyNode):
    """Read a kohya dataset.toml or an HCP-Diffusion data block, with all it says, into a train set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftLoadDatasetConfig",
            display_name="Load Dataset Config",
            category="LoraGraft/dataset",
            description="Reads kohya's dataset.toml (or .json) or the data block of an HCP-Diffusion .yaml: "
            "folders, repeats, regularisation, buckets, batch sizes and captions. Unknown or impossible "
            "settings are refused by name. Its folders must be ones that workflows may read.",
            search_aliases=["kohya", "dataset.toml", "hcp", "sd-scripts", "import dataset"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "file",
                    default="dataset.toml",
                    tooltip="The config file, below ComfyUI's input folder or another folder that workflows "
                    "may read.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Used where the file gives no resolution of its own.",
                ),
                io.Combo.Input(
                    "on_bad",
                    options=list(ON_BAD),
                    default=ON_BAD[0],
                    tooltip="Unreadable images: stop and name them all, or skip them.",
                ),
                io.Combo.Input(
                    "missing_captions",
                    options=list(MISSING),
                    default=MISSING[0],
                    tooltip="Images with neither caption nor class words: stop and name them all, or train "
                    "them without any words, as kohya's trainer does.",
                ),
                kind_input(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The base's text encoder: captions are then counted in its own tokens.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Refuse a path before anything runs; a linked one is checked when the node runs."""
        from . import host

        if file is None:
            return True
        try:
            host.dataset_folder(file)
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> str:
        """Change when the file, or a name, size or time in a folder that it names changes."""
        from ..trainer.data.config_files import named_paths
        from . import host
        from .load_folder import fingerprint

        try:
            path = host.dataset_folder(file or "")
            named = named_paths(path, resolve=host.dataset_folder)
            digest = hashlib.sha256(path.read_bytes())
        except (LoraGraftError, OSError) as error:  # the run itself says what is wrong
            return str(error)
        for each in named:
            state = fingerprint(each, False) if each.is_dir() else str(each.is_file() and each.read_bytes())
            digest.update(f"{each} {state}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @classmethod
    def execute(
        cls,
        file: str,
        resolution: int,
        on_bad: str,
        missing_captions: str,
        kind: str = ANY_KIND,
        clip: Any = None,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        blocks = api.read_blocks(
            host.dataset_folder(file),
            base={"resolution": resolution},
            resolve=host.dataset_folder,
            on_bad=_choice(on_bad, ON_BAD),
            missing_captions=_choice(missing_captions, MISSING),
            seen=_seen,
            progress=teller(),
        )
        return shown(api.freeze_blocks(blocks), kind, clip)


class ExportDataset(io.ComfyNode):
    """Write a train set as folders and a dataset.toml that kohya's trainer reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftExportDataset",
            display_name="Export Dataset",
            category="LoraGraft/dataset",
            description="Writes the pictures as training sees them, their captions and a dataset.toml for "
            "kohya's trainer into output/loragraft/exports. A second run touches only what changed.",
            search_aliases=["kohya", "dataset.toml", "sd-scripts", "export dataset", "save dataset"],
            is_output_node=True,
            inputs=[
                TrainSet.Input("train_set", tooltip="From Build Dataset or Load Dataset Config."),
                io.String.Input(
                    "name", default="my_dataset", tooltip="The folder's name below output/loragraft/exports."
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="How pictures are written. Masked ones are PNG, with the mask as alpha channel.",
                ),
                io.Int.Input(
                    "quality",
                    default=97,
                    min=1,
                    max=100,
                    tooltip="Of jpeg and webp; webp is lossless at 100. png ignores it.",
                ),
                io.Boolean.Input(
                    "relative",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Write paths as seen from dataset.toml, for a folder that moves. kohya's trainer "
                    "then has to be started in that folder.",
                ),
            ],
            outputs=[
                io.String.Output("folder", display_name="folder", tooltip="Where it was written."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was written, and what kohya needs beside it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Refuse an impossible folder name before anything runs."""
        from ..trainer.paths import safe_name

        try:
            if name is not None:
                safe_name(name, what="name")
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, train_set: Any, name: str, format: str, quality: int, relative: bool = False
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        folder: Path = host.output_folder() / "exports" / api.safe_name(name, what="name")
        done = api.export_kohya(
            train_set,
            folder,
            encoding=api.Encoding(_choice(format, FORMATS), max(1, min(100, quality))),
            relative=relative,
            progress=teller(),
        )
        text = "\n".join((*done.lines, f"output/loragraft/exports/{folder.name}/{done.file.name}"))
        return io.NodeOutput(str(folder), text, ui={"text": [text]})


def _choice(value: Any, known: tuple[str, ...]) -> str:
    """Return a combo's value if it is one of its own; lists of choices are hints, not guards."""
    return value if value in known else known[0]
