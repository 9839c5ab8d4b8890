"""The operations that edit captions: a table of names, each with the step that it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import LoraGraftError, listed
from .caption_templates import MAX_CAPTION, check_template, fill_template, placeholders
from .captions import tags_of
from .images import shown
from .records import Record
from .report import counted
from .tag_lists import TagList, is_protected, plain, read_tag_list, spaced, underscored

ARROW = "->"
NO_ARGUMENT = ""


@dataclass
class Item:
    """One caption while it is edited."""

    record: Record
    tags: list[str]


@dataclass
class State:
    """What operations hand to later ones."""

    separator: str
    trigger: str
    words: dict[str, str] = field(default_factory=dict)
    protected: list[TagList] = field(default_factory=list)
    spared: Counter[str] = field(default_factory=Counter)
    num_trigger_tags: int = 0

    def joined(self, tags: Iterable[str]) -> str:
        """Return tags as one caption."""
        return f"{self.separator} ".join(tags)

    def words_of(self, item: Item) -> dict[str, str]:
        """Return what the names in a template stand for."""
        caption = self.joined(item.tags)
        return {
            "caption": caption,
            "tags": caption,
            "trigger": self.trigger.strip() or item.record.concept,
            "class": item.record.concept,
            **self.words,
        }


Step = Callable[[list[Item], State], None]


@dataclass(frozen=True)
class Operation:
    """One line: what it is called, what follows the colon, and where it stands."""

    name: str
    argument: str
    where: str

    @property
    def text(self) -> str:
        """Return the line as written."""
        return f"{self.name}: {self.argument}" if self.argument else self.name


def unescape_brackets(caption: str) -> str:
    """Return a caption without backslashes before round brackets, as training reads them."""
    return caption.replace("\\(", "(").replace("\\)", ")")


def sides(operation: Operation) -> tuple[str, str]:
    """Return what stands left and right of the arrow."""
    old, _, new = operation.argument.partition(ARROW)
    return old.strip(), new.strip()


# ---- the operations ----


def _trigger(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        _check_words(operation, state)
        texts = [fill_template(operation.argument, state.words_of(item)) for item in items]
        _check_triggers(items, texts, operation)
        for item, text in zip(items, texts, strict=True):
            front = tags_of(text, state.separator)
            names = {plain(tag) for tag in front}
            item.tags = front + [tag for tag in item.tags if plain(tag) not in names]
            state.num_trigger_tags = max(state.num_trigger_tags, len(front))

    return step


def _remove_trigger(operation: Operation) -> Step:
    return lambda items, state: _drop(items, read_tag_list(operation.argument).names_exactly)


def _prefix(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        tags = tags_of(operation.argument, state.separator)
        for item in items:
            item.tags = tags + item.tags

    return step


def _suffix(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        tags = tags_of(operation.argument, state.separator)
        for item in items:
            item.tags = item.tags + tags

    return step


def _protect(operation: Operation) -> Step:
    tags = read_tag_list(operation.argument, where=operation.where)
    return lambda items, state: state.protected.append(tags)


def _delete(operation: Operation) -> Step:
    tags = read_tag_list(operation.argument, where=operation.where)

    def step(items: list[Item], state: State) -> None:
        def goes(tag: str) -> bool:
            if tags.names_exactly(tag):
                return True
            if not tags.covers(tag):
                return False
            spared = is_protected(tag) or any(
                kept.names_exactly(tag) or kept.covers(tag) for kept in state.protected
            )
            state.spared[tag] += spared
            return not spared

        _drop(items, goes)

    return step


def _keep_only(operation: Operation) -> Step:
    tags = read_tag_list(operation.argument, where=operation.where)
    return lambda items, state: _drop(items, lambda tag: not (tags.names_exactly(tag) or tags.covers(tag)))


def _replace(operation: Operation) -> Step:
    old, new = sides(operation)
    tags = read_tag_list(old, where=operation.where)

    def step(items: list[Item], state: State) -> None:
        replacement = tags_of(new, state.separator)
        for item in items:
            out: list[str] = []
            for tag in item.tags:
                hit = tags.names_exactly(tag) or tags.covers(tag)
                out += [n for n in replacement if n not in out] if hit else [tag]
            item.tags = out

    return step


def _replace_text(operation: Operation) -> Step:
    old, new = sides(operation)

    def step(items: list[Item], state: State) -> None:
        for item in items:
            text = state.joined(item.tags)
            _check_length(item, operation, len(text) + text.count(old) * len(new))
            item.tags = tags_of(text.replace(old, new), state.separator)

    return step


def _merge(operation: Operation) -> Step:
    if ARROW in operation.argument:
        return _merge_named(operation)
    nouns = [plain(noun) for noun in operation.argument.split(",") if noun.strip()]

    def step(items: list[Item], state: State) -> None:
        for item in items:
            for noun in nouns:
                item.tags = _merged(item.tags, noun)

    return step


def _merge_named(operation: Operation) -> Step:
    old, new = sides(operation)
    names = list(dict.fromkeys(plain(tag) for tag in old.split(",") if tag.strip()))

    def step(items: list[Item], state: State) -> None:
        for item in items:
            places = [i for i, tag in enumerate(item.tags) if plain(tag) in names]
            if {plain(item.tags[i]) for i in places} == set(names):
                rest = [tag for i, tag in enumerate(item.tags) if i not in places]
                item.tags = [*rest[: places[0]], new, *rest[places[0] :]]

    return step


def _merged(tags: list[str], noun: str) -> list[str]:
    """Join "white shirt" and "collared shirt" into "white collared shirt"; a bare "shirt" goes with them."""
    places = [i for i, tag in enumerate(tags) if plain(tag) == noun or plain(tag).endswith(f" {noun}")]
    if len(places) < 2:
        return tags
    words = [word for i in places for word in spaced(tags[i]).split()[: -len(noun.split())]]
    phrase = " ".join([*dict.fromkeys(words), noun])
    return [phrase if i == places[0] else tag for i, tag in enumerate(tags) if i not in places[1:]]


def _drop_subtags(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        for item in items:
            forms = [plain(tag) for tag in item.tags]
            longer = [(form, f" {form}") for form in forms]
            item.tags = [
                tag
                for tag, (form, ending) in zip(item.tags, longer, strict=True)
                if not any(other != form and other.endswith(ending) for other in forms)
            ]

    return step


def _deduplicate(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        for item in items:
            first: dict[str, str] = {}
            for tag in item.tags:
                first.setdefault(plain(tag), tag)
            item.tags = list(first.values())

    return step


def _sort(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        counts: Counter[str] = Counter(plain(tag) for item in items for tag in item.tags)
        front = state.num_trigger_tags
        for item in items:
            if operation.argument == "frequency":
                rest = sorted(item.tags[front:], key=lambda tag: (-counts[plain(tag)], plain(tag)))
            else:
                rest = sorted(item.tags[front:], key=plain)
            item.tags = item.tags[:front] + rest

    return step


def _underscores(operation: Operation) -> Step:
    write = {"off": spaced, "on": underscored}[operation.argument]

    def step(items: list[Item], state: State) -> None:
        for item in items:
            item.tags = [write(tag) for tag in item.tags]

    return step


def _unescape(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        for item in items:
            item.tags = [unescape_brackets(tag) for tag in item.tags]

    return step


def _word(operation: Operation) -> Step:
    name, _, value = operation.argument.partition("=")
    return lambda items, state: state.words.update({name.strip(): value.strip()})


def _template(operation: Operation) -> Step:
    placeholders(operation.argument, where=operation.where)

    def step(items: list[Item], state: State) -> None:
        _check_words(operation, state)
        filled = [fill_template(operation.argument, state.words_of(item)) for item in items]
        if "trigger" in placeholders(operation.argument):
            _check_triggers(items, [state.words_of(item)["trigger"] for item in items], operation)
        for item, text in zip(items, filled, strict=True):
            item.tags = tags_of(text, state.separator)

    return step


def _default(operation: Operation) -> Step:
    def step(items: list[Item], state: State) -> None:
        _check_words(operation, state)
        for item in items:
            if not item.tags:
                item.tags = tags_of(fill_template(operation.argument, state.words_of(item)), state.separator)

    return step


@dataclass(frozen=True)
class Kind:
    """An operation's maker, what may follow its colon, and what it does in words."""

    make: Callable[[Operation], Step]
    argument: str
    help: str


