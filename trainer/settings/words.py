"""Words whose embeddings are trained, as `train_embeddings` spells them: word=text to begin from*vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import one_line

MAX_VECTORS = 75
ENTRY = re.compile(r"(?P<word>[^=*]+)(=(?P<init>.*?))?(\*(?P<vectors>\d{1,9}))?")
WORD = re.compile(r"\w[\w-]{0,63}")


@dataclass(frozen=True)
class Word:
    """A placeholder in captions, lower case; ``vectors`` None: as many as ``init`` has tokens, or 1."""

    word: str
    init: str = ""
    vectors: int | None = None


def parse_words(entries: Sequence[str]) -> list[Word]:
    """Read the entries; raises ValueError, in words for the user, for one that cannot be."""
    words: list[Word] = []
    for entry in entries:
        shown = one_line(entry, 60)
        found = ENTRY.fullmatch(entry.strip())
        if found is None or WORD.fullmatch(found["word"].strip()) is None:
            raise ValueError(f"'{shown}' does not begin with a word of letters, digits, _ and -")
        if found["init"] is not None and not found["init"].strip():
            raise ValueError(f"'{shown}' has nothing behind '='")
        vectors = None if found["vectors"] is None else int(found["vectors"])
        if vectors is not None and not 1 <= vectors <= MAX_VECTORS:
            raise ValueError(f"'{shown}' asks for {vectors} vectors; 1 to {MAX_VECTORS} are possible")
        word = found["word"].strip().lower()
        if word in [other.word for other in words]:
            raise ValueError(f"'{one_line(word, 60)}' is named twice")
        words.append(Word(word, (found["init"] or "").strip(), vectors))
    return words
