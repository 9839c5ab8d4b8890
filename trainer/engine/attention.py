"""The attention product softmax(QK^T / sqrt(d)) V: three ways to compute it, and a model that takes one.

A backend is a pure function of q, k and v, which differs from the others in its last bits only.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import listed

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
FEW_KEYS = 256  # a text's 77, or a map of 16 x 16
BIAS_ALIGNMENT = 8  # xformers' kernels read a mask's rows in pieces of so many values


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Let torch choose its kernel (flash, memory-efficient, cuDNN, plain); see `plain` for the shapes.

    A CPU's kernel for bf16 is slower than `plain` where keys are few; the scores stay float32, as in it.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= FEW_KEYS:
        return plain(q.float(), k.float(), v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def xformers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Let xformers compute it, in its layout (B, L, heads, D); see `plain` for the shapes."""
    ops = importlib.import_module("xformers.ops")
    if mask is not None:
        keys = k.shape[2]
        mask = F.pad(mask.to(v.dtype), (0, -keys % BIAS_ALIGNMENT))[..., :keys]
        mask = mask.expand(*q.shape[:3], keys)
    q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return cast(torch.Tensor, ops.memory_efficient_attention(q, k, v, attn_bias=mask)).transpose(1, 2)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute it as it is written, the softmax in float32 at least: the reference.

    q: (B, heads, L, D); k, v: (B, heads, S, D); mask, added to the scores: (B, heads, L or 1, S).
    Returns (B, heads, L, D). The scale goes to q, because fp16 scores could overflow without it.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v.dtype) @ v


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "xformers": xformers, "plain": plain}


class Processor:
    """What diffusers' ``AttnProcessor2_0`` computes, with any backend and fewer operations.

    Tokens are rows of one matrix from the first projection to the last, so that a product needs no
    views of its own around it, and nothing is divided by 1. A callable ``grouped_qkv`` on the module
    takes the place of to_q, to_k and to_v in self-attention: x (B L, in) -> q, k, v (B L, inner).
    """

    def __init__(self, attend: Attend, replaced: object) -> None:
        self.attend, self.replaced = attend, replaced

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (B, L, in) or (B, in, H, W), encoder_hidden_states: (B, S, in) -> like the first."""
        x, context = hidden_states, encoder_hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        size = x.shape[2:] if x.ndim == 4 else None
        if size is not None:
            x = x.flatten(2).transpose(1, 2)  # (B, H W, in)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        batch, length = x.shape[:2]
        rows = x.flatten(0, 1)  # (B L, in)
        grouped = getattr(attn, "grouped_qkv", None) if context is None else None
        if grouped is None:
            # Not the text's rows: its gradient sums over all modules, in an order that they would change.
            others = rows if context is None else context
            projected = attn.to_q(rows), attn.to_k(others), attn.to_v(others)
        else:
            projected = grouped(rows)
        dim = projected[1].shape[-1] // attn.heads
        q, k, v = (p.view(batch, -1, attn.heads, dim).transpose(1, 2) for p in projected)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        out = self.attend(q, k, v, _mask(attn, attention_mask, k.shape[2], batch))  # (B, heads, L, D)
        out = out.transpose(1, 2).reshape(batch * length, attn.heads * dim)
        linear, dropout = attn.to_out
        out = dropout(linear(out)).view(batch, length, -1)
        if size is not None:
            out = out.transpose(1, 2).reshape(batch, -1, *size)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


# diffusers asks for the signature at every call; one that lies ready is found three times as fast.
Processor.__call__.__signature__ = inspect.signature(Processor.__call__)  # type: ignore[attr-defined]


def _mask(attn: Any, mask: torch.Tensor | None, keys: int, batch: int) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = cast(torch.Tensor, attn.prepare_attention_mask(mask, keys, batch))  # (B heads, L or 1, S)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


@runtime_checkable
class Attending(Protocol):
    """A processor of a family's own, which leaves the product itself to a backend."""

    attend: Attend


class Installed(NamedTuple):
    """How many modules a backend serves; ``note`` says which others there are, and is None if none."""

    num_modules: int
    note: str | None


def use_attention(denoiser: nn.Module, name: str) -> Installed:
    """Compute a diffusers model's attention with the backend ``name``, until `restore_attention`.

    Modules whose processor is another than diffusers' general one (those of Flux, for instance) need
    more than q, k and v; they keep theirs, which is torch's own attention too.
    """
    mine, others = 0, Counter[str]()
    for module in denoiser.modules():
        processor = original_processor(module)
        if is_general(processor):
            module.set_processor(Processor(BACKENDS[name], processor))  # type: ignore[operator]
            mine += 1
        elif isinstance(processor, Attending):
            processor.attend = BACKENDS[name]
            mine += 1
        elif processor is not None:
            others[type(processor).__name__] += 1
    if not others:
        return Installed(mine, None)
    kinds = listed(f"{count} x {kind}" for kind, count in sorted(others.items()))
    return Installed(mine, f"The setting attention leaves {others.total()} modules as they are: {kinds}.")


def restore_attention(denoiser: nn.Module) -> int:
    """Give the modules back what `use_attention` replaced; return how many."""
    found = [m for m in denoiser.modules() if isinstance(getattr(m, "processor", None), Attending)]
    for module in found:
        if isinstance(module.processor, Processor):
            module.set_processor(original_processor(module))  # type: ignore[operator]
        else:
            cast(Attending, module.processor).attend = sdpa
    return len(found)


def original_processor(module: nn.Module) -> object:
    """Return the processor that diffusers gave a module; None where there is none."""
    found = getattr(module, "processor", None) if hasattr(module, "set_processor") else None
    return found.replaced if isinstance(found, Processor) else found


def is_general(processor: object) -> bool:
    """Say whether a processor needs nothing but q, k and v, so that `use_attention` replaces it."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return type(processor) is AttnProcessor2_0