OPERATIONS: dict[str, Kind] = {
    "trigger": Kind(_trigger, "words", "put trigger words in front"),
    "remove trigger": Kind(_remove_trigger, "words", "take trigger words out"),
    "prefix": Kind(_prefix, "tags", "put tags in front"),
    "suffix": Kind(_suffix, "tags", "put tags behind"),
    "delete": Kind(_delete, "list", "delete tags: names, wildcards with *, groups such as [hair]"),
    "protect": Kind(_protect, "list", "keep these from wildcards and groups in later lines"),
    "keep only": Kind(_keep_only, "list", "delete all other tags"),
    "replace": Kind(_replace, "list -> tags", "replace whole tags"),
    "replace text": Kind(_replace_text, "text -> text", "replace text inside captions"),
    "merge": Kind(_merge, "nouns", "join 'white shirt', 'collared shirt'; also: a, b -> phrase"),
    "drop subtags": Kind(_drop_subtags, NO_ARGUMENT, "delete 'shirt' beside 'white shirt'"),
    "deduplicate": Kind(_deduplicate, NO_ARGUMENT, "keep the first of equal tags"),
    "sort": Kind(_sort, "name|frequency", "sort tags behind the trigger words"),
    "underscores": Kind(_underscores, "off|on", "write tags with spaces (off) or underscores (on)"),
    "unescape brackets": Kind(_unescape, NO_ARGUMENT, "write ( for \\(, as training reads captions"),
    "word": Kind(_word, "name = text", "give a template's {name} its text"),
    "template": Kind(_template, "text", "rewrite the caption: a photo of {pt1}, {caption}"),
    "default": Kind(_default, "text", "the caption where none is left"),
}


