"""Weight formats for frozen matrices: fewer bytes for a loss that is measured, plain torch on any device.

"fp8" is e4m3 (Micikevicius et al. 2022) and "int8" symmetric, both with one float32 scale an output
channel; "nf4" is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023), two values a byte and one float32
scale for 64 values. Unpacking launches kernels only: nothing is read back, so it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import LoraGraftError
from .file_formats import FILE_FORMATS, Tensors

FP8_MAX, INT8_MAX = 448.0, 127.0
SMALLEST_SCALE = 2.0**-126  # of a channel of zeros: nothing is divided by zero
BLOCK = 64
# The quantiles of a normal distribution that QLoRA takes (appendix E); zero is one of them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Packed(nn.Module):
    """A weight in one of the FORMATS, or as it lies in a file (FILE_FORMATS).

    A module, so that it moves between devices with what it belongs to.
    """

    def __init__(self, storage: str, shape: torch.Size, tensors: Tensors) -> None:
        super().__init__()
        self.storage, self.shape = storage, shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def num_bytes(self) -> int:
        """What the weight takes in memory."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (shape as packed) in ``dtype``, in new memory."""
        unpack = FILE_FORMATS.get(self.storage) or FORMATS[self.storage].unpack
        return unpack(dict(self.named_buffers()), self.shape, dtype)

    def as_shape(self, shape: Sequence[int]) -> Packed | None:
        """Return the same weight in another shape with the same rows; None where the rows are others."""
        same = len(shape) > 1 and shape[0] == self.shape[0]
        return Packed(self.storage, torch.Size(shape), dict(self.named_buffers())) if same else None

    def rows(self, start: int, stop: int) -> Packed | None:
        """Return rows ``start`` to ``stop``, views; None where blocks of values go over a row's end."""
        return self._of_rows(lambda t: t[start:stop].flatten(0, 1), stop - start)

    def lookup(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``ids`` (...) of a matrix as (..., columns); only these are unpacked."""
        found = self._of_rows(lambda t: t[ids.flatten()].flatten(0, 1), ids.numel())
        if found is None:
            return F.embedding(ids, self.unpack(dtype))
        return found.unpack(dtype).view(*ids.shape, -1)

    def _of_rows(self, choose: Callable[[torch.Tensor], torch.Tensor], count: int) -> Packed | None:
        """Return the weight of chosen rows; ``choose`` gets tensors (rows, parts of a row, ...)."""
        rows, tensors = self.shape[0], {}
        if self.storage not in FILE_FORMATS or not rows:
            return None
        for name, t in self.named_buffers():
            if t.shape[0] % rows:
                return None
            tensors[name] = choose(t.view(rows, t.shape[0] // rows, *t.shape[1:]))
        return Packed(self.storage, torch.Size((count, *self.shape[1:])), tensors)


def stacked(weights: Sequence[Packed]) -> Packed | None:
    """Return weights of one format one below the other, a copy; None where that needs their values."""
    first = weights[0]
    alike = {(w.storage, w.shape[1:], tuple(n for n, _ in w.named_buffers())) for w in weights}
    if len(alike) > 1 or any(w.rows(0, w.shape[0]) is None for w in weights):
        return None
    tensors = {name: torch.cat([w.get_buffer(name) for w in weights]) for name, _ in first.named_buffers()}
    shape = torch.Size((sum(w.shape[0] for w in weights), *first.shape[1:]))
    return Packed(first.storage, shape, tensors)


@dataclass(frozen=True)
class Format:
    """How a finite float32 weight becomes tensors, and these a weight again; ``help`` is one line.

    ``lacking`` names the kinds of device that cannot hold it.
    """

    help: str
    pack: Callable[[torch.Tensor], Tensors]
    unpack: Callable[[Tensors, torch.Size, torch.dtype], torch.Tensor]
    lacking: tuple[str, ...] = ()


def refuse_lacking(storage: str, device: torch.device) -> None:
    """Raise LG-RUN-012 for a storage ("as_is" or of FORMATS) that this kind of device cannot hold."""
    if storage != "as_is" and device.type in FORMATS[storage].lacking:
        others = [name for name, format in FORMATS.items() if device.type not in format.lacking]
        raise LoraGraftError(
            "LG-RUN-012",
            f"The device has no {storage}.",
            where=f"base_storage {storage}, device {device}",
            why=f"torch has no such numbers on {device.type}.",
            fix=f"set base_storage to {' or '.join(others)}, or to as_is",
        )


def pack(weight: torch.Tensor, storage: str, *, name: str = "a weight") -> Packed:
    """Pack a weight (out, in, ...) on its device; raises LG-BASE-009 for a value that is not finite."""
    values = weight.detach().float()
    if not bool(torch.isfinite(values).all()):
        raise LoraGraftError(
            "LG-BASE-009",
            "A weight of the base model is NaN or infinite.",
            where=f"{name}, shape {tuple(weight.shape)}, for base_storage {storage}",
            why="it cannot be stored in fewer bits, and pictures and training would be noise.",
            fix="use another copy of the base model: this one is damaged",
        )
    return Packed(storage, weight.shape, FORMATS[storage].pack(values))


def _channel_scale(values: torch.Tensor, largest: float) -> torch.Tensor:
    """Return (out, 1, ...) so that the largest value of each output channel becomes ``largest``."""
    absmax = values.abs().flatten(1).amax(1) if values[0].numel() else values.new_zeros(len(values))
    scale: torch.Tensor = (absmax / largest).clamp(min=SMALLEST_SCALE)
    return scale.view(-1, *[1] * (values.ndim - 1))


def _pack_fp8(values: torch.Tensor) -> Tensors:
    scale = _channel_scale(values, FP8_MAX)
    codes = (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return {"codes": codes.view(torch.uint8), "scale": scale}  # bytes: `Module.to(dtype)` leaves them alone


def _unpack_fp8(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return packed["codes"].view(torch.float8_e4m3fn).to(dtype).mul_(packed["scale"])


def _pack_int8(values: torch.Tensor) -> Tensors:
    scale = _channel_scale(values, INT8_MAX)
    return {"codes": (values / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), "scale": scale}


def _unpack_int8(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return packed["codes"].to(dtype).mul_(packed["scale"])


def _pack_nf4(values: torch.Tensor) -> Tensors:
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1).clamp(min=SMALLEST_SCALE)
    levels = values.new_tensor(NF4_LEVELS)
    nearest = torch.bucketize(blocks / absmax[:, None], (levels[1:] + levels[:-1]) / 2)
    pairs = nearest.to(torch.uint8).view(-1, 2)
    return {"codes": pairs[:, 0] * 16 + pairs[:, 1], "absmax": absmax, "levels": levels}


def _unpack_nf4(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    levels = packed["levels"].to(dtype)
    two = torch.cartesian_prod(levels, levels)  # (256, 2): what each byte stands for
    blocks = F.embedding(packed["codes"].int(), two).view(-1, BLOCK).mul_(packed["absmax"][:, None])
    return blocks.view(-1)[: shape.numel()].view(shape)


FORMATS: dict[str, Format] = {
    "fp8": Format(
        "1 byte a value, e4m3 with a scale for each output channel", _pack_fp8, _unpack_fp8, ("mps",)
    ),
    "int8": Format("1 byte a value, a scale for each output channel", _pack_int8, _unpack_int8),
    "nf4": Format("0.56 bytes a value, QLoRA's 4 bits with a scale for 64 values", _pack_nf4, _unpack_nf4),
}
