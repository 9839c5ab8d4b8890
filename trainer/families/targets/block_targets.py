"""Which layers of a transformer made of blocks are trained, for families whose text encoders are not.

A preset names a set of layers; those that LyCORIS defines by parts of a U-Net alone are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ...errors import LoraGraftError
from ...parts import DENOISER, Parts, Target
from ...settings.presets import PRESETS

# All layers of the blocks, which are what the reference trainers' LoRAs change.
BLOCKS = ("", "full", "full-lin", "attn-mlp", "unet-only", "unet-transformer-only")
ATTENTION = "attn-only"
EVERYTHING = "everything"
NORMS = (nn.LayerNorm, nn.RMSNorm)


def find_block_targets(
    parts: Parts,
    blocks: Collection[type[nn.Module]],
    attention: Collection[type[nn.Module]],
    *,
    family: str,
    convolutions: bool,
    preset: str = "",
    norms: bool = False,
) -> list[Target]:
    """List the layers inside ``blocks``, or what a preset names, in the order in which they lie there.

    ``attention``: the classes that attn-only trains. A layer's name in a file is its path. Raises LG-CFG-004
    for ``convolutions``, of which there are none, and for a preset without a meaning here.
    """
    has_convolutions = preset in PRESETS and PRESETS[preset].convolutions  # so nobody asked for them alone
    if convolutions and not has_convolutions:
        raise _no_effect(
            "conv_dim is set, but there is nothing for it to train.",
            "conv_dim",
            f"{family} has no convolutions.",
            "take conv_dim and conv_alpha back, and choose lora as the network",
        )
    whole = preset == EVERYTHING
    inside = attention if preset == ATTENTION else blocks
    if not whole and preset != ATTENTION and preset not in BLOCKS:
        known = ", ".join(p for p in (*BLOCKS, ATTENTION, EVERYTHING) if p)
        raise _no_effect(
            f"The preset '{preset}' has no meaning for {family}.",
            "preset",
            "it names parts of a U-Net.",
            f"leave it empty, or choose one of {known}",
        )
    return [
        Target(DENOISER, path, f"lora_unet_{path.replace('.', '_')}", kind)
        for path, kind in _layers(parts.denoiser, None if whole else tuple(inside), norms or whole)
    ]


def _layers(
    root: nn.Module, inside: tuple[type[nn.Module], ...] | None, norms: bool
) -> Iterator[tuple[str, str]]:
    """Yield path and kind of the layers below modules of the classes ``inside``; of all, where it is None."""
    roots = [
        path for path, module in root.named_modules() if inside is not None and isinstance(module, inside)
    ]
    for path, module in root.named_modules():
        if inside is not None and not any(path.startswith(f"{r}.") for r in roots):
            continue
        if isinstance(module, nn.Linear):
            yield path, "linear"
        elif norms and isinstance(module, NORMS) and getattr(module, "weight", None) is not None:
            yield path, "norm"


def _no_effect(what: str, where: str, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError("LG-CFG-004", what, where=where, why=why, fix=fix)
