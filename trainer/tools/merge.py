"""Merge LoRAs into one LoRA, each at its own ratio.

concat: the ranks are added, and the change is exactly the sum of ratio (alpha / r) up down.
svd:    that sum, brought to one rank by its largest singular values; takes any mixture of ranks.
add:    kohya's merge_lora for equal ranks: downs are added, and ups are, each times sqrt(alpha / alpha0)
        ratio. The product of sums is not the sum of products, so that the result differs from both LoRAs
        used together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters.files import compact
from ..errors import LoraGraftError, listed
from ..metadata import MODULE, lora_module
from .architecture import architecture_of
from .convert import to_common
from .deltas import KOHYA, as_plain, finite, require_sums
from .lora_file import PLAIN, LoraFile, Module, require_plain
from .resize import one_or_dynamic, svd_of_product

Part = tuple[Module, float]  # a LoRA's module and its ratio
# What is told of the trained base: files that differ in it do not belong together.
BASE_KEYS = ("ss_base_model_version", "ss_v2")


@dataclass(frozen=True)
class MergeSettings:
    """How modules are merged; ``rank`` and ``conv_rank`` (None: the same) are for svd alone."""

    method: str = "concat"
    rank: int | None = None
    conv_rank: int | None = None


def merge_loras(files: Sequence[LoraFile], ratios: Sequence[float], settings: MergeSettings) -> LoraFile:
    """Return one LoRA of several, under kohya's names; raises LG-TOOL-003, -005, -009."""
    _check(files, ratios, settings)
    common = [to_common(file) for file in files]
    for file in common:
        (require_sums if settings.method == "svd" else require_plain)(file, "Merging LoRAs")
    _check_bases(common)
    names = dict.fromkeys(name for file in common for name in file.modules)
    modules = {}
    for name in names:
        parts = [
            (as_plain(f.modules[name]), r) for f, r in zip(common, ratios, strict=True) if name in f.modules
        ]
        _check_shapes(name, [module for module, _ in parts])
        modules[name] = METHODS[settings.method](parts, settings)
    return LoraFile(modules, _metadata(files, common, ratios, modules, settings), "merged")


def concat(parts: Sequence[Part], settings: MergeSettings) -> Module:
    """Put the factors side by side: up (out, sum of ranks), each column with its own ratio and scale."""
    up, down = _exact(parts)
    return _module(parts[0][0], up, down, 1.0)


def svd(parts: Sequence[Part], settings: MergeSettings) -> Module:
    """Bring the exact sum to one rank."""
    up, down = _exact(parts)
    large = parts[0][0].shape()[2:] not in ((), (1, 1))
    most = settings.conv_rank if large and settings.conv_rank is not None else settings.rank
    u, s, vh = svd_of_product(up, down)
    rank = min(int(most or 1), len(s))
    return _module(parts[0][0], (u[:, :rank] * s[:rank]).float(), vh[:rank].float(), 1.0)


def add(parts: Sequence[Part], settings: MergeSettings) -> Module:
    """Add the factors as kohya's merge_lora does; the sign of a negative ratio goes to down alone."""
    first = parts[0][0]
    if len({module.rank for module, _ in parts}) > 1:
        raise LoraGraftError(
            "LG-TOOL-009",
            "LoRAs of different ranks cannot be added factor by factor.",
            where=f"{first.name}: ranks {', '.join(str(module.rank) for module, _ in parts)}",
            why="their matrices have different shapes.",
            fix="use the method concat, or svd with a rank",
        )
    if min(module.alpha for module, _ in parts) <= 0:
        raise LoraGraftError(
            "LG-TOOL-009",
            "A LoRA whose alpha is not above 0 cannot be added factor by factor.",
            where=f"{first.name}: alphas {', '.join(f'{module.alpha:g}' for module, _ in parts)}",
            why="the factors are brought to one scale by the square root of the alphas' ratio.",
            fix="use the method concat, or svd with a rank",
        )
    scales = [math.sqrt(module.alpha / first.alpha) * ratio for module, ratio in parts]
    pairs = [module.factors() for module, _ in parts]
    up = torch.stack([u * abs(s) for (u, _), s in zip(pairs, scales, strict=True)]).sum(0)
    down = torch.stack([d * s for (_, d), s in zip(pairs, scales, strict=True)]).sum(0)
    return _module(first, up, down, first.scale)


