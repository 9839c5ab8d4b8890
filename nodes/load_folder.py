"""Load Image Folder: from a folder to records of its images and captions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainer.errors import LoraGraftError
from .sockets import Dataset

CAPTION_SUFFIXES = (".txt", ".caption")
ON_BAD = ("stop", "skip")


class LoadImageFolder(io.ComfyNode):
    """Read a folder of images and captions; paths and captions only, no pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftLoadImageFolder",
            display_name="Load Image Folder",
            category="LoraGraft/dataset",
            description="Reads a folder of training images with their caption files (.txt, .caption). "
            "Subfolders named like '4_cat' mean: 4 repeats, concept 'cat'.",
            search_aliases=["dataset", "training images", "captions", "kohya"],
            inputs=[
                io.String.Input(
                    "path",
                    default="[demo]",
                    tooltip="Folder below ComfyUI's input folder. Also: an absolute path below input, "
                    "output or a "
                    "folder listed in user/__loragraft/folders.txt; 'name [output]'; or [demo], the embedded "
                    "sample.",
                ),
                io.Boolean.Input("recursive", default=True, tooltip="Read subfolders too."),
                io.String.Input(
                    "class_tokens",
                    default="",
                    tooltip="Trigger words of images whose folder names none, for instance: ohwx person.",
                ),
                io.Int.Input(
                    "default_repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How often an image is used per epoch where its folder's name gives no number.",
                ),
                io.Combo.Input(
                    "on_bad",
                    options=list(ON_BAD),
                    default="stop",
                    tooltip="Unreadable images: stop and name them all, or skip them and name them in the "
                    "report.",
                ),
            ],
            outputs=[
                Dataset.Output(
                    "dataset", display_name="dataset", tooltip="The images' paths, captions and repeats."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was found: images, captions, problems."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, path: str | None = None) -> bool | str:
        """Refuse a path before anything runs; a linked path is checked when the node runs."""
        from . import host

        if path is None:
            return True
        try:
            host.dataset_folder(path)
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, path: str | None = None, recursive: bool = True, **others: Any) -> str:
        """Change when a file's name, size or time, or a caption's text changes."""
        from . import host

        try:
            folder = host.dataset_folder(path or "")
        except LoraGraftError as error:
            return error.what
        return fingerprint(folder, recursive)

    @classmethod
    def execute(
        cls, path: str, recursive: bool, class_tokens: str, default_repeats: int, on_bad: str
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        dataset = api.scan_folder(
            host.dataset_folder(path),
            recursive=recursive,
            class_tokens=class_tokens,
            default_repeats=default_repeats,
            on_bad=on_bad if on_bad in ON_BAD else "stop",
        )
        return io.NodeOutput(dataset, "\n".join(dataset.lines))


def fingerprint(folder: Path, recursive: bool) -> str:
    """Hash a folder's file names, sizes and times, and its captions' bytes."""
    digest = hashlib.sha256()
    for root, folders, files in os.walk(folder):
        folders.sort()
        if not recursive:
            folders.clear()
        for name in sorted(files):
            file = Path(root, name)
            try:
                stat = file.stat()
                text = file.read_bytes() if file.suffix.lower() in CAPTION_SUFFIXES else b""
            except OSError as error:  # deleted meanwhile, or not readable: the scan will say so
                digest.update(repr((name, error.errno)).encode())
                continue
            relative = file.relative_to(folder).as_posix()
            digest.update(
                repr((relative, stat.st_size, stat.st_mtime_ns, len(text))).encode("utf-8", "surrogatepass")
            )
            digest.update(text)
    return digest.hexdigest()
