"""What a step is fed: latents and conditioning, encoded once where they can be, and the step's random draws.

Every draw is a function of (seed, step, sample), so resuming, sampling in between and interrupts
cannot change a result. Images and captions are encoded one at a time, so that neither the batch nor
the cache changes a bit of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import TrainConfig
from .data.batches import Batch
from .data.cache import TensorCache, key_of
from .data.captions import fixed_captions, vary_caption
from .data.images import load_mask, load_pixels, mask_key, pixels_key
from .data.train_set import TrainSet
from .engine.precision import Precision, visiting
from .errors import LoraGraftError
from .events import Cached
from .families.opening import Base
from .objective import generator
from .parts import Parts

Moments = dict[str, torch.Tensor]
Use = tuple[int, bool]  # a record's index, and whether it is mirrored
Picture = tuple[torch.Tensor, torch.Tensor | None]  # pixels and mask


class Fed(NamedTuple):
    """One micro-batch, on the CPU: latents and noise (B, C, h, w), timesteps t (B,), text, loss weights.

    ``text`` is the conditioning (B, L, D) where captions are encoded once, else token ids. ``weight``
    (B,) is there where regularisation images count otherwise, ``mask`` (B, 1, h, w) where a picture has one.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    text: torch.Tensor
    weight: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def keeps_text(train_set: TrainSet, train_text: bool) -> bool:
    """Say whether captions are encoded once: the text encoder is not trained, and none of them varies."""
    uses = zip(train_set.records, train_set.configs, strict=True)
    return not train_text and all(fixed_captions(record.caption, data) is not None for record, data in uses)


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
        uses = list(zip(train_set.records, train_set.configs, strict=True))
        self.keeps_text = keeps_text(train_set, train_text)
        fixed = [fixed_captions(record.caption, data) for record, data in uses]
        self.is_weighted = any(record.is_reg and data.prior_loss_weight != 1 for record, data in uses)
        self.is_masked = any(record.mask is not None for record in train_set.records)
        self._captions = sorted({text for texts in fixed for text in texts or ()})
        self._moments: dict[Use, Moments] = {}
        self._cond: dict[str, torch.Tensor] = {}

    def prepare(self) -> Iterator[Cached]:
        """Encode all images, and the captions where they cannot change; the cache serves what it has."""
        if self.config.cache_latents:
            with visiting(self.parts.vae, self.precision.device):
                yield from self._prepare_images()
        else:
            nn.Module.to(self.parts.vae, self.precision.device)  # every step uses it
        if self.keeps_text:
            with visiting(self.parts.text_encoder, self.precision.device):
                yield from self._prepare_captions()

    def _prepare_images(self) -> Iterator[Cached]:
        uses, missing = self._uses(), dict[Use, str]()
        for use in uses:
            key = self._image_key(*use)
            found = self.cache.get(key)
            if found is None:
                missing[use] = key
                continue
            self._moments[use] = found
            yield Cached("images", len(self._moments), len(uses), len(self._moments))
        hits = len(self._moments)
        for use, picture in self._read_ahead(list(missing)):
            self._moments[use] = self._encode(use, picture)
            self.cache.put(missing[use], self._moments[use])
            yield Cached("images", len(self._moments), len(uses), hits)

    def _prepare_captions(self) -> Iterator[Cached]:
        captions, hits = self._captions, 0
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
        seed, family = self.config.seed, self.base.family
        latents, noises, timesteps, captions, masks = [], [], [], [], []
        flips = batch.flips or (False,) * len(batch.indices)
        for sample, use in enumerate(zip(batch.indices, flips, strict=True), first_sample):
            moments = self._moments[use] if use in self._moments else self._encode(use, self._read(use))
            shape = moments["mean"].shape
            posterior = torch.randn(shape, generator=generator(seed, step, sample, "posterior"))
            latents.append(family.latents(moments, posterior))
            noises.append(torch.randn(shape, generator=generator(seed, step, sample, "noise")))
            t = torch.randint(
                0, family.schedule.num_timesteps, (1,), generator=generator(seed, step, sample, "t")
            )
            timesteps.append(t)
            rng = random.Random(f"{seed}-{step}-{sample}-caption")
            record, data = self.train_set.records[use[0]], self.train_set.configs[use[0]]
            captions.append(
                vary_caption(
                    record.caption, data, rng, epoch=batch.epoch, step=step, total_steps=self.total_steps
                )
            )
            if self.is_masked:
                masks.append(moments.get("mask", torch.ones(1, 1, *shape[2:])))
        return Fed(
            torch.cat(latents),
            torch.cat(noises),
            torch.cat(timesteps),
            torch.cat([self._cond[c] for c in captions]) if self.keeps_text else self._tokenize(captions),
            torch.tensor(batch.loss_weights) if self.is_weighted else None,
            torch.cat(masks) if self.is_masked else None,
        )

    def embed(self, text: torch.Tensor) -> torch.Tensor:
        """Return the conditioning (B, L, D) of a `Fed`'s text; what is encoded here carries gradients."""
        return text if self.keeps_text else self._encode_text(text, grad=True)

    def _uses(self) -> list[Use]:
        """List what is encoded: every record, and mirrored too where it may be."""
        configs = self.train_set.configs
        return [
            (i, flip) for i, data in enumerate(configs) for flip in (False, True) if data.flip_aug or not flip
        ]

    def _tokenize(self, captions: list[str]) -> torch.Tensor:
        return self.base.family.tokenize(self.parts, captions, self.config.max_token_length)

    def _encode_captions(self, captions: list[str]) -> torch.Tensor:
        return self._encode_text(self._tokenize(captions).to(self.precision.device), grad=False)

    def _encode_text(self, ids: torch.Tensor, *, grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            return self.base.family.encode_text(self.parts, ids, self.config.clip_skip)

    def _read_ahead(self, uses: list[Use]) -> Iterator[tuple[Use, Picture]]:
        """Read pictures in order; the next one is read while the caller encodes."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            reading = [reader.submit(self._read, use) for use in uses[:1]]
            for number, use in enumerate(uses, 1):
                picture = reading.pop().result()
                reading = [reader.submit(self._read, following) for following in uses[number : number + 1]]
                yield use, picture

    def _read(self, use: Use) -> Picture:
        """Read pixels (1, 3, H, W), mirrored where the use is, and the mask (1, 1, H, W), which is not."""
        (index, flip), data = use, self.train_set
        where = data.records[index], data.buckets[index], data.resized[index]
        pixels = load_pixels(*where)[None]
        mask = None if where[0].mask is None else load_mask(*where)[None, None]
        return (pixels.flip(-1) if flip else pixels), mask

    @torch.no_grad()
    def _encode(self, use: Use, picture: Picture) -> Moments:
        """Encode one image's moments (1, C, h, w), and its mask (1, 1, h, w), on the CPU.

        Raises LG-RUN-005 if they are not finite.
        """
        record, (pixels, mask) = self.train_set.records[use[0]], picture
        pixels = pixels.to(self.precision.device)
        moments = {k: v.cpu() for k, v in self.base.family.encode_images(self.parts, pixels).items()}
        if mask is not None:
            # One value for each latent pixel: the mean of what it covers, as kohya scales masks.
            small = F.interpolate(mask, moments["mean"].shape[2:], mode="area")
            moments["mask"] = small.flip(-1) if use[1] else small
        if not all(bool(torch.isfinite(v).all()) for v in moments.values()):
            raise LoraGraftError(
                "LG-RUN-005",
                "The VAE made a value that is not finite.",
                where=record.name,
                why="training on it would destroy the LoRA.",
                fix="remove this image, or use another VAE: this one may be broken",
            )
        return moments

    def _image_key(self, index: int, flip: bool) -> str:
        record = self.train_set.records[index]
        edits: dict[str, object] = {"mask": mask_key(record) or None, "flip": flip or None}
        return key_of(
            **pixels_key(record),
            **{name: value for name, value in edits.items() if value is not None},
            kind="latents",
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
            # Before, half precision went through autocast; its entries differ in the last bits.
            **({} if self.precision.name == "fp32" else {"autocast": False}),
            device=self.precision.device.type,
        )
