"""Build a module on the meta device from weights that tell its shape, and give it those weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import LoraGraftError, listed

Built = TypeVar("Built", bound=nn.Module)
Tensors = Mapping[str, torch.Tensor]


def built(what: str, family: str, build: Callable[[], Built]) -> Built:
    """Call ``build`` on the meta device; weights that tell no shape, or an impossible one: LG-BASE-003."""
    try:
        with torch.device("meta"):
            return build()
    except LoraGraftError:
        raise
    except KeyError as error:
        raise unfit(what, family, f"missing: {error.args[0]}") from error
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise unfit(what, family, f"shapes that make no {what}: {error}") from error


def assign(module: nn.Module, sd: Tensors, what: str, family: str) -> None:
    """Give a module its weights without a copy and freeze it; raises LG-BASE-003 unless all fit."""
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    faults = {
        "missing": [k for k in shapes if k not in sd],
        "unknown": [k for k in sd if k not in shapes],
        "of another shape": [k for k, v in sd.items() if k in shapes and v.shape != shapes[k]],
    }
    if any(faults.values()):
        raise unfit(what, family, "; ".join(f"{k}: {listed(v, limit=3)}" for k, v in faults.items() if v))
    module.load_state_dict(dict(sd), assign=True)
    module.requires_grad_(False)


def unfit(what: str, family: str, where: str) -> LoraGraftError:
    """Return the refusal of weights that are not whole, or another model's."""
    return LoraGraftError(
        "LG-BASE-003",
        f"The {what}'s weights are not complete, or not those of {family}.",
        where=where,
        why="a module would keep random weights.",
        fix=f"use a complete checkpoint of {family} (denoiser, VAE and text encoder)",
    )


def check_tokenizer(tokenizer: Any, rows: int, what: str = "text encoder") -> None:
    """Raise LG-BASE-006 for a tokenizer that has not ``rows`` entries, one for each of the embeddings."""
    if len(tokenizer) != rows:
        raise LoraGraftError(
            "LG-BASE-006",
            f"The tokenizer has {len(tokenizer)} entries, the {what} {rows}.",
            where="tokenizer",
            why="captions would be read as other words than the base model learnt.",
            fix="name the tokenizer folder that belongs to this base model",
        )


def first(sd: Tensors, ending: str) -> torch.Tensor:
    """Return the first tensor whose name ends so; KeyError if there is none."""
    for name in sd:
        if name.endswith(ending):
            return sd[name]
    raise KeyError(ending)


def count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the highest number that the pattern's group finds in the names."""
    return 1 + max((int(m[1]) for k in names if (m := re.match(pattern, k))), default=-1)