METHODS: dict[str, Callable[[Sequence[Part], MergeSettings], Module]] = {
    "concat": concat,
    "svd": svd,
    "add": add,
}


def _exact(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(module.factors(), ratio * module.scale) for module, ratio in parts]
    for (module, _), (factors, _) in zip(parts, pairs, strict=True):
        for factor in factors:
            finite(factor, module)
    return torch.cat([up * s for (up, _), s in pairs], 1), torch.cat([down for (_, down), _ in pairs], 0)


def _module(like: Module, up: torch.Tensor, down: torch.Tensor, scale: float) -> Module:
    plain = replace(like, kind=PLAIN, tensors={**like.tensors, "alpha": torch.tensor(0.0)}, endings=KOHYA)
    return plain.with_factors(up, down, scale)


def _check(files: Sequence[LoraFile], ratios: Sequence[float], settings: MergeSettings) -> None:
    reason = None
    if len(files) < 2:
        reason = "merging needs two LoRAs or more."
    elif len(ratios) != len(files):
        reason = f"there are {len(files)} LoRAs and {len(ratios)} ratios."
    elif not all(math.isfinite(r) for r in ratios):
        reason = "a ratio is no number."
    elif settings.method not in METHODS:
        reason = f"the method {settings.method[:30]!r} is none of {', '.join(METHODS)}."
    elif settings.method == "svd" and (
        settings.rank is None or settings.rank < 1 or (settings.conv_rank or 1) < 1
    ):
        reason = "svd needs a rank of at least 1."
    elif settings.method != "svd" and (settings.rank is not None or settings.conv_rank is not None):
        reason = f"{settings.method} takes no rank: it follows from the files."
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            "The LoRAs cannot be merged so.",
            where=f"{len(files)} files, method {settings.method}, rank {settings.rank}",
            why=reason,
            fix="for instance two files, ratios 0.7 and 0.5, method concat; or method svd with rank 32",
        )


def _check_bases(files: Sequence[LoraFile]) -> None:
    told = [{key: f.metadata[key] for key in BASE_KEYS if key in f.metadata} for f in files]
    kinds = [architecture_of(file.modules) for file in files]
    differs = [k for k in BASE_KEYS if len({t[k] for t in told if k in t}) > 1]
    if len(set(kinds)) > 1 or differs:
        raise LoraGraftError(
            "LG-TOOL-009",
            "The LoRAs belong to different kinds of base model.",
            where=listed(
                f"{file.name}: {said.get('ss_base_model_version', kind)}"
                for file, said, kind in zip(files, told, kinds, strict=True)
            ),
            why="no model could use the result.",
            fix="merge LoRAs that were trained on one architecture",
        )


def _check_shapes(name: str, modules: Sequence[Module]) -> None:
    shapes = list(dict.fromkeys(module.shape() for module in modules))
    if len(shapes) > 1:
        raise LoraGraftError(
            "LG-TOOL-009",
            "A module has different shapes in the LoRAs.",
            where=f"{name}: {listed(str(shape) for shape in shapes)}",
            why="they were trained on different base models.",
            fix="merge LoRAs that were trained on one architecture",
        )


def _metadata(
    files: Sequence[LoraFile],
    common: Sequence[LoraFile],
    ratios: Sequence[float],
    modules: Mapping[str, Module],
    settings: MergeSettings,
) -> dict[str, str]:
    kept = (*BASE_KEYS, MODULE, "modelspec.architecture", "modelspec.prediction_type")
    result = {
        key: next(f.metadata[key] for f in common if key in f.metadata)
        for key in (*kept, "modelspec.implementation", "modelspec.sai_model_spec", "modelspec.resolution")
        if any(key in f.metadata for f in common)
    }
    return result | {
        MODULE: lora_module(result),
        "ss_network_dim": one_or_dynamic({m.rank for m in modules.values()}),
        "ss_network_alpha": one_or_dynamic({m.alpha for m in modules.values()}),
        "modelspec.merged_from": ", ".join(file.name.removesuffix(".safetensors") for file in files),
        "loragraft_merged": compact(
            {"files": [file.name for file in files], "ratios": list(ratios), "method": settings.method}
        ),
    }
