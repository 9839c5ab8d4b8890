"""Names of Chroma's weights in diffusers' folders; its single files have the modules' names."""

from __future__ import annotations

import re

from ..base import Tensors
from .flux_keys import DOUBLE, SINGLE, Names, from_diffusers

TOP: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
}
GUIDE_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
# Flux.1's blocks without modulations of their own
BLOCKS = {
    "transformer_blocks": ("double_blocks", {k: v for k, v in DOUBLE.items() if not k.endswith("_mod.lin")}),
    "single_transformer_blocks": (
        "single_blocks",
        {k: v for k, v in SINGLE.items() if k != "modulation.lin"},
    ),
}


def chroma_from_diffusers(folder: Tensors) -> Tensors:
    """Bring diffusers' transformer to the modules' names; see `from_diffusers`."""
    guide = "distilled_guidance_layer.layers"
    depth = {int(m[1]) for k in folder if (m := re.match(rf"{re.escape(guide)}\.(\d+)\.", k))}
    layers = {
        f"{guide}.{i}.{ours}": (f"{guide}.{i}.{theirs}",)
        for i in sorted(depth)
        for ours, theirs in GUIDE_LAYERS.items()
    }
    return from_diffusers(folder, {**TOP, **layers}, BLOCKS)
