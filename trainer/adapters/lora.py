"""LoRA on linear layers and convolutions (Hu et al. 2021), in kohya's form: W x + (alpha/r) up(down(x)).

A trained module takes the place of the frozen one in its parent; the frozen weights stay where they
are, whoever owns them. The adapter's tensors are float32 whatever the base's storage is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..engine import lowrank
from ..engine.lowrank import Bank
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


@dataclass
class Rows:
    """Which runs the present batch belongs to, in equal slices: shared by all layers of a base model."""

    active: tuple[int, ...] = (0,)


class LowRank(nn.Module):
    """The two trained tensors of one layer: float32, ``down`` (r, in, ...) and ``up`` (out, r, ...)."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        fan_in, fan_out, kernel = _shape_of(base)
        device = _device_of(base)
        self.down = nn.Parameter(torch.empty(rank, fan_in, *kernel, device=device))
        self.up = nn.Parameter(torch.zeros(fan_out, rank, *(1 for _ in kernel), device=device))


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, weight) -> x W


class _Layer(nn.Module):
    """What both kinds of layer share: the frozen one, an adapter for each run or None, and who takes part."""

    def __init__(self, base: nn.Module, runs: Sequence[LowRank | None], rows: Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.runs = nn.ModuleList(runs)  # type: ignore[arg-type]
        self.bank: Bank | None = None  # set where the layer runs as one function

    @property
    def lows(self) -> list[LowRank | None]:
        """Each run's tensors, or None where it does not train this layer."""
        return [cast("LowRank | None", low) for low in self.runs]

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that looks at a layer's weight."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return cast("torch.Tensor | None", self.base.bias)

    def _plain(self, x: torch.Tensor, down: Product, up: Product) -> torch.Tensor:
        """Return base(x) with each slice's own update up(down(x)) added to it."""
        out: torch.Tensor = self.base(x)
        x, active = x.to(out.dtype), self.rows.active

        def added(out: torch.Tensor, x: torch.Tensor, row: int) -> torch.Tensor:
            adapter = self.lows[row]
            if adapter is None:
                return out
            hidden = down(x, adapter.down.to(out.dtype))
            return out + up(hidden * adapter.scale, adapter.up.to(out.dtype))

        if len(active) == 1:
            return added(out, x, active[0])
        pieces = zip(out.chunk(len(active)), x.chunk(len(active)), active, strict=True)
        return torch.cat([added(*piece) for piece in pieces])


class LoRALinear(_Layer):
    """A frozen linear layer with a low-rank update for each run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out); the scale is applied at rank r, where it is cheapest."""
        if self.bank is None:
            return self._plain(x, F.linear, F.linear)
        return lowrank.linear(x, self.base, self.bank, self.rows.active)


class LoRAConv(_Layer):
    """A frozen convolution (1x1 too) with a low-rank update for each run: down has the kernel, up is 1x1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in, H, W) -> (B, out, H', W')."""
        base = cast(nn.Conv2d, self.base)
        if self.bank is not None:
            return lowrank.convolution(x, base, self.bank, self.rows.active)
        how = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        return self._plain(x, partial(F.conv2d, **how), F.conv2d)


LoRAModule = LoRALinear | LoRAConv


@dataclass(frozen=True)
class Adapted:
    """One trained module of a run: where it lies, what a LoRA file calls it, and the run's tensors in it."""

    target: Target
    module: LoRAModule
    low: LowRank

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.low.rank

    @property
    def alpha(self) -> float:
        """The scale is alpha / rank."""
        return self.low.alpha


class Adapter:
    """All trained modules of a run, in the family's order; ``row`` is its place among runs side by side."""

    def __init__(self, modules: Sequence[Adapted], rows: Rows, row: int = 0) -> None:
        self.modules, self.rows, self.row = tuple(modules), rows, row

    def select(self) -> None:
        """Let the next batches be this run's alone."""
        self.rows.active = (self.row,)

    def parameters(self, part: str) -> list[nn.Parameter]:
        """Return the trained tensors of one part ("denoiser" or "text_encoder"), in a fixed order."""
        return [p for m in self.modules if m.target.part == part for p in (m.low.down, m.low.up)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the LoRA under kohya's names (lora_down, lora_up, alpha), float32, on the CPU."""
        result: dict[str, torch.Tensor] = {}
        for m in self.modules:
            result[f"{m.target.key}.alpha"] = torch.tensor(float(m.alpha))
            result[f"{m.target.key}.lora_down.weight"] = m.low.down.detach().float().cpu()
            result[f"{m.target.key}.lora_up.weight"] = m.low.up.detach().float().cpu()
        return result

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the trained tensors from ``state_dict``'s form; raises KeyError for a missing one."""
        with torch.no_grad():
            for m in self.modules:
                m.low.down.copy_(tensors[f"{m.target.key}.lora_down.weight"])
                m.low.up.copy_(tensors[f"{m.target.key}.lora_up.weight"])


def inject(parts: Parts, settings: Settings, targets: Sequence[Target]) -> Adapter:
    """Put a LoRA on every target; raises LG-RUN-001 when none is left to train."""
    return inject_side_by_side(parts, [(settings, targets)])[0]


def inject_side_by_side(parts: Parts, runs: Sequence[tuple[Settings, Sequence[Target]]]) -> list[Adapter]:
    """Put a LoRA of each run on the targets that this run trains; raises LG-RUN-001 when these are none.

    Down weights start uniform in +-1/sqrt(fan_in) (kaiming, a=sqrt(5)), each from its own generator,
    so that a module's start does not depend on which others are trained; up weights start at zero.
    """
    for settings, targets in runs:
        if not any(_shape(settings, target) for target in targets):
            wanted = {"denoiser": settings.denoiser, "text_encoder": settings.text_encoder}
            raise LoraGraftError(
                "LG-RUN-001",
                "The LoRA matches no module of the base model.",
                where=f"{len(targets)} candidates; trained parts: {[k for k, v in wanted.items() if v]}",
                why="nothing would be trained.",
                fix="give unet_lr or text_encoder_lr a value above 0",
            )
    rows = Rows()
    adapted: list[dict[Target, Adapted]] = [{} for _ in runs]
    for target in dict.fromkeys(target for _, targets in runs for target in targets):
        shapes = [_shape(settings, target) if target in own else None for settings, own in runs]
        if not any(shapes):
            continue
        base = _find(parts, target)
        lows = [LowRank(base, *shape) if shape else None for shape in shapes]
        module = _replace(parts, target, lows, rows)
        for (settings, _), low, mine in zip(runs, lows, adapted, strict=True):
            if low is None:
                continue
            bound = low.down[0].numel() ** -0.5
            start = torch.rand(low.down.shape, generator=generator(settings.seed, "init", target.key))
            low.down.data.copy_((start * 2 - 1) * bound)
            mine[target] = Adapted(target, module, low)
    return [
        Adapter([mine[target] for target in own if target in mine], rows, number)
        for number, (mine, (_, own)) in enumerate(zip(adapted, runs, strict=True))
    ]


def attach(parts: Parts, tensors: Mapping[str, torch.Tensor], targets: Sequence[Target]) -> Adapter:
    """Put a saved LoRA on the modules it names; raises LG-SAVE-006 if a tensor fits no module."""
    used: set[str] = set()
    adapted = []
    rows = Rows()
    for target in targets:
        names = [f"{target.key}.{n}" for n in ("lora_down.weight", "lora_up.weight", "alpha")]
        if not all(name in tensors for name in names):
            continue
        down, up, alpha = (tensors[name] for name in names)
        low = LowRank(_find(parts, target), down.shape[0], float(alpha))
        adapted.append(Adapted(target, _replace(parts, target, [low], rows), low))
        if low.down.shape != down.shape or low.up.shape != up.shape:
            continue  # left unused, so named below
        low.down.data.copy_(down)
        low.up.data.copy_(up)
        used.update(names)
    unused = [name for name in tensors if name not in used]
    if unused:
        remove(parts, Adapter(adapted, rows))
        raise LoraGraftError(
            "LG-SAVE-006",
            f"{len(unused)} of the LoRA's {len(tensors)} tensors fit no module of this base model.",
            where=listed(unused, limit=3),
            why="they would have no effect.",
            fix="use the base model that the LoRA was trained on, or one of the same architecture",
        )
    return Adapter(adapted, rows)


def set_strength(adapter: Adapter, strength: float) -> None:
    """Multiply the LoRA's effect by ``strength``; 0 is the base model."""
    for m in adapter.modules:
        m.low.scale = m.alpha / m.rank * strength


def remove(parts: Parts, adapter: Adapter) -> None:
    """Put the frozen modules back in their places."""
    for m in adapter.modules:
        parent, name = _place(parts, m.target)
        setattr(parent, name, m.module.base)
        if hasattr(parent, "grouped_qkv"):
            del parent.grouped_qkv


def _shape_of(layer: nn.Linear | nn.Conv2d) -> tuple[int, int, tuple[int, ...]]:
    """Return inputs, outputs and kernel; a frozen layer may have to unpack its weight, which is not asked."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, ()
    return layer.in_channels // layer.groups, layer.out_channels, layer.kernel_size


def _device_of(layer: nn.Module) -> torch.device:
    held = next(chain(layer.parameters(), layer.buffers()), None)
    return cast(torch.Tensor, layer.weight).device if held is None else held.device


def _shape(settings: Settings, target: Target) -> tuple[int, float] | None:
    """Return rank and alpha of a target, or None where the settings leave it out."""
    wanted = {"denoiser": settings.denoiser, "text_encoder": settings.text_encoder}
    if not wanted[target.part]:
        return None
    if target.kind == "linear":
        return settings.network_dim, settings.network_alpha
    return None if settings.conv_dim is None else (settings.conv_dim, settings.conv_alpha)


def _place(parts: Parts, target: Target) -> tuple[nn.Module, str]:
    """Return a target's parent and its name in there."""
    roots: dict[str, nn.Module] = {"denoiser": parts.denoiser, "text_encoder": parts.text_encoder}
    parent, _, name = target.path.rpartition(".")
    return roots[target.part].get_submodule(parent), name


def _find(parts: Parts, target: Target) -> nn.Linear | nn.Conv2d:
    parent, name = _place(parts, target)
    return cast("nn.Linear | nn.Conv2d", getattr(parent, name))


def _replace(parts: Parts, target: Target, lows: Sequence[LowRank | None], rows: Rows) -> LoRAModule:
    parent, name = _place(parts, target)
    base = getattr(parent, name)
    layer = LoRALinear if isinstance(base, nn.Linear) else LoRAConv
    module: LoRAModule = layer(base, lows, rows)
    setattr(parent, name, module)
    return module
