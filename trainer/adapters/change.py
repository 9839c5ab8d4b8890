"""A share that changes its layer's weight by any method: base(x) + dW x, with dW rebuilt at each use.

The update is multiplied by x on its own, so that it is not rounded away beside the weight in half
precision, and a base that is stored packed stays so. DoRA and dropout of outputs lie around any method.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..engine.frozen import dense
from . import dora, full, ia3, lokr, norm, oft
from .methods import METHODS
from .shapes import device_of, shape_of
from .shares import Drops, Moment, is_left_out, kept, limits


class Change(nn.Module):
    """The tensors of one layer by their names in a file; see `Share`.

    ``tensors`` are copied, float32, to the layer's device. ``alpha`` is for oft and boft the constraint;
    ``on_input`` is the axis of ia3's factors.
    """

    def __init__(
        self,
        method: str,
        base: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        *,
        alpha: float,
        key: str,
        drops: Drops | None = None,
        on_input: bool = False,
    ) -> None:
        super().__init__()
        self.method, self.shape = METHODS[method], shape_of(base)
        self.name, self.key, self.drops, self.on_input = method, key, drops or Drops(), on_input
        device = device_of(base)
        self.names = tuple(tensors)
        self.trained = nn.ParameterList(
            nn.Parameter(t.detach().to(device, torch.float32, copy=True)) for t in tensors.values()
        )
        rank = self.method.rank_of(tensors)
        self.rank = rank or 0
        self.alpha = float(alpha)
        self.scale = self.alpha / rank if rank else 1.0
        self.strength = 1.0

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """See `Share`."""
        return dict(zip(self.names, self.trained, strict=True))

    def added(
        self, base: nn.Module, out: torch.Tensor, x: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        """See `Share`."""
        if is_left_out(self.drops, moment, self.key):
            return out
        t = self.tensors
        if norm.WEIGHT in t:
            return out + self.strength * norm.update(base, x, t)
        weight = (self.strength * self.delta(base, moment)).to(out.dtype)
        bias = (self.strength * t[full.BIAS]).to(out.dtype) if full.BIAS in t else None
        if isinstance(base, nn.Conv2d):
            update = F.conv2d(x, weight, bias, base.stride, base.padding, base.dilation, base.groups)
            return out + update
        return out + F.linear(x, weight, bias)

    def delta(self, base: nn.Module, moment: Moment | None = None) -> torch.Tensor:
        """Return W' - W, (out, in, ...) float32, without what is left out at this moment."""
        t: dict[str, torch.Tensor] = dict(self.tensors)
        if self.on_input:
            t[ia3.ON_INPUT] = t[ia3.WEIGHT]

        def weight() -> torch.Tensor:
            return dense(base, next(iter(t.values())).dtype)

        delta = self.method.delta(t, self.shape, weight, self.alpha) * self.scale
        if moment is not None and self.drops.rank:
            delta = delta * self._outputs_kept(delta, moment)
        return dora.change(weight(), delta, t[dora.NAME]) if dora.NAME in t else delta

    def _outputs_kept(self, delta: torch.Tensor, moment: Moment) -> torch.Tensor:
        mask = kept(self.drops.rank, moment, self.key, "rank_dropout", (delta.shape[0],), delta)
        if self.drops.rank_scale:
            mask = mask / mask.mean().clamp(min=1 / len(mask))
        return mask.view(-1, *(1 for _ in delta.shape[1:]))

    def try_out(self, base: nn.Module) -> None:
        """Raise RuntimeError, KeyError or ValueError where the tensors do not fit the layer."""
        with torch.no_grad():
            update = self.delta(base)
        bias = self.tensors.get(full.BIAS, self.tensors.get(norm.BIAS))
        if update.shape != base.weight.shape or (bias is not None and bias.shape != (self.shape.outputs,)):
            raise ValueError("another shape")

    def saved(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """See `Share`."""
        t = {name: tensor.detach().float().cpu() for name, tensor in self.tensors.items()}
        if self.name == "ia3":
            return ia3.saved(t, dense(base, torch.float32).cpu(), self.on_input)
        if self.name in ("full", "norm"):
            return t
        if oft.BLOCKS in t:
            limit = self.alpha * self.shape.outputs
            return {**t, oft.BLOCKS: oft.within(t[oft.BLOCKS], limit), "alpha": torch.tensor(limit)}
        own = lokr.without_core(t) if self.name == "lokr" else t
        return {**own, "alpha": torch.tensor(self.alpha)}

    def set_strength(self, strength: float) -> None:
        """See `Share`."""
        self.strength = strength

    @torch.no_grad()
    def limit_norm(self, base: nn.Module, largest: float) -> torch.Tensor:
        """See `Share`; the length is that of the update before DoRA, of rotations that of their blocks."""
        t = self.tensors
        shared = [t[name] for name in self.method.limited if name in t]
        if oft.BLOCKS in t:
            norm_now = t[oft.BLOCKS].norm()
        else:
            plain: dict[str, torch.Tensor] = {k: v for k, v in t.items() if k != dora.NAME}
            update = self.method.delta(plain, self.shape, lambda: dense(base, torch.float32), self.alpha)
            norm_now = (update * self.scale).norm()
        factor = limits(norm_now, largest)
        for tensor in shared:
            tensor.mul_(factor ** (1 / len(shared)))
        return torch.stack([norm_now, norm_now * factor])
