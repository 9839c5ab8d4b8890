"""The change that a module of a LoRA file makes to the base's weight, for each network type.

LoRA, LoHa, LoKr and full changes are tensors by themselves. GLoRA, OFT and BOFT, and any type with DoRA's
lengths beside it, need the weight that they change; what also changes a bias, or a normalisation layer, the
layer. The formulas are those of ``adapters``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..adapters import dora, full, glora, ia3, loha, lokr, norm, oft
from ..adapters.shapes import Shape
from ..errors import LoraGraftError, listed, one_line
from .lora_file import PLAIN, LoraFile, Module

Tensors = Mapping[str, torch.Tensor]
# Names of U-Net modules with a 3x3 kernel, and of those with a 1x1 one in every architecture.
LARGE = re.compile(
    r"resnets_\d+_conv\d$|samplers_\d+_conv$|_in_layers_2$|_out_layers_3$|blocks_\d+_\d+_(op|conv)$"
)
SMALL = re.compile(r"_conv_shortcut$|_skip_connection$")
KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "alpha": ".alpha"}


def delta(module: Module, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the change in the weight's shape, float32; some types need the base's ``weight`` (float32).

    Without it a kernel that no tensor tells is taken from the module's name. Raises LG-TOOL-003 for a type
    that needs the weight and gets none, or that changes something else, LG-TOOL-002 where tensors are
    missing or do not fit together.
    """
    if module.kind not in (ON_WEIGHT if weight is not None else FREE):
        raise refusal([module], "This")
    try:
        return _delta(module, weight)
    except (KeyError, IndexError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise LoraGraftError(
            "LG-TOOL-002",
            f"The {module.kind} module's tensors do not make a change of a weight.",
            where=module.name[:200],
            why=f"they are not all there, or of shapes that do not fit: {one_line(str(error), 120)}.",
            fix="use a complete file, and for a checkpoint one that was trained on its kind",
        ) from error


def _delta(module: Module, weight: torch.Tensor | None) -> torch.Tensor:
    tensors = {role: t if role == "alpha" else t.float() for role, t in module.tensors.items()}
    if weight is not None and module.kind in WITH_WEIGHT:
        change = WITH_WEIGHT[module.kind](module, tensors, weight)
    else:
        kernel = kernel_of(module.name) if weight is None else tuple(weight.shape[2:])
        change = FREE[module.kind](module, tensors, kernel)
    if weight is not None:
        change = change.reshape(weight.shape)
    if not module.has_magnitude:
        return change
    if weight is None:
        raise refusal([module], "This")
    return dora.change(
        weight, change, tensors["magnitude"].reshape(_magnitude_shape(tensors["magnitude"], weight))
    )


def bias_change(module: Module) -> torch.Tensor | None:
    """Return the change of the layer's bias, float32; None where the module leaves it alone."""
    found = next((module.tensors[role] for role in (full.BIAS, norm.BIAS) if role in module.tensors), None)
    return None if found is None else found.float()


def kernel_of(name: str) -> tuple[int, ...]:
    """Return the kernel of a U-Net's module by its name: () for a linear layer."""
    if LARGE.search(name):
        return (3, 3)
    return (1, 1) if SMALL.search(name) else ()


def plain_factors(module: Module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return up (out, r), down (r, in * k * k) and scale of any change that needs no base."""
    if module.kind == PLAIN:
        up, down = module.factors()
        return finite(up, module), finite(down, module), module.scale
    u, s, vh = torch.linalg.svd(finite(delta(module), module).flatten(1).double(), full_matrices=False)
    return (u * s).float(), vh.float(), 1.0


def finite(values: torch.Tensor, module: Module) -> torch.Tensor:
    """Return the values; raises LG-TOOL-002 for NaN and infinity, which nothing can take apart."""
    if bool(torch.isfinite(values).all()):
        return values
    raise LoraGraftError(
        "LG-TOOL-002",
        "A module holds NaN or infinity.",
        where=module.name[:200],
        why="such values have no singular values; the file draws black or broken images.",
        fix="use an earlier save of the training; Check LoRA names all such tensors",
    )


def as_plain(module: Module) -> Module:
    """Return the module as a LoRA of full rank that makes the same change; a LoRA as it is."""
    if module.kind == PLAIN:
        return module
    change = delta(module)
    up, down, _ = plain_factors(module)
    out, fan_in, *kernel = change.shape
    tensors = {
        "down": down.reshape(-1, fan_in, *kernel),
        "up": up.reshape(out, -1, *(1 for _ in kernel)),
        "alpha": torch.tensor(float(down.shape[0])),
    }
    return replace(module, kind=PLAIN, tensors=tensors, endings=KOHYA)


def require_sums(file: LoraFile, doing: str) -> None:
    """Raise LG-TOOL-003 where a module's change depends on the base, or is no sum onto its weight."""
    if others := [m for m in file.modules.values() if m.has_magnitude or m.kind not in FREE]:
        raise refusal(others, doing)


def refusal(modules: Sequence[Module], doing: str) -> LoraGraftError:
    """Return LG-TOOL-003 for modules of a type that cannot be handled so."""
    kinds = sorted({"DoRA" if m.has_magnitude else m.kind for m in modules})
    return LoraGraftError(
        "LG-TOOL-003",
        f"{doing} is not possible with {listed(kinds)}.",
        where=listed((m.name for m in modules), limit=2),
        why="such a module is no change that could be taken by itself, without the base model.",
        fix="merge a DoRA into its checkpoint, then extract a LoRA; use other types as they are",
    )


def _lora(module: Module, t: Tensors, kernel: tuple[int, ...]) -> torch.Tensor:
    up, down = module.factors()
    return (up @ down).reshape(module.shape()) * module.scale


def _loha(module: Module, t: Tensors, kernel: tuple[int, ...]) -> torch.Tensor:
    if "hada_t1" in t:
        shape = Shape(t["hada_w1_a"].shape[1], t["hada_w1_b"].shape[1], tuple(t["hada_t1"].shape[2:]))
    else:
        shape = Shape(t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1] // math.prod(kernel), kernel)
    return loha.delta(t, shape) * _scale(t, loha.rank_of(t))


def _lokr(module: Module, t: Tensors, kernel: tuple[int, ...]) -> torch.Tensor:
    rows, columns = (
        t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
    )
    if "lokr_w2" in t:
        more_rows, more_columns, *side = t["lokr_w2"].shape
        kernel = tuple(side) or kernel
        more_columns = more_columns if side else more_columns // math.prod(kernel)
    elif "lokr_t2" in t:
        more_rows, more_columns = t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1]
        kernel = tuple(t["lokr_t2"].shape[2:])
    else:
        more_rows, more_columns = t["lokr_w2_a"].shape[0], t["lokr_w2_b"].shape[1] // math.prod(kernel)
    return lokr.delta(t, Shape(rows * more_rows, columns * more_columns, kernel)) * _scale(t, lokr.rank_of(t))


def _full(module: Module, t: Tensors, kernel: tuple[int, ...]) -> torch.Tensor:
    if "diff_b" in t:
        raise refusal([module], "Changing a bias")
    if t["diff"].ndim < 2:
        raise ValueError("diff is no matrix")
    return t["diff"]


def _difference(module: Module, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight's difference as it is in the file; a file may change the bias alone."""
    return next((t[role] for role in (full.WEIGHT, norm.WEIGHT) if role in t), torch.zeros_like(weight))


def _ia3(module: Module, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    is_on = bool(t.get(ia3.ON_INPUT, torch.tensor(0)))
    return ia3.delta({k: v for k, v in t.items() if k != ia3.ON_INPUT or is_on}, weight)


def _glora(module: Module, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    return glora.delta(t, weight) * _scale(t, glora.rank_of(t))


def _oft(module: Module, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    limit = float(t.get("alpha", 0.0)) * weight.shape[0]
    turned = oft.delta_diagonal if t[oft.BLOCKS].ndim == 3 else oft.delta_butterfly
    return turned(t, weight, limit)


def _scale(t: Tensors, rank: int | None) -> float:
    return float(t["alpha"]) / rank if "alpha" in t and rank is not None else 1.0


def _magnitude_shape(magnitude: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    """Return (out, 1, ...) or (1, in, ...) for the lengths of rows or columns; a vector holds rows'."""
    ones = (1,) * (weight.ndim - 2)
    columns = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]
    return (1, weight.shape[1], *ones) if columns else (weight.shape[0], 1, *ones)


Free = Callable[[Module, Tensors, "tuple[int, ...]"], torch.Tensor]
FREE: dict[str, Free] = {PLAIN: _lora, "LoHa": _loha, "LoKr": _lokr, "Full": _full}
OfWeight = Callable[[Module, Tensors, torch.Tensor], torch.Tensor]
WITH_WEIGHT: dict[str, OfWeight] = {
    "GLoRA": _glora,
    "OFT": _oft,
    "Full": _difference,
    "Norm": _difference,
    "IA3": _ia3,
}
# What can be computed where the base's layer is known; `bias_change` is what else it adds there.
ON_WEIGHT = (*FREE, *WITH_WEIGHT)
