"""Networks by how they change a weight: the table of what each is made of.

A method says how its tensors begin, what they add to the weight, and by what that is scaled. A LoRA without
DoRA or Tucker form, and DyLoRA, have cheaper ways (lora.py, dylora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from . import full, glora, ia3, loha, lokr, lora, norm, oft
from .shapes import Shape
from .shares import Start, Tensors

Weight = Callable[[], torch.Tensor]  # the frozen weight in float32, brought where it is needed


@dataclass(frozen=True)
class Options:
    """What the networks can be told beside rank and alpha; see the settings of these names."""

    dora_wd: bool = False
    wd_on_output: bool = False
    use_tucker: bool = False
    rs_lora: bool = False
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    unit: int = 1
    constraint: float = 0.0
    rescaled: bool = False


@dataclass(frozen=True)
class Method:
    """A network: how its tensors begin (None where a layer cannot be), its update, the rank that scales it.

    ``marks`` are names that only its files have. ``limited`` are the tensors that share the factor of
    scale_weight_norms, none where the reference has no such rule.
    """

    marks: tuple[str, ...]
    begin: Callable[[Shape, int, Options], dict[str, Start] | None]
    delta: Callable[[Tensors, Shape, Weight, float], torch.Tensor]  # (tensors, shape, W, alpha) -> dW
    rank_of: Callable[[Tensors], int | None] = lambda _: None
    limited: tuple[str, ...] = ()


def _tucker(shape: Shape, options: Options) -> bool:
    return options.use_tucker and shape.is_large


METHODS: Mapping[str, Method] = {
    "lora": Method(
        marks=(lora.UP,),
        begin=lambda shape, rank, o: lora.begin(
            rank, shape.outputs, shape.inputs, shape.kernel, _tucker(shape, o)
        ),
        delta=lambda t, *_: lora.delta(t),
        rank_of=lambda t: t[lora.DOWN].shape[0],
        limited=(lora.DOWN, lora.UP),
    ),
    "loha": Method(
        marks=("hada_w1_a",),
        begin=lambda shape, rank, o: loha.begin(shape, rank, _tucker(shape, o)),
        delta=lambda t, shape, *_: loha.delta(t, shape),
        rank_of=loha.rank_of,
        limited=("hada_w1_a",),
    ),
    "lokr": Method(
        marks=("lokr_w1", "lokr_w1_a"),
        begin=lambda shape, rank, o: lokr.begin(
            shape,
            rank,
            factor=o.factor,
            both=o.decompose_both,
            full=o.full_matrix,
            unbalanced=o.unbalanced_factorization,
            tucker=_tucker(shape, o),
        ),
        delta=lambda t, shape, *_: lokr.delta(t, shape),
        rank_of=lokr.rank_of,
        limited=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    "glora": Method(
        marks=("a1.weight",),
        begin=lambda shape, rank, o: glora.begin(shape, rank),
        delta=lambda t, shape, weight, _: glora.delta(t, weight()),
        rank_of=glora.rank_of,
    ),
    "oft": Method(
        marks=(oft.BLOCKS,),
        begin=lambda shape, rank, o: oft.begin_diagonal(shape, rank),
        delta=lambda t, shape, weight, alpha: oft.delta_diagonal(t, weight(), alpha * shape.outputs),
        limited=(oft.BLOCKS,),
    ),
    "boft": Method(
        marks=(oft.BLOCKS,),
        begin=lambda shape, rank, o: oft.begin_butterfly(shape, rank, o.rescaled),
        delta=lambda t, shape, weight, alpha: oft.delta_butterfly(t, weight(), alpha * shape.outputs),
        limited=(oft.BLOCKS,),
    ),
    "ia3": Method(
        marks=(ia3.ON_INPUT,),
        begin=lambda shape, rank, o: ia3.begin(shape, on_input=False),
        delta=lambda t, shape, weight, _: ia3.delta(t, weight()),
    ),
    "full": Method(
        marks=(full.WEIGHT,),
        begin=lambda shape, rank, o: full.begin(shape),
        delta=lambda t, *_: full.delta(t),
    ),
    "norm": Method(
        marks=(norm.WEIGHT,),
        begin=lambda shape, rank, o: norm.begin(shape),
        delta=lambda t, *_: t[norm.WEIGHT],
    ),
}
SAME_AS = {"locon": "lora", "dylora": "lora"}  # other ways to train what is a LoRA in the file
WITH_DORA = ("lora", "locon", "loha", "lokr")
WITH_RANK_DROPOUT = ("lora", "locon", "loha", "lokr", "full")
WITH_TUCKER = ("lora", "locon", "loha", "lokr")
