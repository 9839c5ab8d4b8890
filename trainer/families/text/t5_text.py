"""T5's encoder as a text encoder (Raffel et al. 2020, version 1.1 with gated GELU), with transformers' class.

Captions become a fixed number of tokens: the text's, an end, and padding. Whether padded places can be
seen is the family's affair, so their mask comes along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import LoraGraftError
from ..base import Room, Tensors
from ..modules.building import assign, built, count
from ..names.pieces import Pieced

SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"  # two names of one tensor
UNUSED = ("decoder.", "lm_head.")  # in files of the whole T5
LONGEST = 2048  # the greatest t5xxl_max_token_length; T5 knows no limit of its own
RANGE = 256.0  # by which T5-XXL's feed-forward layers exceed fp16, with room to spare


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), under transformers' names, right in fp16 too.

    In T5-XXL it reaches values beyond fp16's largest, 65504, and pictures lose the prompt. Here wo sees
    its input divided by a power of two, which changes no digit of numbers of normal size, and the result
    is float32. So are then the residuals of all layers behind it; each normalises into fp16 again.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, L, width) -> the same shape, float32 for fp16."""
        gated = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if gated.dtype != torch.float16:
            return cast(torch.Tensor, self.wo(gated))
        return cast(torch.Tensor, self.wo(gated / RANGE).float() * RANGE)


TARGETS = ("T5Attention", "GatedFeedForward")  # the classes whose layers are trained


def t5_weights(sd: Tensors) -> Tensors:
    """Return an encoder's weights under one name each, whatever else the file of a T5 holds."""
    names = {name: name for name in sd if name not in (SHARED, EMBEDDING) and not name.startswith(UNUSED)}
    embedding = next((name for name in (SHARED, EMBEDDING) if name in sd), None)
    return Pieced(sd, names if embedding is None else {SHARED: embedding, **names})


def t5_config(sd: Tensors) -> dict[str, Any]:
    """Read the encoder's shape from its weights; KeyError where they are not those of a version 1.1."""
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = sd[first + "relative_attention_bias.weight"].shape
    vocabulary, width = sd[SHARED].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": sd[first + "q.weight"].shape[0] // heads,
        "d_ff": sd["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": count(sd, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
    }


def load_t5(sd: Tensors, family: str, *, what: str = "T5 text encoder") -> nn.Module:
    """Build the encoder on its weights, shared, not copied."""
    from transformers import T5Config, T5EncoderModel

    def build() -> nn.Module:
        config = t5_config(sd)
        model: Any = T5EncoderModel(T5Config(**config))
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense = GatedFeedForward(config["d_model"], config["d_ff"])
        return cast(nn.Module, model)

    weights = t5_weights(sd)
    model = built(what, family, build)
    cast(Any, model).encoder.embed_tokens = cast(Any, model).shared
    assign(model, Pieced(weights, {**{name: name for name in weights}, EMBEDDING: SHARED}), what, family)
    return model.train(False)


MOST_FILLED = 128  # embeddings beyond the vocabulary, which fill them up to a round number


def check_t5_tokenizer(tokenizer: Any, encoder: nn.Module) -> None:
    """Raise LG-BASE-006 for a tokenizer with more entries than the encoder has embeddings, or far fewer."""
    rows = cast(Any, encoder).shared.num_embeddings
    if not len(tokenizer) <= rows <= len(tokenizer) + MOST_FILLED:
        raise LoraGraftError(
            "LG-BASE-006",
            f"The T5 tokenizer has {len(tokenizer)} entries, the text encoder {rows}.",
            where="tokenizer",
            why="captions would be read as other words than the base model learnt.",
            fix="name the tokenizer folder that belongs to this base model",
        )


def t5_tokens(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, length), cut or padded behind an end token, and their mask, 0 for padding."""
    read = tokenizer(
        list(captions), max_length=length, padding="max_length", truncation=True, return_tensors="pt"
    )
    return read["input_ids"], read["attention_mask"]


def t5_room(
    tokenizer: Any, captions: Sequence[str], limit: int, *, most: int = LONGEST, padding: int | None = None
) -> Room:
    """Return how many tokens captions have with their ends, and that ``limit`` are read; see `Room`."""
    lengths = [len(tokenizer(caption, verbose=False)["input_ids"]) for caption in captions]
    return Room(lengths, limit, most, padding=padding)


def t5_longest(tokenizer: Any, captions: Sequence[str]) -> int:
    """Return how many tokens the longest of these captions has, with its end."""
    return max(t5_room(tokenizer, captions, LONGEST).lengths)


def encode_t5(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the last layer's states (B, L, D) for token ids (B, L).

    Where ``mask`` (B, L) is 0, a place is hidden from the others; without one padding is seen, as by the
    models that were trained so.
    """
    states: torch.Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states
