"""Whether a trigger word is one that the base model has met already, as far as lists can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .tag_lists import plain


def known_word(
    tags: Iterable[str] = (), num_tokens: Callable[[str], int] | None = None
) -> Callable[[str], str | None]:
    """Return a function that says why a word is known, or None.

    ``tags`` are those of a tagger (and so of the pictures that anime models were trained on);
    ``num_tokens`` counts as the base's tokenizer does: a word of its own vocabulary is one token.
    """
    listed = {plain(tag) for tag in tags}

    def reason(word: str) -> str | None:
        if plain(word) in listed:
            return "it is one of the tagger's tags"
        if num_tokens is not None and word.strip() and num_tokens(word.strip()) == 1:
            return "its tokenizer has it as one word"
        return None

    return reason
