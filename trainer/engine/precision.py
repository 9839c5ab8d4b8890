"""Compute precision: what the device can do, where the frozen weights stay, and fp16's loss scaling."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import LoraGraftError, one_line
from ..parts import Parts
from .frozen import freeze

# A denoiser's first and last layers and its embedding of time: small, and all else passes through them.
KEPT_WHOLE = frozenset(
    {"conv_in", "conv_out", "time_embedding", "add_embedding", "x_embedder", "context_embedder"}
    | {"time_text_embed", "norm_out", "proj_out"}
    | {"img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"}
    | {"double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"}
    | {"distilled_guidance_layer", "t_embedder", "cap_embedder"}
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The resolved precision of a run; ``name`` is fp32, bf16 or fp16."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's arithmetic."""
        return DTYPES[self.name]

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler: fp16 gradients underflow without one; the others pass through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def pick_device(wished: torch.device | str | None) -> torch.device:
    """Return the wished device, else the GPU if there is one, else the CPU; raises LG-RUN-006."""
    name = str(wished or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoraGraftError(
            "LG-RUN-006",
            f"The device '{one_line(name, 40)}' cannot be used.",
            where="device",
            why=one_line(str(error), 200),
            fix="use cpu, or cuda (cuda:1, ...) with a GPU and torch's CUDA build",
        ) from error
    return device


def resolve(setting: str, device: torch.device) -> Precision:
    """Choose the precision: 'auto' is bf16 (else fp16) on a GPU and fp32 on a CPU."""
    if setting == "auto":
        if device.type == "cuda":
            setting = "bf16" if _has_bf16(device) else "fp16"
        else:
            setting = "fp32"
    if setting == "bf16" and device.type == "cuda" and not _has_bf16(device):
        raise LoraGraftError(
            "LG-RUN-002",
            "This GPU has no bf16.",
            where="mixed_precision",
            why=f"{torch.cuda.get_device_name(device)} is older than the format.",
            fix="set mixed_precision to fp16 or auto",
        )
    return Precision(setting, device)


def _has_bf16(device: torch.device) -> bool:
    """Say whether this GPU computes in bf16; older ones emulate it, slower than fp32."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def strict(wanted: bool) -> Iterator[None]:
    """Let only operations run that give the same bits every time; the process's own setting comes back.

    Attention is computed plainly, because the fast kernels add up in no fixed order. cuBLAS's notice about
    CUBLAS_WORKSPACE_CONFIG is left out: it concerns work on several streams.
    """
    if not wanted:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Deterministic behavior was enabled")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def place(
    parts: Parts,
    precision: Precision,
    *,
    owned: bool = False,
    storage: str = "as_is",
    text_at_every_step: bool = True,
) -> list[str]:
    """Bring the modules to the device, ready to compute in the run's dtype; return lines for the log.

    A weight that nobody else holds (``owned``), or that has to be copied to the device anyway, is
    converted once; on a CPU all are, because casts there cost as much as a step's arithmetic. One that
    a host shares stays as it is, and its layer casts it at each use. So do layers that no step uses,
    which stay where they are too, see `visiting`: the VAE's, in float32 because fp16 overflows in
    SD1.x's, and the text encoders' unless ``text_at_every_step``. A ``storage`` other than "as_is"
    packs the denoiser.
    """
    device, dtype = torch.empty(0, device=precision.device).device, precision.dtype  # cuda is cuda:0 here

    def shared(weight: torch.Tensor) -> bool:
        return not owned and device.type != "cpu" and weight.device == device

    done = freeze(parts.denoiser, dtype, device, storage=storage, skip=KEPT_WHOLE, keeps=shared)
    if text_at_every_step:
        freeze(parts.text_encoders, dtype, device, keeps=shared)
    else:
        freeze(parts.text_encoders, dtype, None)
    freeze(parts.vae, torch.float32, None)
    parts.dtype = dtype
    return [done.line] if done.line else []


@contextlib.contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's parameters and buffers on ``device`` for a while.

    Then they are the memory again that they were, which stayed as it was: no copy comes back, pages that a
    host or a file shares stay shared, and a device that ran full half-way leaves nothing there.
    """
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
