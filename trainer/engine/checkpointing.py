"""Gradient checkpointing of chosen blocks: their forward runs again in the backward pass (Chen et al. 2016).

Non-reentrant, so that inputs need no gradient: asking it of them would keep what lies before the first
adapter from being skipped. Nothing random runs inside a block, so no generator's state is kept: reading
one cannot be captured in a CUDA graph. The recomputed values are the same bits, hence so are the gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]
Undo = Callable[[], None]

# diffusers' U-Nets: the classes of a block, and the order in which a forward pass meets them. Their
# module tree is in another order: the middle comes last, and attentions before the resnets they follow.
UNET_RESNET, UNET_TRANSFORMER, UNET_LAYERS = "ResnetBlock2D", "Transformer2DModel", "transformer_blocks"
UNET_STAGES = ("down_blocks", "mid_block", "up_blocks")
UNET_KINDS = ("resnets", "attentions")


def blocks(root: nn.Module) -> list[nn.Module]:
    """List the repeated blocks of a model in forward order; empty where it has none.

    Of a U-Net: its resnets and transformers; a transformer of several layers (SDXL) counts by layers. Of
    anything else: the entries of the outermost module lists whose class occurs at least twice, in the
    order of registration.
    """
    in_unet = []
    for path, module in root.named_modules():
        if path.split(".")[0] not in UNET_STAGES:
            continue
        if type(module).__name__ == UNET_RESNET:
            in_unet.append((_unet_place(path), module))
        elif type(module).__name__ == UNET_TRANSFORMER:
            layers = list(cast(nn.ModuleList, getattr(module, UNET_LAYERS)))
            parts = layers if len(layers) > 1 else [module]
            in_unet += [((*_unet_place(path), i), part) for i, part in enumerate(parts)]
    if in_unet:
        return [module for _, module in sorted(in_unet, key=lambda found: found[0])]
    entries = list(_outermost_entries(root))
    counts = Counter(type(module) for module in entries)
    return [module for module in entries if counts[type(module)] > 1]


def checkpoint_blocks(chosen: Iterable[nn.Module]) -> Undo:
    """Let each block recompute its forward in the backward pass; the returned function undoes it.

    Works on arguments and results of any form. Where gradients are off (sampling) nothing changes. What is
    wrapped later (see `swap`) must be undone first.
    """
    return undo_all([wrap_forward(block, _checkpointed) for block in chosen])


def wrap_forward(module: nn.Module, around: Callable[[Forward], Forward]) -> Undo:
    """Put ``around(forward)`` in place of one module's forward; the returned function puts it back."""
    inner = module.forward
    own = "forward" in vars(module)  # wrapped before; else it is its class's
    module.forward = around(inner)

    def undo() -> None:
        if own:
            module.forward = inner
        else:
            del module.forward

    return undo


def undo_all(undos: list[Undo]) -> Undo:
    """Return one function that undoes all, the last first; a second call does nothing."""

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def _checkpointed(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _unet_place(path: str) -> tuple[int, ...]:
    """Return the place in forward order of e.g. "up_blocks.2.attentions.0"; the middle has no level."""
    stage, *inside = path.split(".")
    level = int(inside.pop(0)) if inside[0].isdigit() else 0
    kind, number = inside[:2]
    return UNET_STAGES.index(stage), level, int(number), UNET_KINDS.index(kind)


def _outermost_entries(root: nn.Module) -> Iterator[nn.Module]:
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost_entries(child)
