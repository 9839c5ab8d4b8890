"""What a step is fed: latents and conditioning, encoded once where they can be, and the step's random draws.

Every draw is a function of (seed, step, sample), so resuming, sampling in between and interrupts
cannot change a result. Images and captions are encoded one at a time, so that neither the batch nor
the cache changes a bit of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .config import TrainConfig
from .data.batches import Batch
from .data.cache import TensorCache, key_of
from .data.captions import vary_caption
from .data.images import load_pixels
from .data.train_set import TrainSet
from .engine.precision import Precision
from .errors import LoraGraftError
from .events import Cached
from .families.opening import Base
from .objective import generator
from .parts import Parts

Moments = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fed:
    """One micro-batch on the device: latents, noise (B, C, h, w), timesteps t (B,) and captions."""

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    captions: tuple[str, ...]


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
    ) -> None:
        self.base, self.parts, self.train_set = base, parts, train_set
        self.config, self.precision, self.cache = config, precision, cache
        data = train_set.config
        static = not data.shuffle_caption and data.caption_tag_dropout_rate == 0
        self.keeps_text = static and not train_text
        self._moments: dict[int, Moments] = {}
        self._cond: dict[str, torch.Tensor] = {}

    def prepare(self) -> Iterator[Cached]:
        """Encode all images, and the captions where they cannot change; the cache serves what it has."""
        if self.config.cache_latents:
            hits, total = 0, len(self.train_set.records)
            for index in range(total):
                key = self._image_key(index)
                found = self.cache.get(key)
                if found is None:
                    found = self._encode_image(index)
                    self.cache.put(key, found)
                else:
                    hits += 1
                self._moments[index] = found
                yield Cached("images", index + 1, total, hits)
            self.parts.vae.to("cpu")
        if self.keeps_text:
            captions = sorted({record.caption for record in self.train_set.records})
            if self.train_set.config.caption_dropout_rate > 0:
                captions = ["", *captions]
            hits = 0
            for done, caption in enumerate(captions, 1):
                key = self._text_key(caption)
                stored = self.cache.get(key)
                if stored is None:
                    stored = {"cond": self._encode_captions([caption]).cpu()}
                    self.cache.put(key, stored)
                else:
                    hits += 1
                self._cond[caption] = stored["cond"]
                yield Cached("captions", done, len(captions), hits)

    def draw(self, step: int, first_sample: int, batch: Batch) -> Fed:
        """Draw one micro-batch; its samples are numbered from ``first_sample`` within the step."""
        device, seed, family = self.precision.device, self.config.seed, self.base.family
        latents, noises, timesteps, captions = [], [], [], []
        for sample, index in enumerate(batch.indices, first_sample):
            moments = self._moments[index] if index in self._moments else self._encode_image(index)
            shape = moments["mean"].shape
            posterior = torch.randn(shape, generator=generator(seed, step, sample, "posterior"))
            latents.append(family.latents(moments, posterior))
            noises.append(torch.randn(shape, generator=generator(seed, step, sample, "noise")))
            t = torch.randint(
                0, family.schedule.num_timesteps, (1,), generator=generator(seed, step, sample, "t")
            )
            timesteps.append(t)
            rng = random.Random(f"{seed}-{step}-{sample}-caption")
            captions.append(vary_caption(self.train_set.records[index].caption, self.train_set.config, rng))
        return Fed(
            torch.cat(latents).to(device),
            torch.cat(noises).to(device),
            torch.cat(timesteps).to(device),
            tuple(captions),
        )

    def cond(self, captions: tuple[str, ...]) -> torch.Tensor:
        """Return the conditioning (B, L, D); kept where captions cannot change, else encoded now."""
        if self.keeps_text:
            return torch.cat([self._cond[c] for c in captions]).to(self.precision.device)
        return self._encode_captions(list(captions), grad=True)

    def _encode_captions(self, captions: list[str], *, grad: bool = False) -> torch.Tensor:
        family, config = self.base.family, self.config
        ids = family.tokenize(self.parts, captions, config.max_token_length).to(self.precision.device)
        with torch.set_grad_enabled(grad), self.precision.autocast():
            return family.encode_text(self.parts, ids, config.clip_skip)

    @torch.no_grad()
    def _encode_image(self, index: int) -> Moments:
        """Encode one image's moments (1, C, h, w) on the CPU; raises LG-RUN-005 if they are not finite."""
        data = self.train_set
        record = data.records[index]
        self.parts.vae.to(self.precision.device)
        pixels = load_pixels(record, data.buckets[index], data.resized[index]).unsqueeze(0)
        pixels = pixels.to(self.precision.device)
        moments = {k: v.cpu() for k, v in self.base.family.encode_images(self.parts, pixels).items()}
        if not all(bool(torch.isfinite(v).all()) for v in moments.values()):
            raise LoraGraftError(
                "LG-RUN-005",
                "The VAE made a value that is not finite.",
                where=record.name,
                why="training on it would destroy the LoRA.",
                fix="remove this image, or use another VAE: this one may be broken",
            )
        return moments

    def _image_key(self, index: int) -> str:
        return key_of(
            kind="latents",
            image=self.train_set.records[index].content_hash,
            bucket=list(self.train_set.buckets[index]),
            resized=list(self.train_set.resized[index]),
            vae=self.base.part_hash("vae"),
            family=self.base.family.name,
            device=self.precision.device.type,
        )

    def _text_key(self, caption: str) -> str:
        ids = self.base.family.tokenize(self.parts, [caption], self.config.max_token_length)
        return key_of(
            kind="text",
            ids=ids.flatten().tolist(),
            clip_skip=self.config.clip_skip,
            text_encoder=self.base.part_hash("text_encoder"),
            precision=self.precision.name,
            device=self.precision.device.type,
        )
