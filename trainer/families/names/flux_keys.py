"""Names of Flux.1's weights: single files, which the modules follow, and diffusers' folders."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..base import Tensors
from .ldm_keys import UNET_PREFIX
from .pieces import Pieced, Recipe, stacked, swapped
from .prefixes import below

CLIP_PREFIX = "text_encoders.clip_l.transformer."
T5_PREFIX = "text_encoders.t5xxl.transformer."
BODY = "text_model."  # what of a CLIP is used: not its projection
# BFL's files call a normalisation's weight "scale", ComfyUI in memory, and the modules, "weight".
SCALE, WEIGHT = ".scale", ".weight"
NORMS = re.compile(r"\.(norm\.(query|key)_norm|norms\.\d+)\.(scale|weight)$")

Names = Mapping[str, tuple[str, ...]]
# The modules' layers and those of diffusers that they are made of, stacked in this order.
TOP: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE: Names = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Names = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
BLOCKS: Mapping[str, tuple[str, Names]] = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers has the scale before the shift


def split_denoiser(weights: Tensors) -> Tensors:
    """Return the transformer of single-file weights under the modules' names (views)."""
    names = (k[len(UNET_PREFIX) :] for k in weights if k.startswith(UNET_PREFIX))
    return Pieced(weights, {module_name(k): UNET_PREFIX + k for k in names})


def join_denoiser(denoiser: Tensors) -> Tensors:
    """Return the transformer's weights under the names of Black Forest Labs' files (views)."""
    return Pieced(denoiser, {UNET_PREFIX + file_name(k): k for k in denoiser})


def split_clip(weights: Tensors) -> Tensors:
    """Return the CLIP text model of single-file weights (views), without its projection."""
    return _body(below(weights, CLIP_PREFIX))


def clip_from_folder(folder: Tensors) -> Tensors:
    """Bring a diffusers folder's CLIP text model to its full names."""
    bodies = (k for k in folder if not k.startswith("text_projection."))
    return _body(Pieced(folder, {k if k.startswith(BODY) else BODY + k: k for k in bodies}))


def _body(clip: Tensors) -> Tensors:
    used = (k for k in clip if k.startswith(BODY) and not k.endswith("position_ids"))
    return Pieced(clip, {k: k for k in used})


def module_name(name: str) -> str:
    """Return the modules' name of a file's tensor."""
    return name.removesuffix(SCALE) + WEIGHT if NORMS.search(name) and name.endswith(SCALE) else name


def file_name(name: str) -> str:
    """Return the name that Black Forest Labs' files give a module's tensor."""
    return name.removesuffix(WEIGHT) + SCALE if NORMS.search(name) else name


def from_diffusers(
    folder: Tensors, top: Names = TOP, blocks: Mapping[str, tuple[str, Names]] = BLOCKS
) -> Tensors:
    """Bring diffusers' transformer to the modules' names: query, key and value become one (copies).

    ``top`` and ``blocks`` are those of Flux.1; other models of this kind have tables of their own. A name
    that is no part of any recipe stays as it is, and is refused when the module takes the weights.
    """
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()
    for ours, theirs in _layers(folder, top, blocks).items():
        for ending in (WEIGHT, ".bias"):
            sources = [name + ending for name in theirs]
            if not any(source in folder for source in sources):
                continue  # normalisations have no bias, schnell no guidance
            recipes[ours + ending] = swapped(folder, sources[0]) if ours == SWAPPED else stacked(*sources)
            used.update(sources)
    return Pieced(folder, {**recipes, **{name: name for name in folder if name not in used}})


def _layers(folder: Tensors, top: Names, blocks: Mapping[str, tuple[str, Names]]) -> Names:
    """Return all layers of a transformer as deep as the folder's, and what they are made of."""
    found = dict(top)
    for theirs, (ours, names) in blocks.items():
        numbers = {int(m[1]) for k in folder if (m := re.match(rf"{theirs}\.(\d+)\.", k))}
        for number in sorted(numbers):
            for layer, sources in names.items():
                found[f"{ours}.{number}.{layer}"] = tuple(f"{theirs}.{number}.{s}" for s in sources)
    return found
