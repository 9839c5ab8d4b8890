"""Gemma 2 (Gemma Team 2024) as a text encoder: the states of its last layer but one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ...errors import LoraGraftError
from ..base import Tensors
from ..modules.building import assign, built, count
from ..sources.versions import newer
from ..sources.weights import Renamed

HEAD_DIM = 256  # of Gemma 2 2B
PREFIX = "model."  # of files of the whole model
UNUSED = ("lm_head.", "spiece_model")


def gemma_weights(sd: Tensors) -> Tensors:
    """Return the language model's weights under the names of transformers' plain model (views)."""
    return Renamed(sd, {name.removeprefix(PREFIX): name for name in sd if not name.startswith(UNUSED)})


def gemma_config(sd: Tensors) -> dict[str, Any]:
    """Read the model's shape from its weights; KeyError where they are not those of a Gemma 2."""
    vocabulary, hidden = sd["embed_tokens.weight"].shape
    layer = "layers.0.self_attn."
    sd["layers.0.pre_feedforward_layernorm.weight"]  # what Gemma 1 lacks
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": sd["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count(sd, r"layers\.(\d+)\."),
        "num_attention_heads": sd[f"{layer}q_proj.weight"].shape[0] // HEAD_DIM,
        "num_key_value_heads": sd[f"{layer}k_proj.weight"].shape[0] // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "attn_implementation": "eager",  # the one that caps its logits, in all releases of transformers
    }


def load_gemma(sd: Tensors, tokenizer: Any, family: str) -> nn.Module:
    """Build the model on its weights, shared; raises LG-BASE-003, -006, and -010 for an old transformers."""
    config_class = newer("transformers", "Gemma2Config", family=family, since="4.50.3")
    model_class = newer("transformers", "Gemma2Model", family=family, since="4.50.3")

    def build() -> nn.Module:
        return cast(nn.Module, model_class(config_class(**gemma_config(sd))))

    model: Any = built("text encoder", family, build)
    assign(model, sd, "text encoder", family)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # its buffers lie in no file
    _give_scale(model)
    rows = model.embed_tokens.num_embeddings
    if len(tokenizer) > rows:
        raise LoraGraftError(
            "LG-BASE-006",
            f"The tokenizer has {len(tokenizer)} entries, the text encoder {rows}.",
            where="tokenizer",
            why="captions would be read as other words than the base model learnt.",
            fix="name the tokenizer folder that belongs to this base model",
        )
    return cast(nn.Module, model.train(False))


def _give_scale(model: Any) -> None:
    """Make the factor on the embeddings, which newer releases of transformers keep in a buffer."""
    if hasattr(model.embed_tokens, "embed_scale"):
        model.embed_tokens.embed_scale = torch.tensor(model.config.hidden_size**0.5)


def gemma_tokens(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, length), cut and padded behind, and 1 where one is no padding, int64."""
    rows = [tokenizer(caption, verbose=False)["input_ids"][:length] for caption in captions]
    padded = [[*row, *[tokenizer.pad_token_id] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)


def gemma_lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Return how many tokens each of these captions has, with its start."""
    return [len(tokenizer(caption, verbose=False)["input_ids"]) for caption in captions]


def encode_gemma(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the states (B, L, D) of the last layer but one for token ids (B, L)."""
    out: Any = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    states: torch.Tensor = out.hidden_states[-2]
    return states
