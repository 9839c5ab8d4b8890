"""diffusers' blocks computed as they are written there, keeping less for the backward pass.

A U-Net's residual block keeps of each group norm the input and the result, and of each SiLU the result, which
the frozen convolution behind it has no use for. A feed-forward keeps its hidden layer three times. All of
these are made again in backward, from the norm's input or from the first linear layer's result (see `made`).
The classes are recognised by name: nothing is imported that is not there already.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .frozen import FrozenConv2d, is_frozen, is_plain_convolution
from .made import made, through
from .makes import GEGLU, Activated, Gelu, GroupNormSilu, Make, Normed

# Apple's GPUs lack the gradient of a group norm.
NOT_ON = ("mps",)


def keep_less(denoiser: nn.Module) -> int:
    """Let a denoiser's blocks of diffusers' classes keep less; return how many. Values stay the same.

    Call it when weights have their place and dtype, and before anything is wrapped around a block.
    """
    number = 0
    for module in [m for m in denoiser.modules() if _is_theirs(m)]:
        for name, child in list(module.named_children()):
            if is_plain_convolution(child) and is_frozen(child):  # torch's keeps an input that nobody needs
                setattr(module, name, FrozenConv2d(child, child.weight.dtype).train(child.training))
        known = LEAN.get(type(module).__name__)
        if known is not None and known.fits(module):
            module.forward = partial(known.forward, weakref.proxy(module))  # a cycle would outlive the run
            number += 1
    return number


def _is_theirs(module: nn.Module) -> bool:
    """Say whether a class is diffusers': others have classes of the same names, and a host's are its own."""
    return type(module).__module__.startswith("diffusers.")


def _resnet(block: Any, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
    """x: (B, in, H, W), temb: (B, channels) -> (B, out, H, W)."""
    h = block.conv1(_norm_silu(block.norm1, x))
    if temb is not None:
        h = h + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    h = block.conv2(_norm_silu(block.norm2, h))
    out: torch.Tensor = h + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    return out


def _norm_silu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if type(norm) is nn.GroupNorm and norm.affine and is_frozen(norm):
        return made(GroupNormSilu(norm.num_groups, norm.eps), x, norm.weight, norm.bias)
    return F.silu(norm(x))


def _transformer(
    block: Any,
    x: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    **_: Any,
) -> torch.Tensor:
    """x: (B, L, D), encoder_hidden_states: (B, S, C) -> (B, L, D); the rest is for other forms."""
    more = cross_attention_kwargs or {}
    x = x + block.attn1(block.norm1(x), attention_mask=attention_mask, **more)
    text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    x = x + block.attn2(block.norm2(x), **text, **more)
    norm, first, last = block.norm3, block.ff.net[0], block.ff.net[2]
    if type(norm) is nn.LayerNorm and norm.elementwise_affine and is_frozen(norm):
        inside = through(first.proj, Normed(norm.eps), x, norm.weight, norm.bias)
    else:
        inside = first.proj(norm(x))
    return x + through(last, _activation(first), inside)


def _feed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    """x: (B, L, D) -> (B, L, D)."""
    return through(block.net[2], _activation(block.net[0]), block.net[0].proj(x))


def _activation(first: Any) -> Make:
    return Activated(GEGLU if type(first).__name__ == "GEGLU" else Gelu(first.approximate))


def _is_common_resnet(block: Any) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.upsample is block.downsample is None
        and block.output_scale_factor == 1
        and not block.skip_time_act
        and block.time_emb_proj is not None
        and block.dropout.p == 0
        and type(block.nonlinearity) is nn.SiLU
    )


def _is_common_transformer(block: Any) -> bool:
    return (
        block.norm_type == "layer_norm"
        and block.attn2 is not None
        and block.pos_embed is None
        and not block.only_cross_attention
        and block._chunk_size is None
        and _is_common_feed_forward(block.ff)
    )


def _is_common_feed_forward(block: Any) -> bool:
    first, *others = block.net
    known = type(first).__name__ in ("GEGLU", "GELU") and len(others) == 2
    return known and type(others[0]) is nn.Dropout and others[0].p == 0


class Lean(NamedTuple):
    """Whether a block has its class's common form, and how it is computed then."""

    fits: Callable[[Any], bool]
    forward: Callable[..., torch.Tensor]


LEAN: Mapping[str, Lean] = {
    "ResnetBlock2D": Lean(_is_common_resnet, _resnet),
    "BasicTransformerBlock": Lean(_is_common_transformer, _transformer),
    "FeedForward": Lean(_is_common_feed_forward, _feed_forward),
}
