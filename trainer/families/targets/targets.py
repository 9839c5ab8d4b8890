"""Which modules of a U-Net with a CLIP text model are trained, by the sets in settings.presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from ...parts import Parts, Target
from ...settings.presets import KOHYA, KOHYA_CONVOLUTIONS, PRESETS


def find_targets(
    parts: Parts,
    block_of: Callable[[str], int | None],
    *,
    named: Callable[[str], str] = str,
    convolutions: bool,
    preset: str = "",
    norms: bool = False,
) -> list[Target]:
    """List the trained modules, text encoders first, then U-Net, in the order in which they lie there.

    ``block_of`` and ``named`` give a U-Net module's block and its name in a file, by its path. Several text
    encoders are numbered there.

    Without a ``preset`` they are those of kohya's trainer; ``convolutions`` then adds the blocks of
    convolutions. ``norms`` adds the normalisation layers in the same places, and so do some presets.
    """
    chosen = PRESETS[preset] if preset else KOHYA_CONVOLUTIONS if convolutions else KOHYA
    norms = norms or chosen.norms
    found: list[Target] = []
    for number, (part, encoder) in enumerate(parts.text_encoders.items(), 1):
        prefix = f"lora_te{number}" if len(parts.text_encoders) > 1 else "lora_te"
        inside = _inside(encoder, chosen.text, chosen.endings, (), part, norms)
        found += [replace(t, key=f"{prefix}_{_flat(_whole(t.path))}") for t in inside]
    unet = _inside(parts.denoiser, chosen.denoiser, chosen.endings, chosen.names, "denoiser", norms)
    return found + [replace(t, key=f"lora_unet_{_flat(named(t.path))}", block=block_of(t.path)) for t in unet]


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
    """Yield the module as a target without its name, where it is of a kind that can be trained."""
    kind = "linear"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        kind = "norm"
        if not norms or module.weight is None:
            return
    elif isinstance(module, nn.Conv2d):
        kind = "linear" if module.kernel_size == (1, 1) else "conv"
    elif not isinstance(module, nn.Linear):
        return
    yield Target(part, path, "", kind)


def _whole(path: str) -> str:
    """Return a text encoder's path as it was before transformers 5 dropped the outer module."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def _flat(path: str) -> str:
    return path.replace(".", "_")
