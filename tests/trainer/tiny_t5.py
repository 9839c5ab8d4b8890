"""A tiny random T5 encoder and a T5 tokenizer that knows single characters only."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 2, 2
SPACE = "\u2581"
SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = (*SPECIAL, SPACE, *(chr(c) for c in range(33, 127)))
VOCABULARY = 112  # more rows than tokens, as T5's own embeddings have


def write_t5_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of transformers' T5TokenizerFast; a character is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, token in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                end,
                {"Sequence": {"id": "B", "type_id": 0}},
                end,
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [[piece, -float(i)] for i, piece in enumerate(PIECES)],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    config = {**special, "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_t5(seed: int = 0) -> torch.nn.Module:
    """Build a random encoder of transformers' class."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model: torch.nn.Module = T5EncoderModel(config).eval()
    return model


def t5_file_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return an encoder's weights under the names that its files have, one name a tensor."""
    weights = model.state_dict()
    return {k: v.detach().clone() for k, v in weights.items() if k != "encoder.embed_tokens.weight"}
