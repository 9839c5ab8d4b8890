"""Say in plain words what a scan found: images, captions, masks, and what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import ImageFile

from ..errors import listed
from .color import IGNORED, TOO_LARGE, UNFIT, WHITE
from .folders import Found, Walk, natural_key
from .images import ImageFacts, shown
from .records import Record
from .report import counted
from .scan_captions import Captions
from .scan_options import FOLDER, JSON, SIDECAR, ScanOptions

NUM_NAMES = 8
LEFT_ASIDE = (IGNORED, TOO_LARGE, UNFIT)


@dataclass
class LeftOut:
    """What lies in the folder and is not trained on, by reason."""

    bad: dict[str, str] = field(default_factory=dict)
    zero_repeats: list[str] = field(default_factory=list)
    animated: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def image_lines(
    records: Sequence[Record], root_name: str, facts: Mapping[str, ImageFacts], options: ScanOptions
) -> list[str]:
    """Return how many images there are, how often they count, and what is odd about some."""
    total = sum(record.repeats for record in records)
    lines = [f"{counted(len(records), 'image')} in {shown(root_name)}, {total} with repeats."]
    groups = Counter((r.repeats, r.concept, r.is_reg) for r in records)
    for (repeats, concept, is_reg), count in groups.items():
        words = f"class words '{shown(concept)}'" if concept else "no class words"
        kind = ", regularisation" if is_reg else ""
        lines.append(f"  {repeats} x {counted(count, 'image')}, {words}{kind}")
    if options.check == "header":
        lines.append("Only the headers were read: nothing proves yet that the images are whole.")
    same: dict[str, list[str]] = {}
    for record in records:
        if record.content_hash:
            same.setdefault(record.content_hash, []).append(record.name)
    twins = [" = ".join(names) for names in same.values() if len(names) > 1]
    alpha = [r.name for r in records if facts[r.name].has_alpha]
    animated = [r.name for r in records if facts[r.name].is_animated]
    profiles = {r.name: facts[r.name].profile for r in records if facts[r.name].profile}
    ground = "white" if options.background == WHITE else f"the colour {options.background}"
    aside = [f"{name} ({note})" for name, note in profiles.items() if note in LEFT_ASIDE]
    used = [f"{name} ({shown(note, 40)})" for name, note in profiles.items() if note not in LEFT_ASIDE]
    lines += noted("The same picture more than once", twins)
    lines += noted(f"Transparent parts are laid on {ground}", alpha)
    lines += noted("Only the first frame or page is used", animated)
    lines += noted("Colours are converted to sRGB", used)
    lines += noted("The colour profile cannot be used, colours are taken as sRGB", aside)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        lines.append(
            "Another part of this process makes Pillow accept truncated images; some may go unnoticed."
        )
    return lines


def caption_lines(records: Sequence[Record], captions: Captions, options: ScanOptions) -> list[str]:
    """Return where the captions come from, in which order, and which files were not taken as they are."""
    words = {
        JSON: "from a JSON of many",
        SIDECAR: "from sidecars",
        FOLDER: "from class words, having no caption file",
        "": "missing",
    }
    counts = Counter(record.caption_source for record in records)
    parts = [f"{count} {words.get(source, f'from .{source} files')}" for source, count in counts.items()]
    several_lines = noted("Caption files of several lines, only the first is used", captions.long)
    if several_lines:
        several_lines.append("  caption_lines 'all' keeps all lines, 'tags' takes each as a tag.")
    return [
        f"Captions: {', '.join(parts)}.",
        f"  looked for in this order: {', '.join(options.captions)}.",
        *noted("Several caption files that differ, the first is used", captions.several),
        *noted("Caption files that several images share", captions.shared),
        *several_lines,
        *noted("Sidecars that hold neither tags nor text", captions.silent),
        *noted("No caption yet, tag them or set captions before they are trained", captions.without),
        *noted("Caption files that belong to no image", captions.orphans),
        *noted("Captions of images that are not there", captions.unmatched),
    ]


def mask_lines(records: Sequence[Record], unused: Sequence[str], options: ScanOptions) -> list[str]:
    """Return how many images have masks, which have none, and which masks have no image."""
    if options.masks == "none":
        return []
    without = [record.name for record in records if record.mask is None]
    kind = "alpha channels" if options.masks == "alpha" else f"the folder {shown(options.mask_folder)}"
    return [
        f"Masks: {len(records) - len(without)} from {kind}.",
        *noted("Without a mask, learned everywhere", without),
        *noted("Masks that belong to no image", unused),
    ]


def left_out_lines(left: LeftOut, found: Walk) -> list[str]:
    """Return what lies in the folder and is not trained on."""
    unread = [path.name for path in found.unread_folders]
    return [
        *noted("Skipped, cannot be read", [f"{name} ({reason})" for name, reason in left.bad.items()]),
        *noted("Left out, the folder's name asks for 0 repeats", left.zero_repeats),
        *noted("Left out, animated", left.animated),
        *noted("Left out, links that lead out of the folder or nowhere", found.links),
        *noted("Left out, links to folders", found.linked_folders),
        *noted("Left out, neither files nor folders", found.special),
        *noted("Left out, hidden", found.hidden),
        *noted("Left out, folders in this one, because 'recursive' is off", unread),
        *noted("Left out, not images", left.others),
    ]


def noted(text: str, names: Iterable[str]) -> list[str]:
    """Return one line with the text, how many there are and the first of them; none for nothing."""
    items = [shown(name) for name in sorted(names, key=natural_key)]
    return [f"{text} ({len(items)}): {listed(items, limit=NUM_NAMES)}."] if items else []


def names_of(files: Iterable[Found]) -> list[str]:
    """Return the files' names."""
    return [file.name for file in files]
