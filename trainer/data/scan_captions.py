"""Find every image's caption: text files, one JSON for many, downloaders' sidecars, class words, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoraGraftError, listed
from .caption_files import CaptionFileError, CaptionText, pair_captions, read_caption
from .folders import natural_key, split_suffix, suffix_of
from .images import shown
from .report import counted
from .scan_options import FOLDER, JSON, SIDECAR, ScanOptions
from .sidecars import MAX_SIDECAR_BYTES, caption_list, read_json, sidecar_caption

JSON_SUFFIX = ".json"
SIDECAR_SUFFIXES = (".json", ".info.json")
CHOSEN = "(caption_json)"


@dataclass
class Captions:
    """What was found: {image: (caption, source)}, and what is to be said about it."""

    found: dict[str, tuple[str, str]] = field(default_factory=dict)
    several: list[str] = field(default_factory=list)  # images with text files that differ
    shared: list[str] = field(default_factory=list)  # text files of several images
    long: list[str] = field(default_factory=list)  # text files of which only the first line is used
    orphans: list[str] = field(default_factory=list)  # caption files without an image
    unmatched: list[str] = field(default_factory=list)  # entries of a JSON without an image
    silent: list[str] = field(default_factory=list)  # sidecars that hold no caption
    others: list[str] = field(default_factory=list)  # JSON files about something else
    without: list[str] = field(default_factory=list)  # images with no words at all


class CaptionFinder:
    """Looks for captions among ``files`` ({name: path} of all that may be caption files)."""

    def __init__(self, files: Mapping[str, str | Path], options: ScanOptions) -> None:
        self._options = options
        suffixes = options.caption_suffixes
        self._texts = {n: p for n, p in files.items() if suffixes and n.casefold().endswith(suffixes)}
        wanted = JSON in options.captions or SIDECAR in options.captions
        json = {n: p for n, p in files.items() if wanted and n.casefold().endswith(JSON_SUFFIX)}
        self._json = {name: path for name, path in json.items() if name not in self._texts}
        self._wrong: dict[str, str] = {}
        self.captions = Captions()

    def find(self, usable: Sequence[str], images: Sequence[str], words: Mapping[str, str]) -> Captions:
        """Return the captions of the ``usable`` images.

        ``images`` are all, also those that are left out; ``words`` holds the class words of each.
        Raises LG-DATA-004, LG-DATA-005, LG-DATA-007 and LG-DATA-024.
        """
        captions, options = self.captions, self._options
        pairs, orphans = pair_captions(images, self._texts, options.caption_suffixes)
        sides, alone = pair_captions(images, self._json, SIDECAR_SUFFIXES)
        captions.orphans = orphans
        read = self._read_texts({name for image in usable for name in pairs[image]})
        lists = self._read_lists(alone, images)
        ways: dict[str, Callable[[str], str]] = {
            JSON: lambda image: lists.get(image, ""),
            SIDECAR: lambda image: self._in_sidecar(sides[image]),
            FOLDER: lambda image: words[image],
        }
        # The text files of one image have an order of their own, so they count as one source.
        order = list(dict.fromkeys(name if name in ways else "text" for name in options.captions))
        used: list[str] = []
        for image in usable:
            for source in order:
                if source == "text":
                    names = pairs[image]
                    text = read[names[0]].read_as(options.caption_lines) if names else ""
                    if text:
                        used.append(names[0])
                        captions.found[image] = text, suffix_of(names[0])[1:]
                        break
                elif text := ways[source](image):
                    captions.found[image] = text, source
                    break
        self._refuse_unread_json()
        self._check(usable, pairs, lists)
        self._note(used, pairs, read)
        return captions

    # ---- text files ----

    def _read_texts(self, names: Iterable[str]) -> dict[str, CaptionText]:
        read: dict[str, CaptionText] = {}
        unreadable: dict[str, str] = {}
        for name in sorted(names):
            try:
                read[name] = read_caption(self._texts[name])
            except CaptionFileError as error:
                unreadable[name] = str(error)
        if unreadable:
            raise LoraGraftError(
                "LG-DATA-004",
                f"{counted(len(unreadable), 'caption file')} cannot be read as UTF-8 text.",
                where=_reasons(unreadable),
                why="guessing the encoding could train wrong words without anybody noticing.",
                fix="open the file in a text editor and save it with the encoding UTF-8",
            )
        empty = [name for name, caption in read.items() if not caption.num_lines]
        if empty:
            raise LoraGraftError(
                "LG-DATA-005",
                f"{counted(len(empty), 'empty caption file')}.",
                where=listed(shown(name) for name in empty),
                why="an empty caption teaches the image without words, which is rarely meant.",
                fix="write a caption into each, or delete the files so that the folder's class words are "
                "used",
            )
        return read

    def _note(
        self, used: Sequence[str], pairs: Mapping[str, list[str]], read: Mapping[str, CaptionText]
    ) -> None:
        notes = self.captions
        notes.shared = [name for name, count in Counter(used).items() if count > 1]
        if self._options.caption_lines == "first":
            notes.long = [name for name in dict.fromkeys(used) if read[name].num_lines > 1]
        notes.several = [
            f"{image} ({', '.join(names)})"
            for image, names in pairs.items()
            if image in notes.found and len({read[name].text for name in names}) > 1
        ]

    # ---- JSON ----

    def _read_lists(self, alone: Sequence[str], images: Sequence[str]) -> dict[str, str]:
        """Return {image: caption} out of the JSON files that are no image's own; the nearest file counts."""
        if JSON not in self._options.captions:
            return {}
        chosen = self._options.caption_json
        files: dict[str, str | Path] = (
            {CHOSEN: chosen} if chosen else {name: self._json[name] for name in alone}
        )
        found: dict[str, str] = {}
        matched_any = False
        # Files in deeper folders go first: what lies nearer to an image is about it.
        for name in sorted(files, key=lambda n: (-n.count("/"), natural_key(n))):
            try:
                content = read_json(files[name])
            except CaptionFileError as error:
                self._wrong[chosen if name == CHOSEN else name] = str(error)
                continue
            entries = caption_list(content)
            if entries is None and chosen:
                self._wrong[chosen] = "it is not of the form {image: caption}"
            elif entries is None:
                self.captions.others.append(name)
            else:
                folder = "" if chosen else name.rpartition("/")[0]
                matches = match_entries(entries, images, folder)
                matched_any = matched_any or bool(matches)
                empty = [key for key in matches.values() if not entries[key]]
                self._wrong |= {f"{name}: {key}": "an empty caption" for key in empty}
                rest = [key for key in entries if key not in set(matches.values())]
                self.captions.unmatched += [f"{name}: {key}" if name != CHOSEN else key for key in rest]
                for image, key in matches.items():
                    found.setdefault(image, entries[key])
        if chosen and not matched_any:
            self._wrong.setdefault(chosen, "none of its entries names an image of the folder")
        return found

    def _in_sidecar(self, names: Sequence[str]) -> str:
        for name in names:
            try:
                if text := sidecar_caption(read_json(self._json[name], MAX_SIDECAR_BYTES)):
                    return text
                self.captions.silent.append(name)
            except CaptionFileError as error:
                self._wrong[name] = str(error)
        return ""

    # ---- refusals ----

    def _refuse_unread_json(self) -> None:
        if self._wrong:
            raise LoraGraftError(
                "LG-DATA-024",
                f"{counted(len(self._wrong), 'JSON caption')} or file of captions cannot be used.",
                where=_reasons(self._wrong),
                why="the captions in it would be missing without anybody noticing.",
                fix="repair or remove it, or take 'json' and 'sidecar' out of captions",
            )

    def _check(self, usable: Sequence[str], pairs: Mapping[str, list[str]], lists: Mapping[str, str]) -> None:
        found = self.captions.found
        if self._texts and not any(pairs[image] for image in usable) and not (found.keys() & lists.keys()):
            raise LoraGraftError(
                "LG-DATA-007",
                f"None of {counted(len(self._texts), 'caption file')} belongs to an image.",
                where=listed(shown(name) for name in sorted(self._texts)),
                why="a caption file lies beside its image and has its name: photo.txt or photo.png.txt.",
                fix="rename the caption files after their images, or move them out of the folder",
            )
        # Taggers and captioners may come next; building a train set refuses what has no words then.
        self.captions.without = [image for image in usable if image not in found]
        found |= dict.fromkeys(self.captions.without, ("", ""))


