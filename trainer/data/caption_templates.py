"""Captions out of templates: ``a photo of {pt1}, {caption}``, as HCP-Diffusion writes them.

Only the names in braces are replaced, once: what they stand for is never read as a template again.
``{{`` and ``}}`` are single braces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import LoraGraftError, listed, nearest

MAX_TEMPLATE = 10_000
MAX_CAPTION = 50_000


def placeholders(template: str, *, where: str = "template") -> list[str]:
    """Return the names in braces, in order; raises LG-DATA-071 for braces that do not pair up."""
    return [text for is_name, text in _parts(template, where) if is_name]


def check_template(template: str, known: Iterable[str], *, where: str = "template") -> None:
    """Raise LG-DATA-071 for names that ``known`` does not hold; all of them at once."""
    known = list(known)
    unknown = [name for name in dict.fromkeys(placeholders(template, where=where)) if name not in known]
    if unknown:
        guesses = {guess: None for name in unknown for guess in nearest(name, known)}
        raise LoraGraftError(
            "LG-DATA-071",
            f"The template names {listed('{' + name + '}' for name in unknown)}, which stands for nothing.",
            where=f"{where}: {template}",
            why="the caption would have a hole, or the braces would be trained as words.",
            fix=f"use {listed('{' + name + '}' for name in known)}"
            + (f"; nearest: {', '.join('{' + name + '}' for name in guesses)}" if guesses else "")
            + "; write {{ for a brace",
        )


def fill_template(template: str, words: Mapping[str, str], *, where: str = "template") -> str:
    """Return the template with its names replaced by ``words``.

    Where a word is empty, the commas around the hole close up. Raises LG-DATA-071.
    """
    check_template(template, words, where=where)
    parts = _parts(template, where)
    length = sum(len(words[text]) if is_name else len(text) for is_name, text in parts)
    if length > MAX_CAPTION:
        raise _broken(where, f"a caption would have {length} characters; {MAX_CAPTION} are possible.")
    text = "".join(words[text] if is_name else text for is_name, text in parts)
    if all(words[name].strip() for is_name, name in parts if is_name):
        return " ".join(text.split())
    return ", ".join(part for item in text.split(",") if (part := " ".join(item.split())))


def _parts(template: str, where: str) -> list[tuple[bool, str]]:
    """Split into (is a name, text)."""
    if len(template) > MAX_TEMPLATE:
        raise _broken(where, f"it has {len(template)} characters; {MAX_TEMPLATE} are possible.")
    parts: list[tuple[bool, str]] = []
    literal, at = "", 0
    while at < len(template):
        char = template[at]
        if template[at : at + 2] in ("{{", "}}"):
            literal, at = literal + char, at + 2
        elif char == "{":
            end = template.find("}", at)
            if end < 0 or "{" in template[at + 1 : end]:
                raise _broken(where, f"the brace at character {at + 1} is not closed.")
            parts += [(False, literal), (True, template[at + 1 : end].strip())]
            literal, at = "", end + 1
        elif char == "}":
            raise _broken(where, f"the closing brace at character {at + 1} has no opening one.")
        else:
            literal, at = literal + char, at + 1
    return [*parts, (False, literal)]


def _broken(where: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-071",
        "The template cannot be read.",
        where=where,
        why=why,
        fix="write names as {caption}, and {{ or }} for a single brace",
    )
