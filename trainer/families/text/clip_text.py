"""CLIP's text model (Radford et al. 2021): its shape, captions in chunks of 75 tokens, and their encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ...errors import LoraGraftError
from ..base import Reading, Room, Tensors, Texts
from ..modules.building import assign, built, check_tokenizer, count
from .clip_tokens import CHUNK, caption_ids, in_chunks, weighted_ids

HEAD_DIM = 64
LONGEST = 225  # the greatest max_token_length
PROJECTION = "text_projection.weight"  # of the pooled state
Words = Mapping[str, Sequence[int]]


def text_config(sd: Tensors, *, activation: str = "quick_gelu") -> dict[str, Any]:
    """Read a CLIP text model's shape from its weights."""
    vocabulary, hidden = sd["text_model.embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": sd["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(sd, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, hidden // HEAD_DIM),
        "max_position_embeddings": sd["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def load_clip_text(sd: Tensors, tokenizer: Any, family: str, *, activation: str = "quick_gelu") -> nn.Module:
    """Build a CLIP text model on its weights, shared, with its projection where the weights have one.

    Raises LG-BASE-003, -006.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def build() -> nn.Module:
        config = text_config(sd, activation=activation)
        if PROJECTION not in sd:
            return cast(nn.Module, CLIPTextModel(CLIPTextConfig(**config)))
        config["projection_dim"] = sd[PROJECTION].shape[0]
        return cast(nn.Module, CLIPTextModelWithProjection(CLIPTextConfig(**config)))

    text = built("text encoder", family, build)
    if not hasattr(text, "text_model"):  # transformers 5 dropped the inner module and its prefix
        sd = {k.removeprefix("text_model."): sd[k] for k in sd}
    assign(text, sd, "text encoder", family)
    number_positions(text)
    check_tokenizer(tokenizer, text_body(text).embeddings.token_embedding.weight.shape[0])
    return text


def number_positions(text: nn.Module) -> None:
    """Make the buffer of positions, which no file needs to hold."""
    embeddings = text_body(text).embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0]).expand((1, -1))


def text_body(text: nn.Module) -> Any:
    """Return the module that holds embeddings, encoder and final_layer_norm (transformers 4 and 5)."""
    return getattr(text, "text_model", text)


def text_width(text: nn.Module) -> int:
    """Return the width of a text model's hidden states."""
    width: int = text_body(text).embeddings.position_embedding.weight.shape[1]
    return width


def clip_tokens(
    tokenizer: Any, captions: Sequence[str], reading: Reading, words: Words, *, pad: int | None = None
) -> Texts:
    """Return token ids (B, chunks, 77), and with emphasis the weights (B, chunks*75+2) of their places.

    75 tokens lie between a start and an end token, as kohya cuts them; ``pad`` as in `in_chunks`. Start, end
    and padding weigh 1.
    """
    length = reading.max_token_length
    if not reading.weighted:
        ids = [caption_ids(tokenizer, caption, words) for caption in captions]
        return (torch.stack([in_chunks(tokenizer, each, length, pad) for each in ids]),)
    read = [weighted_ids(tokenizer, caption, words) for caption in captions]
    cut = [weights[:length] for _, weights in read]
    padded = [[1.0, *weights, *[1.0] * (length + 1 - len(weights))] for weights in cut]
    return torch.stack([in_chunks(tokenizer, ids, length, pad) for ids, _ in read]), torch.tensor(padded)


def clip_room(tokenizer: Any, captions: Sequence[str], reading: Reading, words: Words) -> Room:
    """Return how many tokens captions have without marks, and that chunks of 75 are read."""
    weighted = reading.weighted
    counts = [
        len(weighted_ids(tokenizer, c, words)[0] if weighted else caption_ids(tokenizer, c, words))
        for c in captions
    ]
    return Room(counts, reading.max_token_length, LONGEST, "max_token_length", CHUNK)


def long_enough(tokenizer: Any, captions: Sequence[str], reading: Reading, words: Words) -> Reading:
    """Return the reading with as many chunks as the longest caption needs."""
    room = clip_room(tokenizer, captions, reading, words)
    return replace(reading, max_token_length=room.up(max(1, *room.lengths)))


def hidden_states(text: nn.Module, ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
    """Return (B * chunks, 77, D) of the ``clip_skip``-th last layer, normalised, for ids (B, chunks, 77)."""
    check_layers(text, clip_skip)
    out = text(ids.flatten(0, 1), output_hidden_states=clip_skip > 1)
    if clip_skip == 1:
        return cast(torch.Tensor, out.last_hidden_state)
    return cast(torch.Tensor, text_body(text).final_layer_norm(out.hidden_states[-clip_skip]))


def check_layers(text: nn.Module, clip_skip: int) -> None:
    """Raise LG-CFG-008 where the encoder has fewer layers than ``clip_skip``."""
    layers = len(text_body(text).encoder.layers)
    if clip_skip > layers:
        raise LoraGraftError(
            "LG-CFG-008",
            f"clip_skip is {clip_skip}, but the text encoder has {layers} layers.",
            where="clip_skip",
            why="there is no such layer to take the conditioning from.",
            fix=f"set clip_skip to 1 or 2, at most {layers}",
        )


def chunks_joined(hidden: torch.Tensor, chunks: int) -> torch.Tensor:
    """Return (B, chunks*75+2, D) for (B * chunks, 77, D): one start, all chunks' insides, one end token."""
    if chunks == 1:
        return hidden
    hidden = hidden.unflatten(0, (-1, chunks))
    inside = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], inside, hidden[:, -1, -1:]], dim=1)
