"""OpenCLIP's names of a text encoder's weights and transformers' (HF), both ways.

SD2.x and SDXL's second encoder were trained with OpenCLIP. It keeps query, key and value in one matrix, and
the projection of the pooled output as a parameter that is multiplied from the other side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from ..names.pieces import Piece, Recipe, share, stacked

Tensors = Mapping[str, torch.Tensor]

# Outside of the layers: OpenCLIP's name, HF's
WHOLE = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
)
# In a layer: the beginnings of OpenCLIP's names and of HF's
LAYER = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)
HEADS = ("q", "k", "v")  # as they lie in the joined matrix
PROJECTION, HF_PROJECTION = "text_projection", "text_projection.weight"

BODY = ("embeddings.", "encoder.", "final_layer_norm.")  # HF's names since transformers 5

RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
HF_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")


def to_hf(weights: Tensors, prefix: str) -> dict[str, Recipe]:
    """Map HF's names to what they are made of in OpenCLIP weights below ``prefix``; all of it views.

    What HF's text model has no place for is left out: logit_scale, the attention's mask.
    """
    whole = dict(WHOLE)
    recipes: dict[str, Recipe] = {}
    for key in weights:
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        if name in whole:
            recipes[whole[name]] = key
        elif name == PROJECTION:
            recipes[HF_PROJECTION] = Piece(key, transposed=True)
        elif name == HF_PROJECTION:  # some converters have turned it round already
            recipes[HF_PROJECTION] = key
        elif match := RESBLOCK.fullmatch(name):
            recipes |= _layer_to_hf(weights, key, f"text_model.encoder.layers.{match[1]}.", match[2])
    return recipes


def from_hf(names: Iterable[str]) -> dict[str, Recipe]:
    """Map OpenCLIP's names (without a prefix) to what they are made of in weights with HF's names.

    Joined matrices are copies, made when they are asked for; the projection is a view.
    """
    whole = {hf: name for name, hf in WHOLE}
    recipes: dict[str, Recipe] = {}
    for key in names:
        if key in whole:
            recipes[whole[key]] = key
        elif key == HF_PROJECTION:
            recipes[PROJECTION] = Piece(key, transposed=True)
        elif match := HF_LAYER.fullmatch(key):
            recipes |= _layer_from_hf(f"transformer.resblocks.{match[1]}.", key, match[2])
    return recipes


def named_by_hf(weights: Iterable[str], prefix: str = "") -> dict[str, Recipe]:
    """Map HF's names to those of weights below ``prefix`` that have them already, the projection's too."""
    names: dict[str, Recipe] = {}
    for key in weights:
        name = key[len(prefix) :]
        if not key.startswith(prefix) or name.endswith("position_ids"):
            continue
        inside = name.startswith(BODY)
        if inside or name == HF_PROJECTION or name.startswith("text_model."):
            names[f"text_model.{name}" if inside else name] = key
    return names


def without(names: Mapping[str, Recipe], *left_out: str) -> dict[str, Recipe]:
    """Return the recipes of all names but these."""
    return {name: recipe for name, recipe in names.items() if name not in left_out}


def _layer_to_hf(weights: Tensors, key: str, layer: str, name: str) -> dict[str, Recipe]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{layer}self_attn.{head}_proj.{kind}": share(weights, key, i, len(HEADS))
            for i, head in enumerate(HEADS)
        }
    return {layer + hf + name[len(own) :]: key for own, hf in LAYER if name.startswith(own)}


def _layer_from_hf(block: str, key: str, name: str) -> dict[str, Recipe]:
    if match := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", name):
        before, after = key[: match.start(1) - len(name)], key[match.end(1) - len(name) :]
        joined = stacked(*(before + head + after for head in HEADS))
        return {f"{block}attn.in_proj_{match[2]}": joined}
    return {block + own + name[len(hf) :]: key for own, hf in LAYER if name.startswith(hf)}
