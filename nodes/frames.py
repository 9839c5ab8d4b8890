"""Frame Extract: videos into pictures in a working copy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainer.data.frames import FrameSettings
from ..trainer.errors import LoraGraftError
from . import picture_widgets, widgets
from .sockets import Dataset
from .step_progress import teller

COMMON = (
    *("mode", "every_n_frames", "every_n_seconds", "start", "end", "max_frames"),
    *("skip_blurred", "skip_similar", "image_format"),
)
ADVANCED = ("scene_threshold", "min_sharpness", "max_distance")
ON_BAD = ("stop", "skip")
MAX_SHOWN = 8


class FrameExtract(io.ComfyNode):
    """Write a video's frames, or those of a folder of videos, into a working copy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftFrameExtract",
            display_name="Frame Extract",
            category="LoraGraft/dataset",
            description="Takes pictures out of a video, or out of all videos in a folder (MP4, MOV, MKV, "
            "WebM): upright, in the right colours, without blurred and near-identical ones. The pictures go "
            "to output/loragraft/datasets/NAME; a second run touches nothing.",
            search_aliases=["video", "video to images", "key frames", "scene detect", "extract frames"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip="A video, or a folder of videos, below ComfyUI's input folder. Also: an absolute "
                    "path below input, output or a folder listed in user/__loragraft/folders.txt; 'name "
                    "[output]'.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="The working copy: a folder below output/loragraft/datasets. Empty: named after "
                    "the video or its folder.",
                ),
                *widgets.inputs(io, picture_widgets.widgets_of(FrameSettings, COMMON)),
                io.Boolean.Input("recursive", default=True, tooltip="Read subfolders too."),
                io.String.Input(
                    "class_tokens",
                    default="",
                    tooltip="Trigger words of pictures where no folder's name has some, for instance: ohwx "
                    "person.",
                ),
                io.Int.Input(
                    "default_repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How often a picture is used per epoch where no folder's name gives a number.",
                ),
                io.Combo.Input(
                    "on_bad",
                    options=list(ON_BAD),
                    default="stop",
                    tooltip="Unreadable or damaged videos: stop and name them all, or skip them (of damaged "
                    "ones, keep the frames before the damage) and name them in the report.",
                ),
                *widgets.inputs(io, picture_widgets.widgets_of(FrameSettings, ADVANCED)),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The pictures as a dataset."),
                io.String.Output(
                    "report", display_name="report", tooltip="What became of each video, in words."
                ),
                io.String.Output(
                    "folder",
                    display_name="folder",
                    tooltip="Where the pictures lie, as Load Image Folder's path takes it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, path: str | None = None, name: str | None = None) -> bool | str:
        """Refuse a path or name before anything runs; linked ones are checked when the node runs."""
        from . import host

        try:
            if path is not None:
                host.dataset_folder(path)
            if path is not None and name is not None:
                _copy(name, host.dataset_folder(path))
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, path: str | None = None, name: str | None = None, recursive: bool = True, **others: Any
    ) -> str:
        """Change when a video's name, size or time changes, or a written picture was edited by hand."""
        from ..trainer import api
        from . import host

        try:
            source = host.dataset_folder(path or "")
            files = api.find_videos(source, recursive=recursive)
            edits = api.hand_edits(_copy(name or "", source))
            stats = [(file.name, (s := file.path.stat()).st_size, s.st_mtime_ns) for file in files.videos]
            content = repr((stats, files.bad, edits))
        except (LoraGraftError, OSError) as error:  # running the node will say it in full
            content = str(error)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def execute(
        cls,
        path: str,
        name: str,
        recursive: bool,
        class_tokens: str,
        default_repeats: int,
        on_bad: str,
        **values: Any,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        source = host.dataset_folder(path)
        copy = _copy(name, source)
        dataset = api.extract_frames(
            source,
            copy,
            picture_widgets.settings_of(FrameSettings, values),
            recursive=recursive,
            class_tokens=class_tokens,
            default_repeats=default_repeats,
            on_bad=on_bad,
            progress=teller(),
        )
        every = max(1, -(-len(dataset.records) // MAX_SHOWN))
        images = [host.view(record.path) for record in dataset.records[::every]]
        folder = f"loragraft/datasets/{copy.name} [output]"
        return io.NodeOutput(dataset, "\n".join(dataset.lines), folder, ui={"images": images})


def _copy(name: str, source: Path) -> Path:
    """Return the working copy's folder; an empty name means one of the source's own."""
    from ..trainer import api
    from . import host

    return host.working_copy_folder(name, api.Dataset(source, (), ()), "frames")
