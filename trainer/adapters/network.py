"""All trained modules of a run: put into a base model and taken out again, and their tensors as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import nn

from ..contradictions.refusals import bad_value
from ..engine.frozen import dense
from ..errors import LoraGraftError, listed, nearest
from ..parts import Parts, Target
from ..patterns import Rule
from . import dora
from .change import Change
from .dylora import Nested
from .layers import Layer, layer_around
from .lora import LowRank
from .methods import METHODS, SAME_AS
from .settings import Rank, Settings
from .shapes import shape_of, smallest_butterfly
from .shares import Rows, Share, draw


@dataclass(frozen=True)
class Adapted:
    """One trained module of a run: where it lies, what a LoRA file calls it, and the run's share in it."""

    target: Target
    module: Layer
    share: Share

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors by their names behind the module's key, in a fixed order."""
        return self.share.tensors

    @property
    def low(self) -> LowRank:
        """The share of a LoRA."""
        return cast(LowRank, self.share)

    @property
    def rank(self) -> int:
        """The rank r; 0 where the network has none."""
        return self.share.rank

    @property
    def alpha(self) -> float:
        """The scale is alpha / rank."""
        return self.share.alpha


class Lengths(NamedTuple):
    """What scale_weight_norms did: modules scaled down, mean and largest length of the updates after it."""

    scaled: int
    mean: float
    largest: float


