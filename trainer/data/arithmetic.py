"""Read sums such as ``512*768`` in a config file: whole numbers, + - * // and brackets, nothing else.

A parser of its own, one function for each rule of the grammar; the text is never run.
"""

from __future__ import annotations

import re

from ..errors import LoraGraftError

MAX_LENGTH = 100
MAX_VALUE = 10**12
TOKEN = re.compile(r"\s*([0-9]+|//|[-+*()])")


def compute(text: str, *, where: str) -> int:
    """Return the value of a sum of whole numbers; raises LG-DATA-089 with the place of the first fault."""
    try:
        if len(text) > MAX_LENGTH:
            raise _Fault(f"it is longer than {MAX_LENGTH} characters")
        parser = _Parser(_tokens(text))
        value = parser.sum()
        if parser.rest:
            raise _Fault(f"'{parser.rest[0]}' is left over")
        return value
    except _Fault as fault:
        raise LoraGraftError(
            "LG-DATA-089",
            f"The sum {text[:40]!r} cannot be computed.",
            where=where,
            why=f"{fault}. Known are whole numbers, + - * // and brackets.",
            fix="write the number itself, or for instance 512*768",
        ) from None


class _Fault(ValueError):
    """What is wrong with the text."""


class _Parser:
    """Recursive descent over the tokens.

    sum = product {+|- product}; product = atom {*|// atom}; atom = number | -atom | (sum)
    """

    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens

    def sum(self) -> int:
        value = self.product()
        while (sign := self._take("+", "-")) is not None:
            other = self.product()
            value = _small(value + other if sign == "+" else value - other)
        return value

    def product(self) -> int:
        value = self.atom()
        while (sign := self._take("*", "//")) is not None:
            other = self.atom()
            if sign == "//" and other == 0:
                raise _Fault("it divides by 0")
            value = _small(value * other if sign == "*" else value // other)
        return value

    def atom(self) -> int:
        if self._take("-"):
            return -self.atom()
        if self._take("("):
            value = self.sum()
            if not self._take(")"):
                raise _Fault("a bracket is not closed")
            return value
        if not self.rest:
            raise _Fault("a number is missing at the end")
        token = self.rest.pop(0)
        if not token.isdigit():
            raise _Fault(f"a number is missing before '{token}'")
        return _small(int(token))

    def _take(self, *wanted: str) -> str | None:
        return self.rest.pop(0) if self.rest and self.rest[0] in wanted else None


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.strip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise _Fault(f"{text[at:].strip()[:1]!r} is not known")
        tokens.append(match[1])
        at = match.end()
    return tokens


def _small(value: int) -> int:
    if abs(value) > MAX_VALUE:
        raise _Fault(f"a value is larger than {MAX_VALUE}")
    return value
