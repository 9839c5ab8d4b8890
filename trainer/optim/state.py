"""An optimizer's state as tensors and back, whatever it holds: tensors, numbers, lists, in its groups too.

Per tensor as in AdamW lie under ``optimizer.<number>.<name>``. All else (numbers, nested tensors, what an
adaptive optimizer keeps in its groups) is described by one JSON text, which lies beside them as bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

REST = "optimizer.rest"
NESTED = "optimizer.nested"
# Set by the loop at every step, or from the settings when the run is opened again.
SETTINGS = ("params", "lr", "base_lr", "fused", "foreach", "capturable", "differentiable")


def pack(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state, on the CPU; raises TypeError for a value of a kind that cannot be kept."""
    tensors: dict[str, torch.Tensor] = {}
    nested: list[torch.Tensor] = []
    states: dict[str, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and "." not in key and not _is_turned(value):
                tensors[f"optimizer.{number}.{key}"] = value.detach().cpu()
                if value.device == parameter.device:
                    continue
                states.setdefault(str(number), {})[key] = {"on": "cpu"}
            else:
                states.setdefault(str(number), {})[key] = _described(value, nested)
    groups = [
        {
            key: _described(value, nested)
            for key, value in group.items()
            if key not in SETTINGS and not _is_default(value, optimizer.defaults.get(key, pack))
        }
        for group in optimizer.param_groups
    ]
    tensors.update({f"{NESTED}.{n}": tensor for n, tensor in enumerate(nested)})
    if states or any(groups):
        text = json.dumps({"states": states, "groups": groups}).encode()
        tensors[REST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `pack` returned; raises KeyError, TypeError or ValueError where it does not fit."""
    rest = json.loads(bytes(tensors[REST].tolist())) if REST in tensors else {"states": {}, "groups": []}
    optimizer.state.clear()
    for number, parameter in enumerate(_parameters(optimizer)):
        prefix, described = f"optimizer.{number}.", rest["states"].get(str(number), {})
        state: dict[str, Any] = {}
        for name, tensor in tensors.items():
            key = name.removeprefix(prefix)
            if key != name:
                elsewhere = described.get(key) == {"on": "cpu"}
                state[key] = tensor.clone() if elsewhere else tensor.to(parameter.device, copy=True)
        for key, value in described.items():
            if value != {"on": "cpu"}:
                state[key] = _read(value, tensors, parameter.device)
        if state:  # a parameter that no gradient reached has none
            optimizer.state[parameter] = state
    groups = rest["groups"] or [{} for _ in optimizer.param_groups]
    for group, described in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if key not in SETTINGS]:  # what was not kept stood at its default
            if key in optimizer.defaults:
                group[key] = optimizer.defaults[key]
            else:
                del group[key]
        device = group["params"][0].device
        group.update({key: _read(value, tensors, device) for key, value in described.items()})


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return False
    return type(value) is type(default) and bool(value == default)


def _described(value: Any, nested: list[torch.Tensor]) -> Any:
    """Return a value as JSON holds it; the tensors in it go to ``nested``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value  # a float's shortest text is read back as the same float
    if isinstance(value, torch.Tensor):
        nested.append(value.detach().cpu().contiguous())
        found = {"tensor": len(nested) - 1, "cpu": value.device.type == "cpu"}
        # A product's last bits depend on how its factors lie in memory, and a file keeps no strides.
        return {**found, "stride": list(value.stride())} if _is_turned(value) else found
    if isinstance(value, deque):
        return {"deque": [_described(v, nested) for v in value], "longest": value.maxlen}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_described(v, nested) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_described(k, nested), _described(v, nested)] for k, v in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(f"the optimizer keeps a {type(value).__name__}, which no checkpoint can hold")


def _read(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[f"{NESTED}.{value['tensor']}"]
        tensor = tensor.clone() if value["cpu"] else tensor.to(device, copy=True)
        return _laid_out(tensor, value["stride"]) if "stride" in value else tensor
    if "dict" in value:
        return {_read(k, tensors, device): _read(v, tensors, device) for k, v in value["dict"]}
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {value['dtype']}")
        return dtype
    kind, items = next(iter(value.items()))
    read = [_read(v, tensors, device) for v in items]
    return deque(read, value["longest"]) if kind == "deque" else (tuple(read) if kind == "tuple" else read)


def _is_turned(tensor: torch.Tensor) -> bool:
    """Say whether the axes lie in another order in memory; the corner of a larger tensor does not count."""
    return not tensor.is_contiguous() and tensor.permute(_order(tensor.stride())).is_contiguous()


def _order(stride: Sequence[int]) -> list[int]:
    return sorted(range(len(stride)), key=lambda axis: stride[axis], reverse=True)


def _laid_out(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """Return a copy with these strides; raises ValueError where elements would share a place."""
    order = _order(stride)
    moved = tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.ndim)])
    if any(size > 1 and a != b for size, a, b in zip(tensor.shape, moved.stride(), stride, strict=True)):
        raise ValueError(f"a tensor of {tuple(tensor.shape)} cannot lie at strides {stride}")
    return moved
