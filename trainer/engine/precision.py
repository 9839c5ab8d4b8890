"""Compute precision: what the device can do, where the frozen weights stay, and fp16's loss scaling."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..errors import LoraGraftError, one_line
from ..parts import Parts

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

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the forward pass runs."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

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
            setting = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        else:
            setting = "fp32"
    if setting == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise LoraGraftError(
            "LG-RUN-002",
            "This GPU has no bf16.",
            where="mixed_precision",
            why=f"{torch.cuda.get_device_name(device)} is older than the format.",
            fix="set mixed_precision to fp16 or auto",
        )
    return Precision(setting, device)


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


def place(parts: Parts, precision: Precision) -> None:
    """Move the modules to the device in the run's storage; tensors already right stay shared, not copied.

    In fp32 runs half weights are upcast. In half runs the weights keep their storage, autocast casts
    per layer, and only the norms' few parameters are upcast, because a CPU's norms refuse other
    mixtures. The VAE always works in fp32, because fp16 overflows in SD1.x's.
    """
    dtype = torch.float32 if precision.name == "fp32" else None
    for part in (parts.denoiser, parts.text_encoder):
        nn.Module.to(
            part, device=precision.device, dtype=dtype
        )  # diffusers' own `to` warns about nothing here
        for module in part.modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.float()
    nn.Module.to(parts.vae, device=precision.device, dtype=torch.float32)


def enable_gradient_checkpointing(parts: Parts, *, denoiser: bool, text_encoder: bool) -> None:
    """Switch gradient checkpointing on for the trained parts (non-reentrant: inputs need no gradient).

    Nothing in them is random, so the generators' state is not kept: reading it cannot be captured.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if denoiser:
        switch = cast(Callable[..., None], parts.denoiser.enable_gradient_checkpointing)
        # diffusers before 0.33 takes no function; there such runs are not captured.
        switch(*([partial(checkpoint, **options)] if inspect.signature(switch).parameters else []))
        parts.denoiser.train()
    if text_encoder:
        parts.text_encoder.gradient_checkpointing_enable(options)  # type: ignore[operator]
        parts.text_encoder.train()
