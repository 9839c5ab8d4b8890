"""A packed weight that looks like a plain tensor of its values, to all code that does not ask.

State dicts hold it, so that a quantised file goes the way that every base goes: families look at shapes, take
rows, and assign it to a module. What only moves or cuts the weight keeps it packed; every other operation
unpacks it, for its own time. Layers get the packed weight itself when they are frozen, see `frozen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .storage import Packed, stacked

aten = torch.ops.aten
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


class PackedTensor(torch.Tensor):
    """A weight (rows, ...) that is ``packed``, seen as ``dtype``, in which it is unpacked where need be.

    It cannot be written to: an operation that would raises TypeError.
    """

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype = torch.float32) -> PackedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=dtype, device=packed.device)
        made.packed = packed
        return made

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write to a packed weight")
        kept = _kept_packed(func, args, kwargs or {})
        if kept is not None:
            return kept
        args, kwargs = tree_map_only(PackedTensor, unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({self.packed.storage}, {tuple(self.shape)}, {self.dtype})"


def unpacked(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a packed tensor, in new memory; of a plain one, the tensor itself."""
    return tensor.packed.unpack(tensor.dtype) if isinstance(tensor, PackedTensor) else tensor


def held(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors whose memory a weight takes: itself, or what it is packed in."""
    return list(tensor.packed.buffers()) if isinstance(tensor, PackedTensor) else [tensor]


def moved(packed: Packed, device: torch.device | None) -> Packed:
    """Return a packed weight on a device, its own where it is there already; nothing is written to."""
    if device is None or packed.device == device:
        return packed
    tensors = {name: t.to(device) for name, t in packed.named_buffers()}
    return Packed(packed.storage, packed.shape, tensors)


def _kept_packed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the result of what only moves, cuts or looks up a weight; None for all else."""
    made: Packed | None = None
    first = args[0][0] if func is aten.cat.default and args[0] else args[0]
    if not isinstance(first, PackedTensor):
        return None
    packed, dtype = first.packed, first.dtype
    if func in (aten.detach.default, aten.alias.default):
        made = packed
    elif func in RESHAPES:
        made = packed.as_shape(func(torch.empty(packed.shape, device="meta"), *args[1:], **kwargs).shape)
    elif func is aten.slice.Tensor:
        made = _rows(packed, *args[1:], **kwargs)
    elif func is aten.cat.default and all(isinstance(t, PackedTensor) for t in args[0]):
        along = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        made = stacked([t.packed for t in args[0]]) if along == 0 else None
    elif func is aten._to_copy.default and kwargs.get("dtype") in (None, dtype):
        made = moved(packed, kwargs.get("device"))
    elif func is aten.embedding.default:
        return packed.lookup(args[1], dtype)
    elif func is aten._to_copy.default:
        return packed.unpack(kwargs["dtype"]).to(device=kwargs.get("device"))
    return None if made is None else PackedTensor(made, dtype)


def _rows(
    packed: Packed, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Packed | None:
    if dim != 0 or step != 1:
        return None
    first, last, _ = slice(start, stop).indices(packed.shape[0])
    return packed.rows(first, max(first, last))
