"""The reference trainer's numbers on the tiny base, and the same base, adapter and batches on this side.

Everything that goes in is made by a formula in integers that both sides computed, so that only results are
stored: losses, and of each gradient its norm and two projections (sum of +-g), whose errors are as large as
the gradient's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from loragraft.trainer import api, losses
from loragraft.trainer.adapters import lora, shares
from loragraft.trainer.engine import precision
from loragraft.trainer.engine.steps import Tensors
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.inputs import Fed, Inputs, noise
from loragraft.trainer.objective import NoiseSchedule
from loragraft_tests.trainer import tiny

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "parity_gradients.safetensors"
with safe_open(GOLDEN, framework="pt") as file:
    STORED: dict[str, dict[str, Any]] = json.loads(file.metadata()["cases"])
    VECTORS = {name: file.get_tensor(name) for name in STORED}
Vectors = Mapping[str, torch.Tensor]
GRADIENTS = [name for name, stored in STORED.items() if "loss" in stored]
CURVES = [name for name, stored in STORED.items() if "losses" in stored]

# What a case says of its batch; all else are settings.
BATCH = {"images": 2, "size": (8, 8), "timesteps": (37, 811), "chunks": 1}
BATCH |= {"masked": False, "loss_weights": None}


# ---- numbers that any machine computes to the same bits ----


def uniform(name: str, shape: tuple[int, ...], bound: float = 1.0) -> torch.Tensor:
    """Return values in +-bound, float32: splitmix64 of a counter that begins at the name's checksum."""
    x = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    values = (x >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
    return torch.from_numpy((values * bound).astype(np.float32)).reshape(shape)


def fractions(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return values in 0..1, float32."""
    return uniform(name, shape).add(1).div(2)


def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return values of mean 0 and variance 1, float32: sums of twelve uniform ones."""
    many = torch.stack([uniform(f"{name}/{i}", shape) for i in range(12)])
    return many.double().sum(0).mul(0.5).to(torch.float32)


def base_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a frozen tensor: matrices as wide as torch begins them, scales around 1, biases around 0."""
    if len(shape) > 1:
        return uniform(name, shape, math.prod(shape[1:]) ** -0.5)
    is_scale = "norm" in name.split(".")[-2] and name.endswith("weight")
    return float(is_scale) + uniform(name, shape, 0.125)


def adapter_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a trained tensor; none is zero."""
    return uniform(name, shape, 0.25 if "lora_up" in name else math.prod(shape[1:]) ** -0.5)


def sketch(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return norm and two projections on random signs, (3,) float64."""
    flat = values.detach().double().flatten()
    signs = [uniform(f"{name}/signs/{i}", tuple(flat.shape)).sign().double() for i in range(2)]
    return torch.stack([flat.norm(), *((flat * s).sum() for s in signs)])


def worst(
    found: dict[str, torch.Tensor], name: str, smallest: float = 1e-9, vectors: Vectors = VECTORS
) -> tuple[float, str]:
    """Return the worst tensor: how far norm and projections are from the stored ones, relative to the norm.

    Tensors below ``smallest`` of the whole are measured on the scale of the whole. There are always some:
    where a group of a normalisation has one channel, it takes away what is added to the channel, and such
    gradients are zero but for rounding.
    """
    expected = vectors[name]
    assert len(found) == len(expected)
    total = expected[:, 0].norm()
    scale = torch.where(expected[:, 0] < smallest * total, total, expected[:, 0])
    rows = torch.stack([sketch(name, value) for name, value in found.items()])
    return max(zip(((rows - expected).abs().amax(dim=1) / scale).tolist(), found, strict=True))


# ---- the tiny base, and how it is computed in float64 ----


def ready(base: api.Base) -> api.Base:
    """Return the base with its parts loaded once and copied for each run: faster than building them."""
    parts = base.load()
    if base.family is EXACT:
        parts.denoiser.time_proj = ExactSinusoids()
    copied = dataclasses.replace(base)
    copied.load = lambda: dataclasses.replace(  # type: ignore[method-assign]
        parts,
        denoiser=copy.deepcopy(parts.denoiser),
        text_encoders=copy.deepcopy(parts.text_encoders),
    )
    return copied


def write_base(path: Path) -> Path:
    """Write the tiny base with weights by formula, a float32 file."""
    unet, vae, text = tiny.random_modules()
    with torch.no_grad():
        for prefix, module in (("unet.", unet), ("", text)):
            for name, weight in module.named_parameters():
                known = name if module is unet or name.startswith("text_model.") else f"text_model.{name}"
                weight.copy_(base_weight(prefix + known, tuple(weight.shape)))
    save_file(tiny.single_file_weights(unet, vae, text), path)
    return path


class ExactSchedule(NoiseSchedule):
    """The same table in the default dtype; as a class of its own it shares no table with the others."""


class ExactSinusoids(nn.Module):
    """The embedding of timesteps: diffusers makes its frequencies in float32 always."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t: (B,) -> (B, 32)."""
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(16, dtype=torch.float64) / 16)
        angles = t.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ExactSD15(SD15):
    """SD1.x in float64."""

    objective = ExactSchedule()


EXACT = ExactSD15()


@contextmanager
def in_float64() -> Iterator[None]:
    """Let everything that computes in float32 compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(precision.DTYPES, "fp32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for table in (losses.WEIGHTS, losses.COMPARED):
            patch.setitem(table, ExactSchedule, table[NoiseSchedule])  # type: ignore[index]
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


# ---- what a case is fed ----


@dataclasses.dataclass(frozen=True)
class Case:
    """A stored case: the settings of a run, what its batch is like, and what the reference found."""

    name: str

    @property
    def stored(self) -> dict[str, Any]:
        """What the reference was given and found."""
        return STORED[self.name]

    @property
    def batch(self) -> dict[str, Any]:
        """What the batch is like, see BATCH."""
        return BATCH | {k: v for k, v in self.stored["settings"].items() if k in BATCH}

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the run's settings."""
        own = {k: v for k, v in self.stored["settings"].items() if k not in BATCH}
        rank = {"network_dim": 4, "network_alpha": 2.0, "max_token_length": 75 * self.batch["chunks"]}
        return {**rank, "mixed_precision": "fp32", "max_grad_norm": 0, **own, **more}

    def fed(self, inputs: Inputs, tag: str = "", timesteps: list[int] | None = None) -> Tensors:
        """Return the batch that the reference was given; ``tag`` tells the batches of a curve apart."""
        images, size, dtype = self.batch["images"], tuple(self.batch["size"]), torch.get_default_dtype()
        latents = normal(f"{tag}latents", (images, 4, *size)).to(dtype)
        with reference_draws(images, tag) as drawn:
            noises = [drawn(inputs.config, latents[i : i + 1], i) for i in range(images)]
        perturbed = [p for _, p in noises if p is not None]
        tokens = self.tokens(inputs, tag)
        weight, mask = self.batch["loss_weights"], None
        if self.batch["masked"]:
            pixels = uniform(f"{tag}mask", (images, *(8 * n for n in size))).abs().to(dtype)
            mask = nn.functional.interpolate(pixels[:, None], size, mode="area")
        encode, keeps_text = inputs.texts.encode, inputs.keeps_text
        return Fed(
            latents,
            torch.cat([n for n, _ in noises]),
            torch.tensor((timesteps or self.batch["timesteps"])[:images]),
            encode(tokens, grad=False) if keeps_text else tokens,
            None if weight is None else torch.tensor(weight, dtype=dtype),
            mask,
            torch.cat(perturbed) if perturbed else None,
        ).tensors

    def tokens(self, inputs: Inputs, tag: str) -> tuple[torch.Tensor, ...]:
        """Return token ids, and with emphasis the weights, as the family reads captions."""
        ids = self._tokens(tag)
        return (ids, self._emphasis()) if inputs.config.weighted_captions else (ids,)

    def _tokens(self, tag: str) -> torch.Tensor:
        """Return token ids (B, chunks, 77): 9 or 4 words in the last chunk, 75 in those before."""
        images, chunks = self.batch["images"], self.batch["chunks"]
        ids = torch.full((images, chunks, 77), tiny.VOCABULARY - 1)
        ids[:, :, 0] = tiny.VOCABULARY - 2
        for b in range(images):
            for c in range(chunks):
                count = 75 if c < chunks - 1 else (9, 4)[b]
                ids[b, c, 1 : 1 + count] = (fractions(f"{tag}ids/{b}/{c}", (count,)) * 512).long()
        return ids

    def _emphasis(self) -> torch.Tensor:
        """Return the weights of the conditioning's places (B, L): start and end weigh 1."""
        images, chunks = self.batch["images"], self.batch["chunks"]
        inside = uniform("token_weights", (images, chunks, 77)).mul(0.5).add(1)[:, :, 1:-1]
        ends = torch.ones(images, 1)
        return torch.cat([ends, inside.flatten(1), ends], dim=1).to(torch.get_default_dtype())


@contextmanager
def reference_draws(images: int, tag: str) -> Iterator[Callable[..., Any]]:
    """Give `draw_noise` the random numbers that the reference drew: yields it for (config, latents, sample).

    The reference draws for a whole batch at once, and names what it draws by its turn.
    """
    turns: dict[str, int] = {}

    def turn(kind: str) -> str:
        turns[kind] = turns.get(kind, 0) + 1
        return f"{tag}{kind}/{turns[kind]}"

    def randn(shape: tuple[int, ...], generator: tuple[object, ...]) -> torch.Tensor:
        _, _, sample, what = generator
        kind = "like" if what in ("noise", "perturbation") else "randn"
        whole = normal(turn(kind), (images, *shape[1:]))
        return whole[int(str(sample))][None].to(torch.get_default_dtype())

    def rand(size: int, generator: object) -> torch.Tensor:
        return fractions(turn("rand"), (size,))

    def draw(config: api.TrainConfig, latents: torch.Tensor, sample: int) -> Any:
        turns.clear()
        return noise.draw_noise(config, latents, 0, sample)

    chance = SimpleNamespace(random=lambda: float(fractions(turn("random"), (1,))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "generator", lambda *key: key)
        patch.setattr(noise, "torch", SimpleNamespace(randn=randn, rand=rand))
        patch.setattr(noise, "random", SimpleNamespace(Random=lambda seed: chance))
        yield draw


@contextmanager
def reference_dropouts() -> Iterator[None]:
    """Leave out of a step what the reference left out."""

    def kept(chance: float, moment: Any, key: str, what: str, shape: Any, like: torch.Tensor) -> torch.Tensor:
        drawn = fractions(f"{key}/{'values' if what == 'network_dropout' else 'rank'}", tuple(shape))
        return (drawn > chance).to(like.dtype)

    def is_left_out(drops: Any, moment: Any, key: str) -> bool:
        return bool(drops.module) and float(fractions(f"{key}/module", (1,))) < drops.module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "kept", kept)
        patch.setattr(lora, "is_left_out", is_left_out)
        yield
