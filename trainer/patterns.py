"""Settings of the form pattern=number for single modules, with patterns that cannot take for ever.

Workflows are untrusted, and some regular expressions need exponential time. So a group cannot be repeated,
nothing looks around or back, at most three parts repeat without bound, and at most eight places are a choice
of two; there are at most a hundred patterns, and names of modules are short.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST, MOST = 200, 100
REPEATS, CHOICES = 3, 8
_GROUP_REPEATED = re.compile(r"\)\s*[*+{]")
_UNBOUNDED = re.compile(r"(?<!\\)(?:\\\\)*(?:[*+]|\{\d*,\d*\}|\{\d{2,}\})")
_AROUND = re.compile(r"^\^?\.\*(?![?+])|(?<!\\)\.\*\$?$")
# "x?", and "|" wherever it stands: each doubles the ways to try a name. Not "(?:" and "*?".
_CHOICE = re.compile(r"(?<![\\(*+?}])\?|\|")
_BEGINNING = re.compile(r"\^\(\?:[\w|]+\)")  # bound to the name's start, it is tried once


@dataclass(frozen=True)
class Rule:
    """A pattern as it is written, and the number for the modules in whose name it is found."""

    text: str
    pattern: re.Pattern[str]
    value: float

    def fits(self, *names: str) -> bool:
        """Say whether the pattern is found in one of a module's names."""
        return any(self.pattern.search(name) is not None for name in names)


def rules(items: Iterable[str]) -> list[Rule]:
    """Read entries pattern=number; HCP's mark "re:" may stand before. Raises ValueError with the reason."""
    found = [_rule(item) for item in items]
    if len(found) > MOST:
        raise ValueError(f"{len(found)} patterns are more than {MOST}")
    return found


def patterns(items: Iterable[str]) -> list[Rule]:
    """Read patterns without a number; raises ValueError with the reason."""
    return rules(f"{item}=1" for item in items)


def first(found: Iterable[Rule], *names: str) -> Rule | None:
    """Return the first rule that fits a module, by any of its names."""
    return next((rule for rule in found if rule.fits(*names)), None)


def _rule(item: str) -> Rule:
    text, equals, number = item.rpartition("=")
    text = text.strip().removeprefix("re:")
    if not equals or not text:
        raise ValueError(f"'{item[:60]}' is not of the form pattern=number")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"'{number[:30]}' after the pattern is no number")
    # What surrounds a pattern that is only looked for changes nothing but the time.
    inner = _AROUND.sub("", text)
    if len(inner) > LONGEST:
        raise ValueError(f"the pattern is longer than {LONGEST} characters")
    if _GROUP_REPEATED.search(inner) or re.search(r"\(\?[^:]|\\[1-9]", inner):
        raise ValueError(f"'{text[:60]}' repeats a group or looks around, which can take for ever")
    if len(_UNBOUNDED.findall(inner)) > REPEATS:
        raise ValueError(f"'{text[:60]}' has more than {REPEATS} repeated parts, which can take for ever")
    if len(_CHOICE.findall(_BEGINNING.sub("", inner))) > CHOICES:
        raise ValueError(f"'{text[:60]}' has more than {CHOICES} of ? and |, which can take for ever")
    try:
        return Rule(text, re.compile(inner), value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{text[:60]}' is no regular expression ({error})") from None
