"""Edit captions by an ordered list of operations, one per line: ``delete: [hair], *hat``.

The list is a small fixed grammar (`caption_steps.OPERATIONS`), never an expression. Only the records change,
never the caption files. Tags are compared as `tag_lists.plain` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LoraGraftError, listed, nearest
from .caption_steps import (
    ARROW,
    NO_ARGUMENT,
    OPERATIONS,
    Item,
    Operation,
    State,
    check_lengths,
    sides,
    unescape_brackets,
)
from .captions import tags_of
from .images import shown
from .records import Dataset
from .report import counted
from .tag_counts import change_lines, count_captions

MAX_LINES = 500
MAX_TEXT = 200_000
MAX_NOUNS = 200

# The guides' ways to caption a character, as lists of operations; {trigger} is the node's trigger, else
# the folder's class words.
PRESETS: dict[str, str] = {
    "none": "",
    "all tags": "trigger: {trigger}\ndeduplicate",
    "prune features": "delete: [features]\ntrigger: {trigger}\ndeduplicate",
    "keep list": "keep only: [kept]\ntrigger: {trigger}\ndeduplicate",
    "trigger only": "template: {trigger}",
}


@dataclass(frozen=True)
class Edited:
    """The dataset with its new captions, and what became of them."""

    dataset: Dataset
    lines: tuple[str, ...]


def edit_captions(
    dataset: Dataset, operations: str, *, preset: str = "none", trigger: str = "", separator: str = ","
) -> Edited:
    """Apply a preset's operations, then those given, to every caption; nothing on disk changes.

    Raises LG-DATA-070 to -074, -078 and LG-CFG-003.
    """
    if preset not in PRESETS:
        raise _setting("preset", preset, f"one of {', '.join(PRESETS)}")
    if not separator:
        raise _setting("separator", separator, "what stands between two tags, usually a comma")
    steps = read_operations(PRESETS[preset], where=f"preset '{preset}'") + read_operations(operations)
    items = [Item(record, tags_of(record.caption, separator)) for record in dataset.records]
    before = [record.caption for record in dataset.records]
    state = State(separator, trigger)
    lines = []
    for operation in steps:
        old = [list(item.tags) for item in items]
        state.spared.clear()
        OPERATIONS[operation.name].make(operation)(items, state)
        check_lengths(items, operation)
        lines += _effect_lines(operation, old, items, state)
    captions = [
        state.joined(item.tags) if item.tags != tags_of(was, separator) else was
        for item, was in zip(items, before, strict=True)
    ]
    _check_filled(items, captions)
    records = tuple(
        record
        if caption == record.caption
        else dataclasses.replace(record, caption=caption, caption_source="edited")
        for record, caption in zip(dataset.records, captions, strict=True)
    )
    changed = sum(1 for old, new in zip(before, captions, strict=True) if old != new)
    lines.append(f"Captions edited: {changed} of {counted(len(records), 'image')}.")
    lines += change_lines(count_captions(before, separator), count_captions(captions, separator))
    if state.num_trigger_tags:
        number = state.num_trigger_tags
        lines.append(f"Trigger words: {counted(number, 'tag')} in front; shuffle with keep_tokens {number}.")
    return Edited(dataset.replaced(records, *lines), tuple(lines))


def read_operations(text: str, *, where: str = "operations") -> list[Operation]:
    """Read one operation per line; '#' starts a comment line. Raises LG-DATA-072 with all faulty lines."""
    if len(text) > MAX_TEXT or text.count("\n") >= MAX_LINES:
        raise _unreadable([f"{where}: more than {MAX_LINES} lines or {MAX_TEXT} characters"])
    found, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, argument = line.partition(":")
        name = " ".join(name.casefold().split())
        operation = Operation(name, argument.strip(), f"{where}, line {number}")
        fault = _fault(operation)
        if fault:
            faults.append(f"{operation.where}: '{shown(line, 80)}' ({fault})")
        else:
            found.append(operation)
    if faults:
        raise _unreadable(faults)
    for operation in found:
        OPERATIONS[operation.name].make(operation)  # refuses unknown groups and broken templates
    return found


def escape_brackets(caption: str) -> str:
    """Return a caption as a prompt: round brackets escaped, which ComfyUI would read as weights."""
    return unescape_brackets(caption).replace("(", "\\(").replace(")", "\\)")


# ---- helpers ----


def _fault(operation: Operation) -> str | None:
    """Say what is wrong with a line, or None."""
    if operation.name == "escape brackets":
        return "training reads brackets as they are; the prompts output has them escaped"
    kind = OPERATIONS.get(operation.name)
    if kind is None:
        guess = nearest(operation.name, OPERATIONS)
        return "no such operation" + (f", did you mean '{guess[0]}'?" if guess else "")
    if kind.argument == NO_ARGUMENT:
        return "nothing may follow it" if operation.argument else None
    if not operation.argument:
        return f"write '{operation.name}: {kind.argument}'"
    if kind.argument.endswith(("-> tags", "-> text")) and not sides(operation)[0]:
        return f"write '{operation.name}: {kind.argument}'"
    if ARROW in kind.argument and ARROW not in operation.argument:
        return f"'{ARROW}' is missing: '{operation.name}: {kind.argument}'"
    if operation.name == "merge" and ARROW in operation.argument and not all(sides(operation)):
        return "both sides of '->' need tags"
    if operation.name == "merge" and operation.argument.count(",") >= MAX_NOUNS:
        return f"at most {MAX_NOUNS} tags"
    if "|" in kind.argument and operation.argument not in kind.argument.split("|"):
        return f"write {' or '.join(kind.argument.split('|'))} behind the colon"
    if operation.name == "word" and not _is_word(operation.argument):
        return "write 'word: pt1 = text', the name in letters, digits and '_'"
    return None


def _is_word(argument: str) -> bool:
    name, equals, _ = argument.partition("=")
    return bool(equals) and name.strip().replace("_", "a").isalnum()


def _effect_lines(operation: Operation, old: list[list[str]], items: list[Item], state: State) -> list[str]:
    changed = sum(1 for was, item in zip(old, items, strict=True) if was != item.tags)
    lines = []
    if changed:
        lines.append(f"{shown(operation.text)}: {counted(changed, 'caption')} changed.")
    elif operation.name not in ("word", "protect"):
        lines.append(f"{shown(operation.text)}: changed nothing.")
    spared = [f"{shown(tag)} ({count})" for tag, count in state.spared.most_common() if count]
    if spared:
        lines.append(f"  Protected, only its full name deletes it: {listed(spared)}.")
    return lines


def _check_filled(items: Sequence[Item], captions: Sequence[str]) -> None:
    empty = [item.record.name for item, caption in zip(items, captions, strict=True) if not caption.strip()]
    if empty:
        raise LoraGraftError(
            "LG-DATA-073",
            f"The operations leave {counted(len(empty), 'caption')} empty.",
            where=listed(shown(name) for name in empty),
            why="an empty caption teaches the image without words, which is rarely meant.",
            fix="add a line 'trigger: your word' or 'default: some words', or delete less",
        )


def _unreadable(faults: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-072",
        f"{counted(len(faults), 'line')} of the caption operations cannot be read.",
        where=listed(faults),
        why="the captions would be edited in another way than you asked for.",
        fix=f"one operation per line: {'; '.join(OPERATIONS)}",
    )


def _setting(name: str, value: object, expected: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 40)}, expected {expected}.",
        where=name,
        why="the captions would be edited in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )
