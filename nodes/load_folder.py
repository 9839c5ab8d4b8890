"""Load Image Folder: from a folder to records of its images and captions."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainer.data import scan_options as options
from ..trainer.errors import LoraGraftError
from .sockets import Dataset
from .step_progress import teller

HELP = {name: field.metadata["info"].help for name, field in options.ScanOptions.__dataclass_fields__.items()}
MASK_FOLDER, BACKGROUND = "masks", "#ffffff"
# Read again where the fingerprint is taken: an edited caption must be noticed even within a clock tick.
TEXT_SUFFIXES = (".txt", ".caption", ".json")
# What images were like when they were last decoded, so that one changed image is decoded alone.
_seen: dict[Any, Any] = {}


class LoadImageFolder(io.ComfyNode):
    """Read a folder of images and captions; paths and captions only, no pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftLoadImageFolder",
            display_name="Load Image Folder",
            category="LoraGraft/dataset",
            description="Reads a folder of training images with their captions (text files, JSON, "
            "downloaders' sidecars) and masks. Subfolders named like '4_cat' mean: 4 repeats, concept 'cat'.",
            search_aliases=["dataset", "training images", "captions", "kohya", "masks", "regularisation"],
            inputs=[
                io.String.Input(
                    "path",
                    default="[demo]",
                    tooltip="Folder below ComfyUI's input folder. Also: an absolute path below input, "
                    "output or a folder listed in user/__loragraft/folders.txt; 'name [output]'; or [demo], "
                    "the embedded sample.",
                ),
                io.Boolean.Input("recursive", default=True, tooltip=HELP["recursive"]),
                io.String.Input("class_tokens", default="", tooltip=HELP["class_tokens"]),
                io.Int.Input(
                    "default_repeats", default=1, min=1, max=10_000, tooltip=HELP["default_repeats"]
                ),
                io.Combo.Input(
                    "on_bad", options=list(options.ON_BAD), default="stop", tooltip=HELP["on_bad"]
                ),
                *_advanced_inputs(),
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
    def fingerprint_inputs(
        cls,
        path: str | None = "",
        recursive: bool = True,
        masks: str | None = options.MASKS[0],
        mask_folder: str | None = MASK_FOLDER,
        **others: Any,
    ) -> str:
        """Change when a file's name, size or time, or a caption's text changes; always for linked paths."""
        from . import host

        if path is None or mask_folder is None:
            return uuid.uuid4().hex  # what a linked path leads to is not known before the node runs
        found = []
        try:
            folder = host.dataset_folder(path)
            found.append(fingerprint(folder, recursive))
            inner = _mask_folder(folder, masks, mask_folder)
            found += [fingerprint(inner, True)] if inner is not None else []
        except LoraGraftError as error:  # the scan will say so
            found.append(error.what)
        return " ".join(found)

    @classmethod
    def execute(
        cls,
        path: str,
        recursive: bool,
        class_tokens: str,
        default_repeats: int,
        on_bad: str,
        captions: str = ", ".join(options.CAPTION_SOURCES),
        caption_json: str = "",
        mask_folder: str = MASK_FOLDER,
        background: str = BACKGROUND,
        **others: Any,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        folder = host.dataset_folder(path)
        masks = _mask_folder(folder, others.get("masks"), mask_folder)
        if masks is not None and not masks.is_relative_to(folder):
            mask_folder = str(masks)
        json = api.resolve(folder, caption_json, what="caption_json", must_exist=True) if caption_json else ""
        dataset = api.scan_folder(
            folder,
            seen=_seen,
            progress=teller(),
            recursive=recursive,
            class_tokens=class_tokens,
            default_repeats=default_repeats,
            on_bad=on_bad,
            captions=api.parse_captions(captions),
            caption_json=str(json),
            mask_folder=mask_folder,
            background=parse_color(background),
            **others,
        )
        return io.NodeOutput(dataset, "\n".join(dataset.lines))


def _advanced_inputs() -> list[Any]:
    """Return the optional widgets; new ones go to the end, because saved workflows count positions."""
    extra: dict[str, Any] = {"optional": True, "advanced": True}

    def text(name: str, default: str, tooltip: str = "") -> Any:
        return io.String.Input(name, default=default, tooltip=tooltip or HELP[name], **extra)

    def choice(name: str, choices: tuple[str, ...]) -> Any:
        return io.Combo.Input(name, options=list(choices), default=choices[0], tooltip=HELP[name], **extra)

    return [
        text("captions", ", ".join(options.CAPTION_SOURCES)),
        choice("caption_lines", options.CAPTION_LINES),
        text("caption_json", ""),
        choice("masks", options.MASKS),
        text("mask_folder", MASK_FOLDER),
        text("background", BACKGROUND, "The colour under transparent parts, as #rrggbb."),
        io.Boolean.Input("is_reg", default=False, tooltip=HELP["is_reg"], **extra),
        text("reg_folder", ""),
        choice("animated", options.ANIMATED),
        io.Float.Input(
            "max_megapixels",
            default=64.0,
            min=0.1,
            max=options.MAX_MEGAPIXELS,
            step=1.0,
            tooltip=HELP["max_megapixels"],
            **extra,
        ),
    ]


def _mask_folder(folder: Path, masks: str | None, text: str) -> Path | None:
    """Return the folder of masks if one is wanted; raises LG-PATH errors and LG-NODE-020."""
    from . import host

    return host.inner_folder(folder, text, what="mask_folder") if masks == "folder" else None


def parse_color(text: str) -> tuple[int, int, int]:
    """Read a colour written as #rrggbb; raises LG-CFG-003."""
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", text.strip()):
        raise LoraGraftError(
            "LG-CFG-003",
            f"Setting 'background' is {text[:30]!r}, expected a colour as #rrggbb.",
            where="background",
            why="transparent parts would lie on another colour than you asked for.",
            fix="write for instance #ffffff (white) or #808080 (grey)",
        )
    value = int(text.strip()[1:], 16)
    return value >> 16, value >> 8 & 255, value & 255


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
                text = file.read_bytes() if file.suffix.lower() in TEXT_SUFFIXES else b""
            except OSError as error:  # deleted meanwhile, or not readable: the scan will say so
                digest.update(repr((name, error.errno)).encode("utf-8", "surrogatepass"))
                continue
            relative = file.relative_to(folder).as_posix()
            digest.update(
                repr((relative, stat.st_size, stat.st_mtime_ns, len(text))).encode("utf-8", "surrogatepass")
            )
            digest.update(text)
    return digest.hexdigest()
