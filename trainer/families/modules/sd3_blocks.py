"""The MMDiT of SD3 and SD3.5 (Esser et al. 2024): diffusers' module on weights as their authors keep them.

Two things differ from diffusers. Query, key and value come from one matrix, so that a checkpoint's tensors
are used as they lie there, and an adapter spans all three as the reference trainer's does. What is only
normalised is modulated by shift and scale in this order, so that an adapter's rows mean the same in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ...engine.attention import Attend, sdpa
from .building import count

HEAD_DIM = 64  # of every model of this kind; its width is a multiple of it
EPS = 1e-6
Tensors = Mapping[str, torch.Tensor]


def mmdit_config(sd: Tensors) -> dict[str, Any]:
    """Read the shape of an MMDiT from weights with our names; see diffusers' ``SD3Transformer2DModel``."""
    width, channels, patch, _ = sd["pos_embed.proj.weight"].shape
    places = sd["pos_embed.pos_embed"].shape[1]
    side = round(places**0.5)
    if side * side != places:
        raise ValueError(f"{places} positions make no square")
    blocks = count(sd, r"transformer_blocks\.(\d+)\.")
    return {
        "sample_size": side,
        "pos_embed_max_size": side,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": sd["proj_out.weight"].shape[0] // patch**2,
        "num_layers": blocks,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": width // HEAD_DIM,
        "joint_attention_dim": sd["context_embedder.weight"].shape[1],
        "caption_projection_dim": sd["context_embedder.weight"].shape[0],
        "pooled_projection_dim": sd["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "dual_attention_layers": tuple(
            i for i in range(blocks) if f"transformer_blocks.{i}.attn2.to_qkv.weight" in sd
        ),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in sd else None,
    }


def build_mmdit(config: Mapping[str, Any]) -> nn.Module:
    """Build the model of a config in the form of the authors' weights; call it on the meta device."""
    from diffusers import SD3Transformer2DModel
    from diffusers.models.normalization import AdaLayerNormContinuous

    model: Any = SD3Transformer2DModel(**config)
    for block in model.transformer_blocks:
        for attention in (block.attn, block.attn2):
            if attention is not None:
                _fuse(attention)
        if isinstance(block.norm1_context, AdaLayerNormContinuous):
            block.norm1_context = ShiftScaleNorm(block.norm1_context.linear)
    model.norm_out = ShiftScaleNorm(model.norm_out.linear)
    return cast(nn.Module, model)


class ShiftScaleNorm(nn.Module):
    """Layer normalisation modulated by the conditioning: LN(x) (1 + scale) + shift (Peebles & Xie 2023)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear  # c -> shift, scale
        self.norm = nn.LayerNorm(linear.out_features // 2, eps=EPS, elementwise_affine=False)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (B, L, D), c: (B, C) -> (B, L, D)."""
        shift, scale = self.linear(nn.functional.silu(c).to(x.dtype)).chunk(2, dim=1)
        normed: torch.Tensor = self.norm(x) * (1 + scale)[:, None] + shift[:, None]
        return normed


class JointAttention:
    """The attention of image and text tokens over both, each with projections of its own.

    Without text tokens it is the image's attention to itself, SD3.5 medium's second one. The reference
    trainer takes the number of that one's heads for their width; ComfyUI and diffusers, which draw, do not.
    ``attend`` is the product of q, k and v, (B, heads, L, D) each.
    """

    def __init__(self, attend: Attend = sdpa) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """hidden_states: (B, L, W), encoder_hidden_states: (B, S, W) -> both, or the first alone."""
        length = hidden_states.shape[1]
        q, k, v = _heads(attn.to_qkv(hidden_states), attn.heads)
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = _heads(attn.to_added_qkv(encoder_hidden_states), attn.heads)
            text_q, text_k = _normed(attn.norm_added_q, text_q), _normed(attn.norm_added_k, text_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = self.attend(q, k, v, None).transpose(1, 2).flatten(2)  # (B, L + S, W)
        linear, dropout = attn.to_out
        image = dropout(linear(out[:, :length]))
        if encoder_hidden_states is None:
            return image
        text = out[:, length:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _fuse(attention: Any) -> None:
    """Give an attention one projection to query, key and value in place of three."""
    attention.to_qkv = _stacked(attention, ("to_q", "to_k", "to_v"))
    if getattr(attention, "add_q_proj", None) is not None:
        attention.to_added_qkv = _stacked(attention, ("add_q_proj", "add_k_proj", "add_v_proj"))
    attention.set_processor(JointAttention())


def _stacked(attention: nn.Module, names: tuple[str, str, str]) -> nn.Linear:
    parts = [cast(nn.Linear, getattr(attention, name)) for name in names]
    for name in names:
        delattr(attention, name)
    rows = sum(part.out_features for part in parts)
    return nn.Linear(parts[0].in_features, rows, bias=parts[0].bias is not None)


def _heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Cut (B, L, 3 W) into q, k and v, (B, heads, L, W / heads) each."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _normed(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else cast(torch.Tensor, norm(x)).to(x.dtype)
