"""The run's data as micro-batches.

Every draw is a function of (seed, step, sample), so resuming, sampling in between and interrupts
cannot change a result. Images and captions are encoded one at a time, so that neither the batch nor
the cache changes a bit of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..config import TrainConfig
from ..contradictions.refusals import contradiction
from ..data.batches import Batch
from ..data.cache import TensorCache
from ..data.train_set import TrainSet
from ..engine.precision import Precision
from ..engine.steps import Tensors
from ..events import Cached
from ..families.base import Texts
from ..families.opening import Base
from ..objective import generator
from ..parts import Parts
from .lengths import fitted
from .noise import draw_noise, draw_timestep
from .pictures import Pictures
from .sizes import sizes_of
from .texts import Captions, draw_caption, keeps_text


class Fed(NamedTuple):
    """One micro-batch, on the CPU: latents and noise (B, C, h, w), timesteps t (B,), text, loss weights.

    ``text`` is the conditioning where captions are encoded before, else their tokens: tensors (B, ...), as
    the family has them. ``weight`` (B,) is there where regularisation images count otherwise, ``mask``
    (B, 1, h, w) where a picture has one, ``perturbed`` (B, C, h, w) where the model sees another noise than
    it is to predict, and ``sizes`` (B, 6) where the model is told the pictures' sizes.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    text: Texts
    weight: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    perturbed: torch.Tensor | None = None
    sizes: torch.Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        """All of it as one row, as the engines take it; the text comes last."""
        fixed = self.latents, self.noise, self.t, self.weight, self.mask, self.perturbed, self.sizes
        return (*fixed, *self.text)

    @classmethod
    def of(cls, tensors: Tensors) -> Fed:
        """Return what `tensors` made a row of."""
        latents, noise, t, weight, mask, perturbed, sizes, *text = tensors
        return cls(latents, noise, t, tuple(text), weight, mask, perturbed, sizes)  # type: ignore[arg-type]


class Inputs:
    """The run's data: encodes it, keeps it, and draws from it."""

    def __init__(
        self,
        base: Base,
        parts: Parts,
        train_set: TrainSet,
        config: TrainConfig,
        precision: Precision,
        cache: TensorCache,
        train_text: bool,
        total_steps: int = 1,
    ) -> None:
        self.base, self.parts, self.train_set = base, parts, train_set
        self.config, self.precision, self.cache = config, precision, cache
        self.total_steps = total_steps
        self.pictures = Pictures(base, parts, train_set, config, precision, cache)
        self.texts = Captions(base, parts, train_set, config, precision, cache, total_steps)
        self.keeps_text = keeps_text(train_set, train_text, config)
        if self.keeps_text:
            self.texts.reading = fitted(base.family, parts, train_set, self.texts.reading)
        uses = zip(train_set.records, train_set.configs, strict=True)
        self.is_weighted = any(record.is_reg and data.prior_loss_weight != 1 for record, data in uses)
        self.is_masked = self.pictures.is_masked

    def prepare(self) -> Iterator[Cached]:
        """Encode all images, and the captions where that can be before; the cache serves what it has."""
        yield from self.pictures.prepare()
        if self.keeps_text:
            yield from self.texts.prepare()

    def draw(self, step: int, first_sample: int, batch: Batch) -> Fed:
        """Draw one micro-batch; its samples are numbered from ``first_sample`` within the step."""
        seed, family, config = self.config.seed, self.base.family, self.config
        latents, noises, timesteps, captions, masks = [], [], [], [], []
        perturbed: list[torch.Tensor] = []
        flips = batch.flips or (False,) * len(batch.indices)
        for sample, use in enumerate(zip(batch.indices, flips, strict=True), first_sample):
            moments = self.pictures.moments(use)
            shape = moments["mean"].shape
            posterior = torch.randn(shape, generator=generator(seed, step, sample, "posterior"))
            latents.append(family.latents(moments, posterior))
            noise, disturbed = draw_noise(config, latents[-1], step, sample)
            noises.append(noise)
            perturbed += [] if disturbed is None else [disturbed]
            timesteps.append(draw_timestep(config, family.objective, batch.bucket, step, sample))
            captions.append(
                draw_caption(self.train_set, use[0], seed, step, sample, batch.epoch, self.total_steps)
            )
            if self.is_masked:
                masks.append(moments.get("mask", torch.ones(1, 1, *shape[2:])))
        return Fed(
            torch.cat(latents),
            torch.cat(noises),
            torch.cat(timesteps),
            self._text(captions),
            torch.tensor(batch.loss_weights) if self.is_weighted else None,
            torch.cat(masks) if self.is_masked else None,
            torch.cat(perturbed) if perturbed else None,
            sizes_of(self.train_set, batch) if family.uses_sizes else None,
        )

    def embed(self, text: Texts) -> Texts:
        """Return the conditioning of a `Fed`'s text; what is encoded here carries gradients."""
        return text if self.keeps_text else self.texts.encode(text, grad=True)

    def _text(self, captions: list[str]) -> Texts:
        """Return captions as a `Fed` holds them: their conditioning, or their tokens."""
        if not self.keeps_text:
            return self.texts.tokenize(captions)
        kept = [self.texts.kept(caption) for caption in captions]
        if len({tuple(x.shape for x in cond) for cond in kept}) > 1:
            raise contradiction(
                "The captions of one batch are encoded to different lengths.",
                "train_batch_size",
                why=f"{self.base.family.name} has no fixed length for captions, and a batch needs one.",
                fix="set train_batch_size to 1 (gradient_accumulation_steps makes steps larger)",
            )
        return tuple(torch.cat(column) for column in zip(*kept, strict=True))