# ---- helpers ----


def check_lengths(items: Iterable[Item], operation: Operation) -> None:
    """Raise LG-DATA-078 for a caption that an operation made too long."""
    for item in items:
        _check_length(item, operation, sum(len(tag) + 2 for tag in item.tags))


def _check_length(item: Item, operation: Operation, length: int) -> None:
    if length > MAX_CAPTION:
        raise LoraGraftError(
            "LG-DATA-078",
            f"A caption would have {length} characters; {MAX_CAPTION} are possible.",
            where=f"{operation.where}; {shown(item.record.name)}",
            why="a text encoder reads some hundred words, and longer texts only fill the memory.",
            fix="check what this operation adds to the caption",
        )


def _drop(items: list[Item], goes: Callable[[str], bool]) -> None:
    for item in items:
        item.tags = [tag for tag in item.tags if not goes(tag)]


def _check_words(operation: Operation, state: State) -> None:
    check_template(
        operation.argument,
        ["caption", "tags", "trigger", "class", *state.words],
        where=operation.where,
    )


def _check_triggers(items: Sequence[Item], texts: Sequence[str], operation: Operation) -> None:
    without = [
        item.record.name for item, text in zip(items, texts, strict=True) if not text.strip(" ,").strip()
    ]
    if without:
        raise LoraGraftError(
            "LG-DATA-074",
            f"{counted(len(without), 'image')} without a trigger word.",
            where=f"{operation.where}; {listed(shown(name) for name in without)}",
            why="neither is a trigger given, nor does the folder's name have class words.",
            fix="fill in trigger, or name the folder like '10_ohwx cat'",
        )
