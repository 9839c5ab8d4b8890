"""Stable Diffusion's U-Nets: their shape, read from the weights, and their blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ...block_weights import SD1
from ..base import Tensors
from .building import count, first, unfit

IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


def unet_config(sd: Tensors, *, heads: Callable[[int], int]) -> dict[str, Any]:
    """Read a U-Net's shape from weights with diffusers' names; ``heads`` tells those of a width."""
    levels = count(sd, r"down_blocks\.(\d+)\.")
    attended = [f"down_blocks.{i}.attentions.0.norm.weight" in sd for i in range(levels)]
    widths = tuple(sd[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    counts = [heads(width) for width in widths]
    return {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": widths,
        "layers_per_block": count(sd, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": first(sd, "attn2.to_k.weight").shape[1],
        # diffusers' name for the number of heads, a misnomer that its files keep
        "attention_head_dim": counts[0] if len(set(counts)) == 1 else tuple(counts),
        "use_linear_projection": first(sd, "proj_in.weight").ndim == 2,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
    }


def block_of(path: str) -> int | None:
    """Return the index of the block of SD1.x's or SD2.x's U-Net that a module lies in; None outside of them.

    Counted as in the reference: 0 is the first convolution, which it does not train; three to a level, of
    which the third is the change of size; 12 is the middle.
    """
    if path.startswith("mid_block."):
        return SD1.down
    found = IN_BLOCK.match(path)
    if found is None:
        return None
    third = found[3] in ("downsamplers", "upsamplers")
    index = 3 * int(found[2]) + (2 if third else int(found[4]))
    return 1 + index if found[1] == "down" else SD1.down + SD1.mid + index


def check_context(unet: Any, width: int, family: str) -> None:
    """Raise LG-BASE-003 where the U-Net reads text of another width than its text encoders give."""
    wanted = unet.config.cross_attention_dim
    if wanted != width:
        raise unfit("text encoder", family, f"U-Net: context width {wanted}; text encoder: {width}")


def predict_unet(
    unet: Any, dtype: torch.dtype, noisy: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Return a U-Net's output for noisy latents at integer timesteps t (B,), in ``dtype``."""
    out: torch.Tensor = unet(
        noisy.to(dtype), t, encoder_hidden_states=hidden.to(dtype), return_dict=False, **more
    )[0]
    return out
