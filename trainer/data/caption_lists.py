"""Set captions from a list of texts, one per image in order, as captioning models give them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import LoraGraftError, listed
from .caption_ops import Edited
from .caption_templates import check_template, fill_template, placeholders
from .images import shown
from .records import Dataset
from .report import counted
from .tag_counts import change_lines, count_captions

WORDS = ("caption", "tags", "trigger", "class")
MAX_LIST_BYTES = 64 * 2**20


def set_captions(
    dataset: Dataset,
    captions: Sequence[str],
    *,
    template: str = "{caption}",
    trigger: str = "",
    separator: str = ",",
) -> Edited:
    """Give each record, in order, the template filled with the list's text.

    ``{caption}`` is the text (its lines joined), ``{tags}`` the record's caption so far, ``{class}`` its
    folder's words, ``{trigger}`` the trigger or else the folder's words. Raises LG-DATA-071, -075 and -076.
    """
    check_template(template, WORDS)
    records = dataset.records
    if len(captions) != len(records):
        raise LoraGraftError(
            "LG-DATA-075",
            f"{counted(len(captions), 'caption')} for {counted(len(records), 'image')}.",
            where="captions",
            why="the first caption goes to the first image and so on; with gaps they would be mixed up.",
            fix="caption exactly the images of this dataset, in its order",
        )
    texts = [" ".join(text.split()) for text in captions]
    names = set(placeholders(template))
    words = [
        {
            "caption": text,
            "tags": record.caption,
            "trigger": trigger.strip() or record.concept,
            "class": record.concept,
        }
        for record, text in zip(records, texts, strict=True)
    ]
    _check_texts(dataset, words, names)
    filled = [fill_template(template, known) for known in words]
    new = tuple(
        dataclasses.replace(record, caption=caption, caption_source="list")
        for record, caption in zip(records, filled, strict=True)
    )
    before = count_captions([record.caption for record in records], separator)
    lines = [f"Captions set from a list: {counted(len(records), 'image')}, template '{shown(template)}'."]
    joined = sum(1 for text in captions if len(text.strip().splitlines()) > 1)
    if joined:
        lines.append(f"{counted(joined, 'caption')} of several lines were joined into one line.")
    lines += change_lines(before, count_captions(filled, separator))
    return Edited(dataset.replaced(new, *lines), tuple(lines))


def read_caption_list(file: Path) -> list[str]:
    """Read a JSON list of texts, or a text file with one caption per line. Raises LG-DATA-077."""
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise _bad_list(file, f"it is larger than {MAX_LIST_BYTES // 2**20} MiB.")
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_list(file, f"{error}.") from None
    if file.suffix.casefold() != ".json":
        return text.splitlines()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_list(file, f"{error}.") from None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _bad_list(file, "it is no list of texts.")
    return found


def _check_texts(dataset: Dataset, words: Sequence[dict[str, str]], names: set[str]) -> None:
    """Refuse what would leave captions without the words that the template asks for."""
    empty = [
        f"{shown(record.name)} ({', '.join(missing)})"
        for record, known in zip(dataset.records, words, strict=True)
        if (missing := [name for name in ("caption", "trigger") if name in names and not known[name].strip()])
    ]
    if empty:
        raise LoraGraftError(
            "LG-DATA-076",
            f"{counted(len(empty), 'image')} with nothing for a name in the template.",
            where=listed(empty),
            why="the captioning model gave no text, or there is neither a trigger nor class words.",
            fix="caption these images again or leave them out; fill in trigger where it is missing",
        )


def _bad_list(file: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-077",
        "The list of captions cannot be read.",
        where=shown(file),
        why=why,
        fix='give a UTF-8 text file with one caption per line, or JSON: ["first", "second"]',
    )
