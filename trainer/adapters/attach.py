"""A saved LoRA of any network put on a base model, whoever trained it, or taken as the start of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from ..contradictions.refusals import contradiction
from ..engine.frozen import dense
from ..errors import LoraGraftError, listed, one_line
from ..parts import Parts, Target
from . import ia3, lora, oft
from .change import Change
from .dylora import Nested
from .lora import LowRank
from .methods import METHODS
from .network import Adapted, Adapter, find, put, remove
from .settings import Rank
from .shares import Rows, Share, Tensors

# A module's key, which may have dots, and a tensor's name behind it, of which few have one.
NAME = re.compile(r"(.+?)\.((?:lora_\w+|[ab][12])\.weight|[^.]+)")


def attach(parts: Parts, tensors: Tensors, targets: Sequence[Target]) -> Adapter:
    """Put a saved LoRA on the modules it names; raises LG-SAVE-006 if a tensor fits no module."""
    by_module, adapted, used, rows = grouped(tensors), [], set[str](), Rows()
    for target in targets:
        own = by_module.get(target.key)
        share = None if own is None else share_from(find(parts, target), own, target.key)
        if own is None or share is None:
            continue
        adapted.append(Adapted(target, put(parts, target, [share], rows), share))
        used.update(f"{target.key}.{name}" for name in own)
    adapter = Adapter(adapted, rows)
    try:
        _check_used(tensors, used)
    except LoraGraftError:
        remove(parts, adapter)
        raise
    return adapter


def grouped(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """Sort a file's tensors by their module's key: {key: {name behind the key: tensor}}."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        found = NAME.fullmatch(full_name)
        key, name = (found[1], found[2]) if found else (full_name, "")
        result.setdefault(key, {})[name] = tensor
    return result


def method_of(own: Tensors) -> str | None:
    """Say which network a module's tensors belong to; None if to none."""
    if oft.BLOCKS in own:
        return {3: "oft", 4: "boft"}.get(own[oft.BLOCKS].ndim)
    return next((name for name, method in METHODS.items() if any(m in own for m in method.marks)), None)


def share_from(base: nn.Module, own: Tensors, key: str) -> Share | None:
    """Return the share that a module's tensors in a file make; None where they do not fit the layer."""
    method, values = method_of(own), dict(own)
    if method is None:
        return None
    try:
        alpha = float(values.pop("alpha", 0.0))
        on_input = bool(values.pop(ia3.ON_INPUT, False))
        if method == "lora" and values.keys() == {lora.DOWN, lora.UP}:
            rank = values[lora.DOWN].shape[0]
            low = LowRank(base, rank, alpha if "alpha" in own else float(rank), key)
            low.down.data.copy_(_exactly(values[lora.DOWN], low.down))
            low.up.data.copy_(_exactly(values[lora.UP], low.up))
            return low
        if alpha == 0 and method not in ("oft", "boft"):
            alpha = float(METHODS[method].rank_of(values) or 1)
        share = Change(method, base, values, alpha=alpha, key=key, on_input=on_input)
        share.try_out(base)
        return share
    except (KeyError, RuntimeError, IndexError, ValueError, ZeroDivisionError):
        return None


def start_from(adapter: Adapter, tensors: Tensors, where: str, *, takes_ranks: bool) -> list[str]:
    """Copy a file's tensors into a run's modules; return lines for the log.

    Raises LG-SAVE-006 for a tensor that fits none, LG-CFG-004 where ranks or alphas differ.
    """
    by_module, used = grouped(tensors), set[str]()
    anew = 0
    for m in adapter.modules:
        own = by_module.get(m.target.key)
        if own is None:
            anew += 1
            continue
        _take(m, own, where, takes_ranks=takes_ranks)
        used.update(f"{m.target.key}.{name}" for name in own)
    _check_used(tensors, used)
    lines = [f"starts from {where}: {len(adapter.modules) - anew} modules"]
    return [*lines, f"{anew} modules are not in {where} and start from nothing"] if anew else lines


def ranks_in(tensors: Tensors) -> dict[str, Rank]:
    """Return rank and alpha of each module of a file, by its key."""
    result: dict[str, Rank] = {}
    for key, own in grouped(tensors).items():
        try:
            result[key] = _rank_in(own)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise LoraGraftError(
                "LG-SAVE-006",
                "A module of the LoRA is not whole, or of no known network.",
                where=one_line(key, 120),
                why=f"its rank cannot be told: {one_line(str(error), 120)}.",
                fix="use a complete file, or switch dim_from_weights off",
            ) from error
    return result


def _rank_in(own: Tensors) -> Rank:
    method = method_of(own)
    rank = METHODS[method].rank_of(own) if method else None
    if oft.BLOCKS in own:
        rank = own[oft.BLOCKS].shape[-1]
    elif method == "lokr" and rank is None:
        rank = int(own["alpha"]) if "alpha" in own else None  # LyCORIS writes the rank that was asked for
    return rank or 1, float(own["alpha"]) if "alpha" in own else float(rank or 1)


def _take(m: Adapted, own: Tensors, where: str, *, takes_ranks: bool) -> None:
    share, values = m.share, dict(own)
    alpha = values.pop("alpha", None)
    if isinstance(share, Change) and share.name == "ia3":
        values, mine = _factors(m, own), dict[str, torch.Tensor](share.tensors)
    else:
        mine = share.saved(m.module.base)
        mine.pop("alpha", None)
    unfit = sorted(values.keys() ^ mine.keys()) or [n for n in mine if mine[n].shape != values[n].shape]
    if not unfit and share.rank and alpha is not None and not takes_ranks:
        unfit = ["alpha"] if abs(float(alpha) - share.alpha) > 1e-3 * max(1.0, share.alpha) else []
    if unfit:
        raise contradiction(
            f"network_weights does not have the shapes of this network: {m.target.key}.{unfit[0]}.",
            where,
            why=f"the file has {_told(own)}; the settings ask for rank {share.rank}, alpha {share.alpha:g}.",
            fix="switch dim_from_weights on to take ranks and alphas from the file, or set the file's own",
        )
    with torch.no_grad():
        if isinstance(share, Nested):
            share.load(values[lora.DOWN], values[lora.UP])
            return
        for name, tensor in share.tensors.items():
            tensor.copy_(values[name])


def _factors(m: Adapted, own: Tensors) -> dict[str, torch.Tensor]:
    """Return ia3's factors from a file; {} where they are another network's."""
    try:
        values = ia3.loaded(own, dense(m.module.base, torch.float32).cpu())
    except KeyError:
        return {}
    cast(Change, m.share).on_input = bool(values.pop(ia3.ON_INPUT))
    return values


def _told(own: Tensors) -> str:
    method = method_of(own)
    if method is None:
        return "tensors of no known network"
    rank = METHODS[method].rank_of(own)
    alpha = f", alpha {float(own['alpha']):g}" if "alpha" in own else ""
    return f"{method}, rank {rank}{alpha}" if rank else f"{method}{alpha}"


def _exactly(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if tensor.shape != like.shape:
        raise RuntimeError("another shape")
    return tensor


def _check_used(tensors: Mapping[str, torch.Tensor], used: set[str]) -> None:
    unused = [name for name in tensors if name not in used]
    if unused:
        raise LoraGraftError(
            "LG-SAVE-006",
            f"{len(unused)} of the LoRA's {len(tensors)} tensors fit no module of this base model.",
            where=listed(unused, limit=3),
            why="they would have no effect.",
            fix="use the base model that the LoRA was trained on, or one of the same architecture",
        )