class Adapter:
    """All trained modules of a run, in the family's order; ``row`` is its place among runs side by side."""

    def __init__(self, modules: Sequence[Adapted], rows: Rows, row: int = 0) -> None:
        self.modules, self.rows, self.row = tuple(modules), rows, row
        self._lengths: tuple[torch.Tensor, float] | None = None

    def select(self) -> None:
        """Let the next batches be this run's alone, with nothing left out of it."""
        self.rows.active = (self.row,)
        self.rows.moments = {}

    def parameters(self, part: str) -> list[nn.Parameter]:
        """Return the trained tensors of one part (see `Target`), in a fixed order."""
        return [p for m in self.modules if m.target.part == part for p in m.tensors.values()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors as they are, float32, on the CPU: what a continued run needs."""
        return {
            f"{m.target.key}.{name}": tensor.detach().float().cpu()
            for m in self.modules
            for name, tensor in m.tensors.items()
        }

    def saved(self) -> dict[str, torch.Tensor]:
        """Return the LoRA under the names that kohya, LyCORIS and ComfyUI read, float32, on the CPU."""
        return {
            f"{m.target.key}.{name}": tensor
            for m in self.modules
            for name, tensor in m.share.saved(m.module.base).items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the trained tensors from ``state_dict``'s form; raises KeyError for a missing one."""
        with torch.no_grad():
            for m in self.modules:
                for name, tensor in m.tensors.items():
                    tensor.copy_(tensors[f"{m.target.key}.{name}"])

    def limit_norms(self, largest: float) -> None:
        """Scale down every module whose update is longer than ``largest``; ``lengths`` says what was done.

        The rule of the reference trainer's scale_weight_norms; the length is the Frobenius norm of dW.
        """
        limited = [m for m in self.modules if m.target.kind != "norm"]
        norms = torch.stack([m.share.limit_norm(m.module.base, largest) for m in limited])
        self._lengths = norms, largest

    @property
    def lengths(self) -> Lengths | None:
        """What the last `limit_norms` did, brought to the host; None without one."""
        if self._lengths is None:
            return None
        norms, largest = self._lengths[0].cpu(), self._lengths[1]
        scaled, after = int((norms[:, 0] > largest).sum()), norms[:, 1]
        return Lengths(scaled, float(after.mean()), float(after.max()))


def inject(parts: Parts, settings: Settings, targets: Sequence[Target]) -> Adapter:
    """Put a network on every target; raises LG-RUN-001 when none is left to train."""
    return inject_side_by_side(parts, [(settings, targets)])[0]


def inject_side_by_side(parts: Parts, runs: Sequence[tuple[Settings, Sequence[Target]]]) -> list[Adapter]:
    """Put each run's network on the targets that this run trains; raises LG-RUN-001 when these are none.

    Each tensor starts from its own generator, so that a module's start does not depend on which others are
    trained. At the start the base model's output is unchanged.
    """
    for settings, targets in runs:
        _check(settings, targets)
    rows = Rows()
    adapted: list[dict[Target, Adapted]] = [{} for _ in runs]
    for target in dict.fromkeys(target for _, targets in runs for target in targets):
        ranks = [settings.rank_of(target) if target in own else None for settings, own in runs]
        if not any(ranks):
            continue
        base = find(parts, target)
        shares = [
            None if rank is None else new_share(settings, target, base, rank)
            for (settings, _), rank in zip(runs, ranks, strict=True)
        ]
        module = put(parts, target, shares, rows)
        for share, mine in zip(shares, adapted, strict=True):
            if share is not None:
                mine[target] = Adapted(target, module, share)
    return [
        Adapter([mine[target] for target in own if target in mine], rows, number)
        for number, (mine, (_, own)) in enumerate(zip(adapted, runs, strict=True))
    ]


def new_share(settings: Settings, target: Target, base: nn.Module, rank: Rank) -> Share:
    """Return a run's share in a layer as it starts; raises LG-CFG-003 where the layer cannot be split."""
    (dim, alpha), options, drops = rank, settings.options, settings.drops
    shape = shape_of(base)
    if target.kind == "norm":
        return _change("norm", settings, target, base, dim, 0.0)
    if options.rs_lora and settings.given is None:
        alpha *= dim**0.5  # what a file's alpha is read with: alpha / dim
    if settings.algo == "dylora":
        if dim % options.unit:
            raise bad_value("unit", options.unit, f"a divisor of the rank {dim} of {target.key}", "network")
        nested = Nested(base, dim, alpha, options.unit, target.key, drops)
        nested.begin(settings.seed)
        return nested
    method = SAME_AS.get(settings.algo, settings.algo)
    if method == "lora" and not options.dora_wd and not (options.use_tucker and shape.is_large):
        low = LowRank(base, dim, alpha, target.key, drops)
        low.begin(settings.seed)
        return low
    return _change(method, settings, target, base, dim, alpha)


def _change(
    method: str, settings: Settings, target: Target, base: nn.Module, dim: int, alpha: float
) -> Change:
    shape, options = shape_of(base), settings.options
    on_input = bool(settings.inputs) and target.path.endswith(settings.inputs)
    scaled = replace(shape, outputs=shape.inputs) if on_input else shape  # the side that ia3 has factors for
    starts = METHODS[method].begin(scaled, dim, options)
    if starts is None:
        least = smallest_butterfly(shape.outputs)
        raise bad_value("network_dim", dim, f"at least {least} for this base model", target.key)
    tensors = {name: draw(start, settings.seed, "init", target.key, name) for name, start in starts.items()}
    if method in ("oft", "boft"):
        alpha = options.constraint
    if method == "lokr" and METHODS[method].rank_of(tensors) is None:
        alpha = float(dim)  # nothing is scaled; what LyCORIS writes
    if options.dora_wd and method != "norm":
        tensors[dora.NAME] = dora.lengths(dense(base, torch.float32).cpu(), options.wd_on_output)
    return Change(method, base, tensors, alpha=alpha, key=target.key, drops=settings.drops, on_input=on_input)


def set_strength(adapter: Adapter, strength: float) -> None:
    """Multiply the LoRA's effect by ``strength``; 0 is the base model."""
    for m in adapter.modules:
        m.share.set_strength(strength)


def remove(parts: Parts, adapter: Adapter) -> None:
    """Put the frozen modules back in their places."""
    for m in adapter.modules:
        parent, name = place_of(parts, m.target)
        setattr(parent, name, m.module.base)
        if hasattr(parent, "grouped_qkv"):
            del parent.grouped_qkv


def put(parts: Parts, target: Target, shares: Sequence[Share | None], rows: Rows) -> Layer:
    """Put a layer with these shares in the place of a frozen one."""
    parent, name = place_of(parts, target)
    module = layer_around(getattr(parent, name), shares, rows)
    setattr(parent, name, module)
    return module


def place_of(parts: Parts, target: Target) -> tuple[nn.Module, str]:
    """Return a target's parent and its name in there."""
    parent, _, name = target.path.rpartition(".")
    return parts.part(target.part).get_submodule(parent), name


def find(parts: Parts, target: Target) -> nn.Module:
    """Return the frozen layer of a target."""
    parent, name = place_of(parts, target)
    return cast(nn.Module, getattr(parent, name))


def _check(settings: Settings, targets: Sequence[Target]) -> None:
    """Raise for a pattern that no module fits, and for a run that would train nothing."""
    keys = [target.key for target in targets]
    for name, rules in (("train_modules", settings.only), ("network_reg_dims", settings.rules)):
        for rule in rules:
            if not any(rule.fits(target.key, target.path) for target in targets):
                raise LoraGraftError(
                    "LG-CFG-003",
                    f"The pattern {rule.text[:60]!r} is found in no module's name.",
                    where=name,
                    why=f"none of {len(keys)} modules that the preset has is called so.",
                    fix=f"take a part of a name, such as {listed(_near(rule, targets), limit=3)}; with "
                    "preset everything, all modules can be trained",
                )
    if not any(settings.rank_of(target) for target in targets):
        wanted = {"denoiser": settings.denoiser, "text_encoder": settings.text_encoder}
        raise LoraGraftError(
            "LG-RUN-001",
            "The LoRA matches no module of the base model.",
            where=f"{len(targets)} candidates; trained parts: {[k for k, v in wanted.items() if v]}",
            why="nothing would be trained.",
            fix="give unet_lr or text_encoder_lr a value above 0",
        )


def _near(rule: Rule, targets: Sequence[Target]) -> list[str]:
    """Return what a pattern that fits nothing may have meant: parts of names, else whole ones."""
    parts = dict.fromkeys(part for target in targets for part in target.path.split("."))
    return list(nearest(rule.text, parts)) or [target.key for target in targets]