def match_entries(entries: Iterable[str], images: Sequence[str], folder: str) -> dict[str, str]:
    """Return {image: key} for a JSON file in ``folder`` ("" is the root): only images there or below.

    A key is an image's path from that folder, with or without suffix, or its bare name, if only one image
    has it (one in the folder itself goes first). Of a path that leads elsewhere, as kohya writes full
    paths, only the name counts, so that no file of another folder is ever meant.
    """
    keys = list(entries)
    names = Counter(_bare(key) for key in keys)
    table: dict[str, str] = {_bare(key): key for key in keys if names[_bare(key)] == 1}
    table |= {key.replace("\\", "/"): key for key in keys}
    inside = [image for image in images if not folder or image.startswith(f"{folder}/")]
    start = len(folder) + 1 if folder else 0
    bare = Counter(name for image in inside for name in _names(image.rpartition("/")[2]))
    matches: dict[str, str] = {}
    for image in inside:
        path = image[start:]
        wanted = _names(path)
        if "/" in path:
            wanted += [name for name in _names(path.rpartition("/")[2]) if bare[name] == 1]
        key = next((table[name] for name in wanted if name in table), None)
        if key is not None:
            matches[image] = key
    return matches


def _names(path: str) -> list[str]:
    """Return a name as it stands and without its suffix."""
    return list(dict.fromkeys((path, split_suffix(path)[0])))


def _bare(path: str) -> str:
    """Return the last part of a path as any system writes it."""
    return path.replace("\\", "/").rpartition("/")[2]


def _reasons(wrong: Mapping[str, str]) -> str:
    return listed(f"{shown(name)} ({reason})" for name, reason in wrong.items())
