"""Write the demo base's vocabulary: every byte, and the words of its captions as single tokens."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from .draw import caption_words
from .models import MAX_TOKENS

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """List the 256 printable characters that byte-level BPE writes bytes as, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [chr(256 + i) for i in range(256 - len(plain))]
    return [*(chr(b) for b in plain), *moved]


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token, the most frequent pair first."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split):
        counts = Counter(pair for pieces in split for pair in pairwise(pieces))
        pair = counts.most_common(1)[0][0]
        merges.append(pair)
        split = [_merge(pieces, pair) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the two configs, and load the tokenizer from them."""
    words = caption_words()
    merges = merges_of(words)
    symbols = byte_symbols()
    tokens = [*symbols, *(s + WORD_END for s in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", "utf-8")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer from its folder."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer
