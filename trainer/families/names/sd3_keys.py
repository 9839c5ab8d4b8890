"""Names of the MMDiT's weights (Esser et al. 2024): its authors', ours, and those of a diffusers folder.

Ours are diffusers' names with one difference: the projections to query, key and value are one matrix, as
the authors store them. The tables name modules in the order in which the reference trainer lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ..modules.building import count
from .pieces import Pieced, Recipe, stacked, swapped

MMDIT_PREFIX = "model.diffusion_model."
Pairs = tuple[tuple[str, str], ...]

# Modules inside a block: the authors' name, ours.
ATTENTION: Pairs = (
    ("context_block.attn.qkv", "attn.to_added_qkv"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("x_block.attn.qkv", "attn.to_qkv"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn2.qkv", "attn2.to_qkv"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
)
NORMS: Pairs = (
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
)
CONTEXT_REST: Pairs = (
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
)
IMAGE_REST: Pairs = (
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
)
LINEARS: Pairs = (*ATTENTION[:2], *CONTEXT_REST, *ATTENTION[2:], *IMAGE_REST)
# Modules outside of the blocks.
OUTSIDE: Pairs = (
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
)
POSITIONS = ("pos_embed", "pos_embed.pos_embed")  # the one tensor that is no module's weight or bias

OURS_INSIDE = dict(LINEARS + NORMS)
THEIRS_INSIDE = {ours: theirs for theirs, ours in OURS_INSIDE.items()}
OURS_OUTSIDE = dict(OUTSIDE)
THEIRS_OUTSIDE = {ours: theirs for theirs, ours in OUTSIDE}
THEIR_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")
OUR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")

# What diffusers keeps in three matrices: the first's name is asked for, the others are skipped.
STACKS = {"to_q": ("to_qkv", "to_k", "to_v"), "add_q_proj": ("to_added_qkv", "add_k_proj", "add_v_proj")}
SKIPPED = frozenset(name for _, *others in STACKS.values() for name in others)


def our_module(path: str) -> str | None:
    """Return our path of the authors' module; None where there is none."""
    if found := THEIR_BLOCK.fullmatch(path):
        inside = OURS_INSIDE.get(found[2])
        return None if inside is None else f"transformer_blocks.{found[1]}.{inside}"
    return OURS_OUTSIDE.get(path)


def their_module(path: str) -> str | None:
    """Return the authors' path of our module; None where there is none."""
    if found := OUR_BLOCK.fullmatch(path):
        inside = THEIRS_INSIDE.get(found[2])
        return None if inside is None else f"joint_blocks.{found[1]}.{inside}"
    return THEIRS_OUTSIDE.get(path)


def from_authors(names: Iterable[str]) -> dict[str, str]:
    """Map our names to the authors' (without prefix); what is not known keeps its name."""
    return {_renamed(name, our_module, POSITIONS): name for name in names}


def to_authors(names: Iterable[str]) -> dict[str, str]:
    """Map the authors' names to ours; what is not known keeps its name."""
    return {_renamed(name, their_module, (POSITIONS[1], POSITIONS[0])): name for name in names}


def from_diffusers(sd: Mapping[str, torch.Tensor]) -> Pieced:
    """Return a diffusers folder's weights under our names: three matrices stacked, two halves swapped.

    diffusers keeps the modulation of what is only normalised, the output and the last block's context, as
    scale and shift; its authors as shift and scale.
    """
    last = count(sd, r"transformer_blocks\.(\d+)\.") - 1
    turned = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    recipes: dict[str, Recipe] = {}
    for name in sd:
        path, _, kind = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        if module in STACKS:
            whole, *others = STACKS[module]
            recipes[f"{parent}.{whole}.{kind}"] = stacked(name, *(f"{parent}.{o}.{kind}" for o in others))
        elif module not in SKIPPED:
            recipes[name] = swapped(sd, name) if name.startswith(turned) else name
    return Pieced(sd, recipes)


def _renamed(name: str, module_of: Callable[[str], str | None], positions: tuple[str, str]) -> str:
    if name == positions[0]:
        return positions[1]
    path, _, kind = name.rpartition(".")
    found = module_of(path)
    return name if found is None else f"{found}.{kind}"
