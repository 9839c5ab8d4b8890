"""How a folder is read: one table for the command line, the node and Python, strictly checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import Info
from ..errors import LoraGraftError
from .folders import MAX_REPEATS
from .images import HARD_MAX_PIXELS, MAX_PIXELS, shown

# A file of such a name is meant to be an image: if it cannot be read, the user must hear of it.
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".tga", ".image"),
)
# Where captions come from besides text files: one JSON for many images, a downloader's JSON, class words.
JSON, SIDECAR, FOLDER = "json", "sidecar", "folder"
CAPTION_SOURCES = ("txt", "caption", JSON, SIDECAR, FOLDER)
CAPTION_LINES = ("first", "all", "tags", "words")
MASKS = ("none", "alpha", "folder")
ANIMATED = ("first frame", "leave out")
ON_BAD = ("stop", "skip")
CHECKS = ("decode", "header")
MAX_MEGAPIXELS = HARD_MAX_PIXELS / 10**6


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    advanced: bool = True,
) -> Any:
    info = Info(help, minimum, maximum, choices, advanced)
    return dataclasses.field(default=default, metadata={"info": info})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """How a folder of images is read; every field has its help and range in its metadata."""

    recursive: bool = _option(True, "Read subfolders too.", advanced=False)
    class_tokens: str = _option(
        "",
        "Trigger words of images whose folder names none, for instance: ohwx person.",
        advanced=False,
    )
    default_repeats: int = _option(
        1,
        "How often an image is used per epoch where its folder's name gives no number.",
        minimum=1,
        maximum=MAX_REPEATS,
        advanced=False,
    )
    on_bad: str = _option(
        "stop",
        "Unreadable images: stop and name them all, or skip them and name them in the report.",
        choices=ON_BAD,
        advanced=False,
    )
    captions: tuple[str, ...] = _option(
        CAPTION_SOURCES,
        "Where captions are looked for; the first that an image has is taken. A text file's suffix (txt, "
        "caption), json (one file for many images, as HCP and kohya write them), sidecar (gallery-dl's and "
        "yt-dlp's .json and .info.json), folder (the class words in the folder's name).",
    )
    caption_lines: str = _option(
        "first",
        "What a caption file of several lines means: take the first line, keep all (for wildcards), or each "
        "line is a tag (gallery-dl --write-tags); words: tags stand between spaces (Grabber).",
        choices=CAPTION_LINES,
    )
    caption_json: str = _option(
        "",
        "A JSON file of captions for all images; without it, those that lie in the folder are taken.",
    )
    masks: str = _option(
        "none",
        "Where to learn: everywhere, where the image is opaque (alpha), or as pictures of the same names in "
        "mask_folder say (white: fully, black: not at all).",
        choices=MASKS,
    )
    mask_folder: str = _option("masks", "The folder of masks, inside the image folder or elsewhere.")
    background: tuple[int, int, int] = _option(
        (255, 255, 255), "The colour (red, green, blue) under transparent parts.", minimum=0, maximum=255
    )
    is_reg: bool = _option(False, "All images are regularisation images.")
    reg_folder: str = _option(
        "", "A subfolder of this name holds regularisation images; empty: there is none."
    )
    animated: str = _option(
        "first frame",
        "Animated images: take the first frame, or leave them out, for instance to extract their frames.",
        choices=ANIMATED,
    )
    max_megapixels: float = _option(
        MAX_PIXELS / 10**6,
        "An image of more millions of pixels counts as unreadable.",
        minimum=0.001,
        maximum=MAX_MEGAPIXELS,
    )
    check: str = _option(
        "decode",
        "How images are checked: each is decoded once, or only its header is read (quick, and no proof).",
        choices=CHECKS,
    )

    @property
    def max_pixels(self) -> int:
        """Return the pixel cap in pixels."""
        return int(self.max_megapixels * 10**6)

    @property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of caption text files, with dot and in lower case, in their order."""
        return tuple(f".{name.casefold()}" for name in self.captions if name not in (JSON, SIDECAR, FOLDER))


def scan_options(**values: Any) -> ScanOptions:
    """Return the options with these values; ``caption_extensions`` replaces txt and caption in ``captions``.

    Raises LG-CFG-003 for a value that is none of an option's, and TypeError for an unknown option.
    """
    extensions = values.pop("caption_extensions", None)
    if isinstance(values.get("captions"), list):
        values["captions"] = tuple(values["captions"])
    if isinstance(values.get("background"), list):
        values["background"] = tuple(values["background"])
    options = ScanOptions(**values)
    _check_values(options)
    if extensions is not None:
        _check_extensions(extensions)
        names = tuple(extension.removeprefix(".") for extension in extensions)
        options = dataclasses.replace(options, captions=(*names, *CAPTION_SOURCES[2:]))
    _check_captions(options.captions)
    return options


def parse_captions(text: str) -> tuple[str, ...]:
    """Read ``captions`` as a widget writes them: names between commas."""
    return tuple(name for part in text.split(",") if (name := part.strip().removeprefix(".").casefold()))


def _check_values(options: ScanOptions) -> None:
    for item in dataclasses.fields(options):
        value, info = getattr(options, item.name), item.metadata["info"]
        kind = type(item.default)
        if info.choices and value not in info.choices:
            raise _bad(item.name, value, " or ".join(map(repr, info.choices)))
        if isinstance(item.default, bool) != isinstance(value, bool) or not isinstance(
            value, (int, float) if kind is float else kind
        ):
            raise _bad(item.name, value, f"a value like {item.default!r}")
        if info.minimum is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            size = len(item.default) if isinstance(item.default, tuple) else 1
            whole = all(isinstance(n, int) for n in numbers) or kind is float
            if (
                len(numbers) != size
                or not whole
                or not all(info.minimum <= n <= info.maximum for n in numbers)
            ):
                raise _bad(item.name, value, f"{info.minimum:g} to {info.maximum:g}")


def _check_extensions(extensions: Sequence[str]) -> None:
    for extension in extensions:
        if isinstance(extensions, str) or not extension.startswith(".") or extension in IMAGE_SUFFIXES:
            raise _bad("caption_extensions", extensions, "suffixes such as ['.txt', '.caption']")


def _check_captions(captions: Sequence[str]) -> None:
    plain = [name for name in captions if isinstance(name, str) and name and "/" not in name]
    if len(set(plain)) < len(captions) or any(f".{name.casefold()}" in IMAGE_SUFFIXES for name in plain):
        raise _bad("captions", list(captions), f"names such as {', '.join(CAPTION_SOURCES)}")


def _bad(name: str, value: object, expected: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 30)}, expected {shown(expected, 50)}.",
        where=name,
        why="the folder would be read in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )
