"""Which network a run trains, and which rank and alpha each module gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..parts import DENOISER, Target
from ..patterns import Rule, first
from .methods import Options
from .shares import Drops

Rank = tuple[int, float]  # rank and alpha


@dataclass(frozen=True)
class Settings:
    """Ranks and alphas; ``conv_dim`` None trains no 3x3 convolution; a part set False is left out.
    ``left_out`` are text encoders that are not trained where others are.

    ``rules`` give single modules a rank; where there are patterns in ``only``, modules that none of them fits
    are left out. ``blocks`` and ``conv_blocks`` hold a rank and an alpha for each of
    the denoiser's blocks, ``still`` the blocks that are not trained. ``inputs`` are the endings of modules
    whose inputs ia3 scales, not their outputs. ``norms`` says that normalisation layers are trained too.
    ``given`` are a file's ranks by key: only its modules are then trained. An alpha of 0 stands for the rank.
    """

    network_dim: int
    network_alpha: float
    conv_dim: int | None
    conv_alpha: float
    seed: int
    denoiser: bool = True
    text_encoder: bool = True
    left_out: frozenset[str] = frozenset()
    algo: str = "lora"
    options: Options = field(default_factory=Options)
    drops: Drops = field(default_factory=Drops)
    rules: tuple[Rule, ...] = ()
    only: tuple[Rule, ...] = ()
    blocks: tuple[Rank, ...] = ()
    conv_blocks: tuple[Rank, ...] = ()
    still: frozenset[int] = frozenset()
    inputs: tuple[str, ...] = ()
    norms: bool = False
    given: Mapping[str, Rank] | None = field(default=None, hash=False)

    def rank_of(self, target: Target) -> Rank | None:
        """Return rank and alpha of a module, or None where it is not trained."""
        is_text = self.text_encoder and target.part not in self.left_out
        is_wanted = self.denoiser if target.part == DENOISER else is_text
        if not is_wanted or target.block in self.still:
            return None
        if self.given is not None:
            return self.given.get(target.key)
        if self.only and first(self.only, target.key, target.path) is None:
            return None
        rank = self._rank_of(target)
        if rank is None or rank[0] == 0:
            return None
        if target.kind == "norm":
            return (1, 1.0)
        return (rank[0], rank[1] or float(rank[0]))

    def _rank_of(self, target: Target) -> Rank | None:
        if (rule := first(self.rules, target.key, target.path)) is not None:
            return int(rule.value), self.network_alpha
        blocks = self.conv_blocks if target.kind == "conv" else self.blocks
        if blocks and target.block is not None:
            return blocks[target.block]
        if target.kind == "norm":
            return (1, 1.0)
        if target.kind == "linear":
            return self.network_dim, self.network_alpha
        return None if self.conv_dim is None else (self.conv_dim, self.conv_alpha)

    @property
    def unfused(self) -> str:
        """Why this network runs as plain modules, as one line for the log; empty if it need not."""
        if self.algo not in ("lora", "locon"):
            return f"{self.algo} has no fused form"
        forms = {
            "dora_wd": self.options.dora_wd,
            "use_tucker": self.options.use_tucker,
            "train_norm": self.norms,
        }
        if name := next((name for name, is_on in forms.items() if is_on), None):
            return f"{name} has no fused form"
        return "dropout has no fused form" if self.drops.any else ""
