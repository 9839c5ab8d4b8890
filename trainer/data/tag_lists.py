"""Lists of tags as users write them: ``hat, *hair, [eyes]``; how tags are spelled and compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LoraGraftError, listed, nearest
from .caption_groups import GROUPS, PROTECTED, UNIONS
from .images import shown

MAX_NAMES = 10_000
MAX_PATTERNS = 500
MAX_PATTERN_LENGTH = 200

# Tags that are drawn with their characters; an underscore in them is no space.
KAOMOJIS = frozenset(
    [
        *("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o"),
        *("@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"),
    ]
)


def spaced(tag: str) -> str:
    """Write a booru tag with spaces; kaomojis keep their underscores."""
    return tag if tag in KAOMOJIS else tag.replace("_", " ")


def underscored(tag: str) -> str:
    """Write a tag as boorus do, with underscores for spaces."""
    return tag.replace(" ", "_")


def plain(tag: str) -> str:
    """Return the form in which tags are compared: lower case, single spaces, unescaped brackets."""
    text = " ".join(tag.replace("\\(", "(").replace("\\)", ")").split()).casefold()
    return " ".join(spaced(text).split())


def matches(pattern: str, text: str) -> bool:
    """Say whether ``text`` is ``pattern`` with each ``*`` standing for any characters, also none.

    Takes at most len(pattern) x len(text) steps, whatever the pattern.
    """
    at = in_text = 0
    star = -1
    resume = 0
    while in_text < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, in_text
            at += 1
        elif at < len(pattern) and pattern[at] == text[in_text]:
            at, in_text = at + 1, in_text + 1
        elif star >= 0:
            resume += 1
            at, in_text = star + 1, resume
        else:
            return False
    return all(char == "*" for char in pattern[at:])


_EXACT: dict[str, tuple[str, ...]] = {}
_PATTERNS: list[tuple[str, str]] = []
for _name, _items in GROUPS.items():
    for _item in _items:
        if "*" in _item:
            _PATTERNS.append((_name, _item))
        else:
            _EXACT[plain(_item)] = (*_EXACT.get(plain(_item), ()), _name)


@functools.lru_cache(maxsize=2**16)
def groups_of(tag: str) -> tuple[str, ...]:
    """Return the names of all groups that a tag belongs to."""
    text = plain(tag)
    found = [*_EXACT.get(text, ()), *(name for name, pattern in _PATTERNS if matches(pattern, text))]
    return tuple(dict.fromkeys(found))


def is_protected(tag: str) -> bool:
    """Say whether only its full name may delete a tag."""
    return any(name in PROTECTED for name in groups_of(tag))


@dataclass(frozen=True)
class TagList:
    """What a list of tags names: full names, patterns with ``*``, and groups; all in `plain` form."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns or self.groups)

    def names_exactly(self, tag: str) -> bool:
        """Say whether the list holds the tag's full name."""
        return plain(tag) in self._names

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names)

    def covers(self, tag: str) -> bool:
        """Say whether a pattern or a group of the list covers the tag."""
        if self.patterns and _matches_any(self.patterns, plain(tag)):
            return True
        return bool(self.groups) and any(group in self.groups for group in groups_of(tag))

    def takes(self, tag: str) -> bool:
        """Say whether deleting this list deletes the tag: by its full name, or if it is not protected."""
        return self.names_exactly(tag) or (self.covers(tag) and not is_protected(tag))


@functools.lru_cache(maxsize=2**16)
def _matches_any(patterns: tuple[str, ...], text: str) -> bool:
    return any(matches(pattern, text) for pattern in patterns)


def read_tag_list(text: str, *, where: str = "tags") -> TagList:
    """Read ``hat, *hair, [eyes]``: names, patterns and groups, separated by commas or line ends.

    Raises LG-DATA-070 for groups that do not exist, and for lists that are too long.
    """
    parts = text.replace("\n", ",").split(",")
    names: list[str] = []
    patterns: list[str] = []
    groups: list[str] = []
    unknown: list[str] = []
    for part in (part.strip() for part in parts):
        if part.startswith("[") and part.endswith("]") and len(part) > 2:
            name = part[1:-1].strip().casefold()
            if name in UNIONS:
                groups += UNIONS[name]
            elif name in GROUPS:
                groups.append(name)
            else:
                unknown.append(name)
        elif "*" in part:
            patterns.append(plain(part))
        elif part:
            names.append(plain(part))
    if unknown:
        raise _unknown_groups(unknown, where)
    longest = max((len(pattern) for pattern in patterns), default=0)
    if len(names) > MAX_NAMES or len(patterns) > MAX_PATTERNS or longest > MAX_PATTERN_LENGTH:
        raise LoraGraftError(
            "LG-DATA-070",
            "A list of tags is too long.",
            where=where,
            why=f"{len(names)} names and {len(patterns)} wildcards, the longest of {longest} characters.",
            fix=f"at most {MAX_NAMES} names and {MAX_PATTERNS} wildcards of {MAX_PATTERN_LENGTH} characters; "
            "use groups such as [hair]",
        )
    return TagList(tuple(names), tuple(patterns), tuple(dict.fromkeys(groups)))


def _unknown_groups(names: Sequence[str], where: str) -> LoraGraftError:
    """Return the refusal of group names that do not exist."""
    known = [*GROUPS, *UNIONS]
    guesses = {guess: None for name in names[:20] for guess in nearest(name, known)}
    return LoraGraftError(
        "LG-DATA-070",
        f"There is no group of tags called {listed((repr(shown(name, 30)) for name in names), limit=3)}.",
        where=where,
        why="a name in square brackets stands for a kind of tag.",
        fix=f"write one of: {', '.join(f'[{name}]' for name in known)}"
        + (f"; nearest: {', '.join(f'[{name}]' for name in guesses)}" if guesses else ""),
    )
