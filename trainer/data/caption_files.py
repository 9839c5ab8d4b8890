"""Find the caption file of each image, and read it as UTF-8 or say which encoding it has instead."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bytes_at import opened
from .folders import split_suffix
from .images import UnreadableImageError, is_image

MAX_CAPTION_BYTES = 2**20
START_BYTES = 4096  # nearly every caption ends before

BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class CaptionFileError(ValueError):
    """Why one caption file cannot be read; callers list all such files in one LoraGraftError."""


@dataclass(frozen=True)
class CaptionText:
    """The lines that are not empty, without the spaces around them; ``text`` is the first one."""

    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the first line, "" of an empty file."""
        return self.lines[0] if self.lines else ""

    @property
    def num_lines(self) -> int:
        """Return how many lines there are that are not empty."""
        return len(self.lines)

    def read_as(self, kind: str) -> str:
        """Return the caption where lines mean this (see ScanOptions.caption_lines)."""
        return READ_AS[kind](self.lines)


def _tags(lines: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(lines))


def _words(lines: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(word for line in lines for word in line.split()))


READ_AS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "first": lambda lines: lines[0] if lines else "",
    "all": "\n".join,
    "tags": _tags,
    "words": _words,
}


def pair_captions(
    images: Iterable[str], captions: Iterable[str], extensions: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return each image's caption files, the best first, and the files that belong to no image.

    Names are relative to the root; a caption lies in its image's folder. ``photo.png.txt`` goes
    before ``photo.txt``, then the extensions' order counts. Where no file has the exact spelling,
    capitals and Unicode composition do not matter, so that a dataset means the same on every system.
    """
    orphans = set(captions)
    if not orphans:
        return {image: [] for image in images}, []
    spellings: dict[str, list[str]] = {}
    for name in sorted(orphans):
        spellings.setdefault(folded(name), []).append(name)
    endings = [(extension, folded(extension)) for extension in extensions]
    pairs: dict[str, list[str]] = {}
    for image in images:
        stem = split_suffix(image)[0]
        found: list[str] = []
        for base in (image, stem) if stem != image else (image,):
            loose = folded(base)
            for extension, ending in endings:
                # No letter of a base joins with an extension's dot, so the parts can be folded apart.
                if names := spellings.get(loose + ending):
                    exact = base + extension
                    found += [n for n in ([exact] if exact in names else names) if n not in found]
        pairs[image] = found
        orphans.difference_update(found)
    return pairs, sorted(orphans)


def read_caption(path: Path | str) -> CaptionText:
    """Read a caption file; a byte order mark is fine. Raises CaptionFileError with the likely encoding."""
    try:
        with opened(path) as file:
            data = file.get(0, START_BYTES)
            if len(data) == START_BYTES:
                data = file.get(0, MAX_CAPTION_BYTES + 1)
            if len(data) > MAX_CAPTION_BYTES:
                raise CaptionFileError(f"more than {MAX_CAPTION_BYTES // 2**20} MiB, too long for a caption")
        if b"\x00" in data[:4096] and _is_picture(path):
            raise CaptionFileError("it is an image, not text; give it an image's suffix")
    except OSError as error:
        raise CaptionFileError(error.strerror or type(error).__name__) from error
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        raise CaptionFileError(f"looks like {likely_encoding(data)}") from None
    if "\x00" in text:
        raise CaptionFileError(f"looks like {likely_encoding(data)}")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    return CaptionText(tuple(lines))


def likely_encoding(data: bytes) -> str:
    """Guess the encoding of bytes that are not UTF-8: a hint in a message, never used to decode."""
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return name
    if b"\x00" in data:
        even, odd = data[0::2].count(0), data[1::2].count(0)
        return "UTF-16" if max(even, odd) > 4 * min(even, odd) else "binary data"
    if (text := _decoded(data, "shift_jis")) and _share(text, "\u3040", "\u30ff") > 0.2:
        return "Shift_JIS"
    # Bytes above 0x7F come in runs in Asian and Cyrillic text, and alone between letters in Western text.
    runs = re.findall(rb"[\x80-\xff]+", data)
    num_high = sum(map(len, runs))
    if sum(len(run) for run in runs if len(run) > 1) > num_high / 2:
        if sum(byte >= 0xE0 for byte in data) > 0.7 * num_high and _decoded(data, "cp1251"):
            return "Windows-1251"
        if (text := _decoded(data, "euc_kr")) and _share(text, "\uac00", "\ud7a3") > 0.8:
            return "EUC-KR"
        if _decoded(data, "gbk"):
            return "GBK"
        if _decoded(data, "big5"):
            return "Big5"
    return "Windows-1252" if _decoded(data, "cp1252") else "another encoding, or damaged"


def _is_picture(path: Path | str) -> bool:
    try:
        return is_image(path)
    except UnreadableImageError:  # a picture, and too large
        return True


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _share(text: str, first: str, last: str) -> float:
    foreign = [c for c in text if c > "\x7f"]
    return sum(first <= c <= last for c in foreign) / max(1, len(foreign))


def folded(name: str) -> str:
    """Return the name in which capitals and Unicode composition do not matter."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
