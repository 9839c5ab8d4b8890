"""Names of Lumina 2's weights in diffusers' folders; its single files have the modules' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..base import Tensors
from .pieces import Pieced, Recipe, stacked

OUTSIDE: Mapping[str, str] = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
INSIDE: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "attention_norm1": ("norm1.norm",),
    "attention_norm2": ("norm2",),
    "ffn_norm1": ("ffn_norm1",),
    "ffn_norm2": ("ffn_norm2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.(\d+)\.")
UNMODULATED = ("context_refiner.", "attention_norm1", "norm1")  # blocks whose first norm is just a norm


def lumina2_from_diffusers(folder: Tensors) -> Tensors:
    """Bring diffusers' transformer to the modules' names: query, key and value become one (copies).

    A name that is no part of any recipe stays as it is, and is refused when the module takes the weights.
    """
    layers: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in OUTSIDE.items()}
    for block in sorted({m[0] for name in folder if (m := BLOCK.match(name))}):
        for ours, theirs in INSIDE.items():
            if block.startswith(UNMODULATED[0]) and ours == UNMODULATED[1]:
                theirs = (UNMODULATED[2],)
            layers[block + ours] = tuple(block + name for name in theirs)
    recipes: dict[str, Recipe] = {}
    for ours, theirs in layers.items():
        for ending in (".weight", ".bias"):
            if theirs[0] + ending in folder:
                recipes[ours + ending] = stacked(*(name + ending for name in theirs))
    used = {piece.name for recipe in recipes.values() for piece in recipe}  # type: ignore[union-attr]
    return Pieced(folder, {**recipes, **{name: name for name in folder if name not in used}})
