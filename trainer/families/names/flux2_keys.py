"""Names of FLUX.2's weights in diffusers' folders, and its autoencoder's in single files.

The transformer's single files have the modules' names.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Tensors
from ..sources.weights import Renamed, joined
from .flux_keys import DOUBLE, Names, from_diffusers
from .ldm_keys import VAE_PREFIX
from .ldm_vae import join_vae, split_vae

TOP: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FEED_FORWARD: Names = {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE: Names = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
BLOCKS: Mapping[str, tuple[str, Names]] = {
    "transformer_blocks": (
        "double_blocks",
        {**{k: v for k, v in DOUBLE.items() if not k.endswith("_mod.lin")}, **FEED_FORWARD},
    ),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}
# The spread of the latents' channels; how many batches it was taken over is no weight.
STATISTICS = ("bn.running_mean", "bn.running_var")
# Black Forest Labs' name and the usual one
CONVOLUTIONS = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def flux2_from_diffusers(folder: Tensors) -> Tensors:
    """Bring diffusers' transformer to the modules' names; see `from_diffusers`."""
    return from_diffusers(folder, TOP, BLOCKS)


def split_flux2_vae(weights: Tensors) -> Tensors:
    """Return the autoencoder of single-file weights under diffusers' names (views)."""
    usual = {_usual(k): k for k in weights if k.startswith(VAE_PREFIX)}
    vae = split_vae(Renamed(weights, usual))
    present = {name: VAE_PREFIX + name for name in STATISTICS if VAE_PREFIX + name in weights}
    return joined([vae, Renamed(weights, present)])


def join_flux2_vae(vae: Tensors) -> Tensors:
    """Return the autoencoder's weights under single-file names (views)."""
    return joined([join_vae(vae), Renamed(vae, {VAE_PREFIX + name: name for name in STATISTICS})])


def without_counter(vae: Tensors) -> Tensors:
    """Leave out what a diffusers folder holds beside weights."""
    return Renamed(vae, {k: k for k in vae if not k.endswith("num_batches_tracked")})


def _usual(name: str) -> str:
    for old, new in CONVOLUTIONS.items():
        if name.startswith(VAE_PREFIX + old):
            return VAE_PREFIX + new + name.removeprefix(VAE_PREFIX + old)
    return name
