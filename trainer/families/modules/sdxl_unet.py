"""SDXL's U-Net: its shape, read from the weights, and its modules' names, order and blocks in a LoRA file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...block_weights import SDXL
from ...parts import DENOISER, Parts, Target
from ..base import Tensors
from ..names.ldm_keys import unet_to_ldm
from ..names.unet_kinds import heads_of
from ..targets.targets import find_targets
from .building import count
from .unet import unet_config

TIME_WIDTH = 256  # values for each of the six numbers of the sizes
MIDDLE = r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\."
# The first block of each kind, counted as in the reference: embeddings are 0, the output layers the last.
FIRST = {
    "time_embed": 0,
    "label_emb": 0,
    "input_blocks": SDXL.before,
    "middle_block": SDXL.before + SDXL.down,
    "output_blocks": SDXL.before + SDXL.down + SDXL.mid,
    "out": SDXL.before + SDXL.down + SDXL.mid + SDXL.up,
}
# The layers inside a residual block, an attention and a transformer block, in the reference's order.
LAYERS = (
    ("in_layers", "emb_layers", "out_layers", "skip_connection"),
    ("norm", "proj_in", "transformer_blocks", "proj_out"),
    ("attn1", "ff", "attn2", "norm1", "norm2", "norm3"),
)
ORDER = {name: rank for layers in LAYERS for rank, name in enumerate(layers)}
NUMBERED = ("input_blocks", "middle_block", "output_blocks")


def config_of(sd: Tensors) -> dict[str, Any]:
    """Read the U-Net's shape from diffusers-named weights, that of distilled ones (SSD-1B, KOALA) too."""
    config = unet_config(sd, heads=heads_of)
    levels = len(config["block_out_channels"])
    down = [_depths(sd, f"down_blocks.{i}", config["layers_per_block"]) for i in range(levels)]
    up = [_depths(sd, f"up_blocks.{i}", config["layers_per_block"] + 1) for i in range(levels)]
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": sd["add_embedding.linear_1.weight"].shape[1],
        "transformer_layers_per_block": tuple(depths[0] if depths else 1 for depths in down),
    }
    middle = count(sd, MIDDLE)
    if middle == 0:
        has_middle = "mid_block.resnets.0.norm1.weight" in sd
        config["mid_block_type"] = "UNetMidBlock2D" if has_middle else None
    if any(len(set(depths)) > 1 for depths in (*down, *up)):
        config["transformer_layers_per_block"] = tuple(depths or 1 for depths in down)
        config["reverse_transformer_layers_per_block"] = tuple(depths or 1 for depths in up)
    return config


def _depths(sd: Tensors, block: str, layers: int) -> tuple[int, ...]:
    """Return how many transformer blocks each attention of a level has; () for a level without any."""
    patterns = (rf"{block}\.attentions\.{i}\.transformer_blocks\.(\d+)\." for i in range(layers))
    found = tuple(count(sd, pattern) for pattern in patterns)
    return found if any(found) else ()


def sdxl_targets(parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False) -> list[Target]:
    """List the trained modules as `find_targets` does, the U-Net's under LDM's names and in kohya's order."""
    named = _ldm_names(parts.denoiser)
    found = find_targets(
        parts,
        lambda path: _block_of(named(path)),
        named=named,
        convolutions=convolutions,
        preset=preset,
        norms=norms,
    )
    return sorted(found, key=lambda target: _place(target, named))


def _ldm_names(unet: nn.Module) -> Callable[[str], str]:
    """Return the function from a module's path to its LDM name."""
    paths = [f"{path}." for path, _ in unet.named_modules()]
    names = {path: name.rstrip(".") for name, path in unet_to_ldm(paths).items()}
    return lambda path: names[f"{path}."]


def _block_of(name: str) -> int:
    kind, number, *_ = name.split(".")
    return FIRST[kind] + (int(number) if kind in NUMBERED else 0)


def _place(target: Target, named: Callable[[str], str]) -> tuple[int, ...]:
    """Return what to sort by: text encoders first and as they are, then blocks and what lies in them."""
    if target.part != DENOISER:
        return (-1,)
    inside = named(target.path).split(".")[1:]
    return target.block or 0, *(int(name) if name.isdigit() else ORDER.get(name, 0) for name in inside)
