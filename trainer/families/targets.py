"""Which modules of a U-Net with a CLIP text model are trained, by the sets in settings.presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ..parts import Parts, Target
from ..settings.presets import KOHYA, KOHYA_CONVOLUTIONS, PRESETS


def find_targets(
    parts: Parts,
    block_of: Callable[[str], int | None],
    *,
    convolutions: bool,
    preset: str = "",
    norms: bool = False,
) -> list[Target]:
    """List the trained modules, text encoder first, then U-Net, in the order in which they lie there.

    Without a ``preset`` they are those of kohya's trainer; ``convolutions`` then adds the blocks of
    convolutions. ``norms`` adds the normalisation layers in the same places, and so do some presets.
    """
    chosen = PRESETS[preset] if preset else KOHYA_CONVOLUTIONS if convolutions else KOHYA
    norms = norms or chosen.norms
    found = list(_inside(parts.text_encoder, chosen.text, chosen.endings, (), "text_encoder", norms))
    unet = _inside(parts.denoiser, chosen.denoiser, chosen.endings, chosen.names, "denoiser", norms)
    return found + [Target(t.part, t.path, t.key, t.kind, block_of(t.path)) for t in unet]


def _inside(
    root: nn.Module,
    classes: tuple[str, ...],
    endings: tuple[str, ...],
    names: tuple[str, ...],
    part: str,
    norms: bool,
) -> Iterator[Target]:
    for outer_path, outer in root.named_modules():
        if type(outer).__name__ in classes:
            for inner_path, inner in outer.named_modules():
                path = f"{outer_path}.{inner_path}" if outer_path else inner_path  # the whole has no name
                yield from _target(part, path, inner, norms)
        elif outer_path in names or outer_path.endswith(tuple(f".{ending}" for ending in endings)):
            yield from _target(part, outer_path, outer, norms)


def _target(part: str, path: str, module: nn.Module, norms: bool) -> Iterator[Target]:
    """Yield the module as a target, where it is of a kind that can be trained."""
    kind = "linear"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        kind = "norm"
        if not norms or module.weight is None:
            return
    elif isinstance(module, nn.Conv2d):
        kind = "linear" if module.kernel_size == (1, 1) else "conv"
    elif not isinstance(module, nn.Linear):
        return
    prefix = "lora_te" if part == "text_encoder" else "lora_unet"
    named = path if part == "denoiser" or path.startswith("text_model.") else f"text_model.{path}"
    yield Target(part, path, f"{prefix}_{named.replace('.', '_')}", kind)
