"""Weights as ComfyUI and ComfyUI-GGUF hold them, quantised or not; the trainer unpacks layer by layer.

ComfyUI's quantised ones (fp8, int8 and the like) lie in a module's state dict as in a file: codes, and scales
beside them. A GGUF layer's state dict is only a sketch without values; its weight is a tensor of raw blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..trainer.engine.ggml import BLOCK_TYPES
from ..trainer.engine.packed_tensor import PackedTensor
from ..trainer.engine.storage import Packed
from ..trainer.errors import LoraGraftError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What plain tensors may hold: values, and codes of quantised ones, which scales or a description lie beside.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's tensors by name, as they are held."""
    own = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    for name, weight in module.state_dict().items():
        if is_ggml(own.get(name)):
            yield name, own[name]
        elif name in own or weight.device.type != "meta":  # the sketch has room for work among its names
            yield name, weight


def is_ggml(weight: Any) -> bool:
    """Say whether a tensor is one of ComfyUI-GGUF's."""
    return hasattr(weight, "tensor_type") and hasattr(weight, "tensor_shape")


def shared(weight: torch.Tensor, socket: str, name: str) -> torch.Tensor:
    """Return a normal tensor on the storage of ``weight``, packed if it is; raises LG-NODE-004, -005."""
    _check_there(weight, socket, name)
    if is_ggml(weight):
        kind = _ggml_kind(weight)
        if kind in PLAIN or kind in BLOCK_TYPES:
            return _values_or_blocks(weight, kind)
    elif type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in (*FLOATS, *CODES):
        return view_of(weight)
    raise _quantised(
        weight,
        socket,
        name,
        why="of quantised weights, ComfyUI's own and the common types of GGUF files are read.",
        fix="load the fp8, fp16 or bf16 version of this checkpoint with ComfyUI's own loader",
    )


def plain(weight: torch.Tensor, socket: str, name: str) -> torch.Tensor:
    """Return `shared` for a weight that is not quantised; raises LG-NODE-004 for any other, and -005."""
    _check_there(weight, socket, name)
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in FLOATS:
        raise _quantised(
            weight,
            socket,
            name,
            why="a quantised (fp8, GGUF, int8, fp4) model of this family cannot be trained on.",
            fix="load the fp16, bf16 or fp32 version of this checkpoint with the ordinary loader",
        )
    return view_of(weight)


def _check_there(weight: torch.Tensor, socket: str, name: str) -> None:
    if weight.device.type == "meta":
        raise LoraGraftError(
            "LG-NODE-005",
            f"The {socket} lacks weights.",
            where=f"{socket}: {name}",
            why="its loader left them out, or another extension keeps them elsewhere.",
            fix="load a complete checkpoint with ComfyUI's own loader",
        )


def _quantised(weight: torch.Tensor, socket: str, name: str, *, why: str, fix: str) -> LoraGraftError:
    kind = _ggml_kind(weight) if is_ggml(weight) else str(weight.dtype).removeprefix("torch.")
    return LoraGraftError(
        "LG-NODE-004",
        f"The {socket} is quantised ({type(weight).__name__}, {kind}).",
        where=f"{socket}: {name}",
        why=why,
        fix=fix,
    )


def view_of(weight: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor on the same storage, out of inference mode.

    An inference tensor cannot be saved for backward; a new tensor on the same storage can.
    """
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return view.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())


def _ggml_kind(weight: Any) -> str:
    return "F32" if weight.tensor_type is None else str(weight.tensor_type.name)


def _values_or_blocks(weight: Any, kind: str) -> torch.Tensor:
    """Return the values of a GGUF tensor where it is not quantised or a vector, else a packed tensor."""
    raw, shape = view_of(weight.as_subclass(torch.Tensor)), torch.Size(weight.tensor_shape)
    if kind in PLAIN:
        return raw.view(PLAIN[kind]).view(shape)
    blocks = raw.view(torch.uint8).reshape(-1, BLOCK_TYPES[kind].size)
    packed = Packed(kind, shape, {"blocks": blocks})
    return PackedTensor(packed) if len(shape) > 1 else packed.unpack(torch.float32)
