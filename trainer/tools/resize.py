"""Change a LoRA's rank: keep the largest singular values of each module's change.

S are the singular values of up @ down in falling order. A fixed rank keeps so many; the dynamic methods count
how many are needed: sv_ratio those above S0 / p, sv_fro those whose squares make p^2 of the sum of squares,
sv_cumulative those that make p of the sum. The counts and the one that is added to them are those of
kohya's resize_lora, and so is alpha: the scale alpha / r stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import LoraGraftError
from ..metadata import MODULE, lora_module
from .deltas import as_plain, finite, require_sums
from .lora_file import LoraFile, Module

MIN_SV = 1e-6  # a module whose largest singular value is not above this is empty


def by_ratio(values: torch.Tensor, p: float) -> int:
    """Count the singular values above S0 / p; p >= 1."""
    return int((values > values[0] / p).sum())


def by_fro(values: torch.Tensor, p: float) -> int:
    """Count those that make p (0 to 1) of the Frobenius norm, plus one."""
    squares = values.square().cumsum(0) / values.square().sum()
    return int(torch.searchsorted(squares, p**2)) + 1


def by_cumulative(values: torch.Tensor, p: float) -> int:
    """Count those that make p (0 to 1) of the sum, plus one."""
    return int(torch.searchsorted(values.cumsum(0) / values.sum(), p)) + 1


METHODS: dict[str, Callable[[torch.Tensor, float], int]] = {
    "sv_ratio": by_ratio,
    "sv_fro": by_fro,
    "sv_cumulative": by_cumulative,
}
FIXED, DYNAMIC = "fixed", "Dynamic"


@dataclass(frozen=True)
class ResizeSettings:
    """The most ranks a module may have, and how its rank is found; ``conv_rank`` None is ``new_rank``."""

    new_rank: int
    conv_rank: int | None = None
    method: str = FIXED
    param: float | None = None


@dataclass(frozen=True)
class Resized:
    """What became of one module; ``kept`` is the part of the Frobenius norm, ``error`` that of the change."""

    name: str
    old_rank: int
    rank: int
    alpha: float
    kept: float
    error: float

    def __str__(self) -> str:
        return f"{self.name}: rank {self.old_rank} -> {self.rank}, alpha {self.alpha:g}, {self.kept:.2%} kept"


def resize(
    file: LoraFile, settings: ResizeSettings, *, device: str = "cpu"
) -> tuple[LoraFile, list[Resized]]:
    """Return the file with other ranks and its metadata told so; LoHa, LoKr and full changes become LoRAs.

    Raises LG-TOOL-003, -005.
    """
    _check(settings)
    require_sums(file, "Resizing")
    done = {name: resize_module(module, settings, device) for name, module in file.modules.items()}
    report = [told for _, told in done.values()]
    modules = {name: module for name, (module, _) in done.items()}
    return replace(file, modules=modules, metadata=_metadata(file, settings, report)), report


def resize_module(module: Module, settings: ResizeSettings, device: str = "cpu") -> tuple[Module, Resized]:
    """Resize one module; a rank above the old one is not needed for the same change, so it is not taken."""
    module = as_plain(module)
    up, down = (finite(factor, module).to(device) for factor in module.factors())
    u, s, vh = svd_of_product(up, down)
    large = len(module.shape()) == 4
    most = settings.conv_rank if large and settings.conv_rank is not None else settings.new_rank
    full = torch.cat([s, s.new_zeros(min(up.shape[0], down.shape[1]) - len(s))])
    rank = min(choose_rank(full, settings.method, settings.param, most), module.rank, len(s))
    new = module.with_factors((u[:, :rank] * s[:rank]).float().cpu(), vh[:rank].float().cpu(), module.scale)
    total = float(s.square().sum().sqrt())
    kept = float(s[:rank].square().sum().sqrt()) / total if total > 0 else 1.0
    lost = float(s[rank:].square().sum().sqrt()) / total if total > 0 else 0.0
    return new, Resized(module.name, module.rank, rank, module.scale * rank, kept, lost)


def choose_rank(values: torch.Tensor, method: str, param: float | None, most: int) -> int:
    """Return the rank for singular values in falling order: as the method counts, 1 to ``most``."""
    if float(values[0]) <= MIN_SV:
        return 1
    if method == FIXED:
        return most
    count = METHODS[method](values, float(param or 0))
    return min(max(1, min(count, len(values) - 1)) + 1, most)


def svd_of_product(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (out, n), S (n,), Vh (n, in) of up @ down in float64 without making the product.

    up = Qu Ru and down' = Qd Rd, so that only Ru Rd', of the rank's size, is decomposed.
    """
    qu, ru = torch.linalg.qr(up.double())
    qd, rd = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(ru @ rd.T, full_matrices=False)
    return qu @ u, s, vh @ qd.T


def _check(settings: ResizeSettings) -> None:
    method, param = settings.method, settings.param
    reason = None
    if settings.new_rank < 1 or (settings.conv_rank is not None and settings.conv_rank < 1):
        reason = "a rank is at least 1."
    elif method not in (FIXED, *METHODS):
        reason = f"the method {method[:30]!r} is none of {', '.join((FIXED, *METHODS))}."
    elif method == FIXED and param is not None:
        reason = "a fixed rank takes no parameter."
    elif method == "sv_ratio" and (param is None or not 1 < param <= 1e9):
        reason = "sv_ratio needs a number above 1."
    elif method in ("sv_fro", "sv_cumulative") and (param is None or not 0 < param <= 1):
        reason = f"{method} needs a number above 0, at most 1."
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            "The LoRA cannot be resized so.",
            where=f"rank {settings.new_rank}, method {method}, parameter {param}",
            why=reason,
            fix="for instance rank 32, method sv_fro, parameter 0.9; or method fixed without a parameter",
        )


def _metadata(file: LoraFile, settings: ResizeSettings, report: list[Resized]) -> dict[str, str]:
    old = max(told.old_rank for told in report)
    conv = settings.conv_rank if settings.conv_rank not in (None, settings.new_rank) else None
    said = file.metadata.get("ss_training_comment", "")
    said = "" if said == "None" else said
    if settings.method == FIXED:
        comment = f"dimension is resized from {old} to {settings.new_rank}" + (
            f" (conv: {conv})" if conv else ""
        )
    else:
        comment = f"Dynamic resize with {settings.method}: {settings.param} from {old}"
    one = settings.method == FIXED
    return {
        **file.metadata,
        MODULE: lora_module(file.metadata),
        "ss_training_comment": f"{comment}; {said}",
        "ss_network_dim": one_or_dynamic({t.rank for t in report}) if one else DYNAMIC,
        "ss_network_alpha": one_or_dynamic({t.alpha for t in report}) if one else DYNAMIC,
    }


def one_or_dynamic(values: set[int] | set[float]) -> str:
    """Return the one value that all modules have, or kohya's word for several."""
    return str(next(iter(values))) if len(values) == 1 else DYNAMIC
