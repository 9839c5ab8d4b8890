"""LoRA on linear layers and convolutions (Hu et al. 2021), in kohya's form: W x + (alpha/r) up(down(x)).

A trained module takes the place of the frozen one in its parent; the frozen weights stay where they
are, whoever owns them. The adapter's tensors are float32 whatever the base's storage is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import LoraGraftError, listed
from ..objective import generator
from ..parts import Parts, Target


@dataclass(frozen=True)
class Settings:
    """Ranks and alphas; ``conv_dim`` None trains no 3x3 convolution; a part set False is left out."""

    network_dim: int
    network_alpha: float
    conv_dim: int | None
    conv_alpha: float
    seed: int
    denoiser: bool = True
    text_encoder: bool = True


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update; also serves 1x1 convolutions through ``LoRAConv``."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that looks at a layer's weight."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return cast("torch.Tensor | None", self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out); the scale is applied at rank r, where it is cheapest."""
        out: torch.Tensor = self.base(x)
        return out + F.linear(
            F.linear(x.to(out.dtype), self.down.to(out.dtype)) * self.scale, self.up.to(out.dtype)
        )


class LoRAConv(nn.Module):
    """A frozen convolution with a low-rank update: down has the kernel, up is 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_channels, *base.kernel_size, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in, H, W) -> (B, out, H', W')."""
        out: torch.Tensor = self.base(x)
        base = self.base
        hidden = F.conv2d(
            x.to(out.dtype), self.down.to(out.dtype), None, base.stride, base.padding, base.dilation
        )
        return out + F.conv2d(hidden * self.scale, self.up.to(out.dtype))


LoRAModule = LoRALinear | LoRAConv


@dataclass(frozen=True)
class Adapted:
    """One trained module and what a LoRA file calls it."""

    target: Target
    module: LoRAModule
    rank: int
    alpha: float


class Adapter:
    """All trained modules of a run, in the family's order."""

    def __init__(self, modules: Sequence[Adapted]) -> None:
        self.modules = tuple(modules)

    def parameters(self, part: str) -> list[nn.Parameter]:
        """Return the trained tensors of one part ("denoiser" or "text_encoder"), in a fixed order."""
        return [p for m in self.modules if m.target.part == part for p in (m.module.down, m.module.up)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the LoRA under kohya's names (lora_down, lora_up, alpha), float32, on the CPU."""
        result: dict[str, torch.Tensor] = {}
        for m in self.modules:
            result[f"{m.target.key}.alpha"] = torch.tensor(float(m.alpha))
            result[f"{m.target.key}.lora_down.weight"] = m.module.down.detach().float().cpu()
            result[f"{m.target.key}.lora_up.weight"] = m.module.up.detach().float().cpu()
        return result

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the trained tensors from ``state_dict``'s form; raises KeyError for a missing one."""
        with torch.no_grad():
            for m in self.modules:
                m.module.down.copy_(tensors[f"{m.target.key}.lora_down.weight"])
                m.module.up.copy_(tensors[f"{m.target.key}.lora_up.weight"])


def inject(parts: Parts, settings: Settings, targets: Sequence[Target]) -> Adapter:
    """Put a LoRA on every target; raises LG-RUN-001 when none is left to train.

    Down weights start uniform in +-1/sqrt(fan_in) (kaiming, a=sqrt(5)), each from its own generator,
    so that a module's start does not depend on which others are trained; up weights start at zero.
    """
    wanted = {"denoiser": settings.denoiser, "text_encoder": settings.text_encoder}
    roots: dict[str, nn.Module] = {"denoiser": parts.denoiser, "text_encoder": parts.text_encoder}
    adapted = []
    for target in targets:
        if not wanted[target.part] or (target.kind == "conv" and settings.conv_dim is None):
            continue
        rank, alpha = (
            (settings.network_dim, settings.network_alpha)
            if target.kind == "linear"
            else (cast(int, settings.conv_dim), settings.conv_alpha)
        )
        adapted.append(_replace(roots[target.part], target, rank, alpha))
        module = adapted[-1].module
        bound = module.down[0].numel() ** -0.5
        start = torch.rand(module.down.shape, generator=generator(settings.seed, "init", target.key))
        module.down.data.copy_((start * 2 - 1) * bound)
    if not adapted:
        raise LoraGraftError(
            "LG-RUN-001",
            "The LoRA matches no module of the base model.",
            where=f"{len(targets)} candidates; trained parts: {[k for k, v in wanted.items() if v]}",
            why="nothing would be trained.",
            fix="give unet_lr or text_encoder_lr a value above 0",
        )
    return Adapter(adapted)


def attach(parts: Parts, tensors: Mapping[str, torch.Tensor], targets: Sequence[Target]) -> Adapter:
    """Put a saved LoRA on the modules it names; raises LG-SAVE-006 if a tensor fits no module."""
    roots: dict[str, nn.Module] = {"denoiser": parts.denoiser, "text_encoder": parts.text_encoder}
    used: set[str] = set()
    adapted = []
    for target in targets:
        names = [f"{target.key}.{n}" for n in ("lora_down.weight", "lora_up.weight", "alpha")]
        if not all(name in tensors for name in names):
            continue
        down, up, alpha = (tensors[name] for name in names)
        adapted.append(_replace(roots[target.part], target, down.shape[0], float(alpha)))
        module = adapted[-1].module
        if module.down.shape != down.shape or module.up.shape != up.shape:
            continue  # left unused, so named below
        module.down.data.copy_(down)
        module.up.data.copy_(up)
        used.update(names)
    unused = [name for name in tensors if name not in used]
    if unused:
        remove(parts, Adapter(adapted))
        raise LoraGraftError(
            "LG-SAVE-006",
            f"{len(unused)} of the LoRA's {len(tensors)} tensors fit no module of this base model.",
            where=listed(unused, limit=3),
            why="they would have no effect.",
            fix="use the base model that the LoRA was trained on, or one of the same architecture",
        )
    return Adapter(adapted)


def set_strength(adapter: Adapter, strength: float) -> None:
    """Multiply the LoRA's effect by ``strength``; 0 is the base model."""
    for m in adapter.modules:
        m.module.scale = m.alpha / m.rank * strength


def _replace(root: nn.Module, target: Target, rank: int, alpha: float) -> Adapted:
    parent_path, _, name = target.path.rpartition(".")
    parent = root.get_submodule(parent_path)
    base = getattr(parent, name)
    kind = LoRALinear if isinstance(base, nn.Linear) else LoRAConv
    module: LoRAModule = kind(base, rank, alpha)
    setattr(parent, name, module)
    return Adapted(target, module, rank, alpha)


def remove(parts: Parts, adapter: Adapter) -> None:
    """Put the frozen modules back in their places."""
    roots: dict[str, nn.Module] = {"denoiser": parts.denoiser, "text_encoder": parts.text_encoder}
    for m in adapter.modules:
        parent_path, _, name = m.target.path.rpartition(".")
        setattr(roots[m.target.part].get_submodule(parent_path), name, m.module.base)
