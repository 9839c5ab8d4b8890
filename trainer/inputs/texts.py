"""Captions as conditioning: which text a sample draws, and encodings that are made once and kept.

What a sample draws is a function of (seed, step, sample), so every text that a run will draw is known before
it starts. Where varied captions are kept too, exactly these texts are encoded before step 1: the captions
that are trained on, and how often, are the same as without keeping.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping

import torch

from ..config import TrainConfig, token_length
from ..data.batches import Batch, plan_epoch
from ..data.cache import TensorCache, key_of
from ..data.captions import fixed_captions, vary_caption
from ..data.train_set import TrainSet
from ..engine.precision import Precision, visiting
from ..errors import LoraGraftError
from ..events import Cached
from ..families.base import Reading, Texts
from ..families.opening import Base
from ..parts import Parts

IN_MEMORY = 2**30  # bytes of encoded captions that are held; the others are read again when they are drawn
LEAST_BYTES = 64 * 2**20  # below, the disk is not asked
SPARE_BYTES = 256 * 2**20  # what encoded captions leave free on a disk


def keeps_text(train_set: TrainSet, train_text: bool, config: TrainConfig) -> bool:
    """Say whether all captions are encoded before step 1: nothing in the text encoder is trained, and no
    caption varies or the varied ones are to be kept too.
    """
    if train_text or config.train_embeddings:
        return False
    uses = zip(train_set.records, train_set.configs, strict=True)
    return config.cache_text_encoder_outputs or all(
        fixed_captions(record.caption, data) is not None for record, data in uses
    )


def draw_caption(
    train_set: TrainSet, index: int, seed: int, step: int, sample: int, epoch: int, total_steps: int
) -> str:
    """Return the caption that one sample of one step sees of a record."""
    rng = random.Random(f"{seed}-{step}-{sample}-caption")
    record, data = train_set.records[index], train_set.configs[index]
    return vary_caption(record.caption, data, rng, epoch=epoch, step=step, total_steps=total_steps)


def planned_uses(
    train_set: TrainSet, config: TrainConfig, total_steps: int
) -> Iterator[tuple[int, int, Batch]]:
    """Yield every micro-batch of a run as (step, number of its first sample within the step, batch)."""
    step, epoch = 0, 0
    while True:
        batches = plan_epoch(train_set, config.train_batch_size, config.seed, epoch)
        for start in range(0, len(batches), config.gradient_accumulation_steps):
            if step == total_steps:
                return
            sample = 0
            for batch in batches[start : start + config.gradient_accumulation_steps]:
                yield step, sample, batch
                sample += len(batch.indices)
            step += 1
        epoch += 1


def reading_of(config: TrainConfig) -> Reading:
    """Return how a run reads its captions."""
    return Reading(
        token_length(config),
        config.clip_skip,
        config.weighted_captions,
        config.weighted_captions_keep_mean,
        config.t5xxl_max_token_length,
        config.apply_t5_attn_mask,
    )


class Captions:
    """The captions of a train set as conditioning."""

    def __init__(
        self,
        base: Base,
        parts: Parts,
        train_set: TrainSet,
        config: TrainConfig,
        precision: Precision,
        cache: TensorCache,
        total_steps: int,
    ) -> None:
        self.base, self.parts, self.train_set = base, parts, train_set
        self.config, self.precision, self.cache = config, precision, cache
        self.total_steps = total_steps
        self.reading = reading_of(config)
        self._cond: dict[str, Texts] = {}
        self._held = 0

    def prepare(self) -> Iterator[Cached]:
        """Encode every text that the run will draw; raises LG-DATA-011 where they do not fit on the disk."""
        texts, hits = self._texts(), 0
        with visiting(self.parts.text_encoders, self.precision.device):
            for done, caption in enumerate(texts, 1):
                cond, was_there = self._stored(caption)
                hits += was_there
                size = sum(x.nbytes for x in cond)
                if done == 1:
                    self._check_room(len(texts) * size)
                if self._held + size <= IN_MEMORY:
                    self._cond[caption], self._held = cond, self._held + size
                yield Cached("captions", done, len(texts), hits)

    def kept(self, caption: str) -> Texts:
        """Return a caption's conditioning, tensors (1, ...), on the CPU."""
        if caption in self._cond:
            return self._cond[caption]
        if (stored := self.cache.get(self._key(caption))) is not None:
            return _in_order(stored)
        with visiting(self.parts.text_encoders, self.precision.device):
            return self._stored(caption)[0]

    def tokenize(self, captions: list[str]) -> Texts:
        """Return the captions' tokens, tensors (B, ...)."""
        return self.base.family.tokenize(self.parts, captions, self.reading)

    def encode(self, tokens: Texts, *, grad: bool) -> Texts:
        """Return the conditioning, tensors (B, ...), for tokens on the encoders' device."""
        with torch.set_grad_enabled(grad):
            return self.base.family.encode_text(self.parts, tokens, self.reading)

    def _texts(self) -> list[str]:
        """List every text that can come: all forms of captions that never vary, and what the others draw."""
        uses = zip(self.train_set.records, self.train_set.configs, strict=True)
        fixed = [fixed_captions(record.caption, data) for record, data in uses]
        texts = {text for forms in fixed for text in forms or ()}
        if all(forms is not None for forms in fixed):
            return sorted(texts)
        seed, total = self.config.seed, self.total_steps
        for step, first, batch in planned_uses(self.train_set, self.config, total):
            for sample, index in enumerate(batch.indices, first):
                if fixed[index] is None:
                    drawn = draw_caption(self.train_set, index, seed, step, sample, batch.epoch, total)
                    texts.add(drawn)
        return sorted(texts)

    def _stored(self, caption: str) -> tuple[Texts, bool]:
        """Return a caption's conditioning from the cache, else encode it; and whether it was there."""
        key = self._key(caption)
        stored = self.cache.get(key)
        if stored is not None:
            return _in_order(stored), True
        tokens = tuple(x.to(self.precision.device) for x in self.tokenize([caption]))
        cond = tuple(x.cpu() for x in self.encode(tokens, grad=False))
        self.cache.put(key, {_name(number): x for number, x in enumerate(cond)})
        return cond, False

    def _key(self, caption: str) -> str:
        ids, *others = self.tokenize([caption])
        more: dict[str, object] = {}
        if others:
            more["tokens"] = [x.flatten().tolist() for x in others]
        if self.reading.weighted:
            more["keep_mean"] = self.reading.keep_mean
        if self.reading.mask_padding:
            more["mask_padding"] = True
        return key_of(
            kind="text",
            family=self.base.family.name,  # what one makes of a text encoder's states, another does not
            ids=ids.flatten().tolist(),
            clip_skip=self.config.clip_skip,
            text_encoder=self.base.text_hash,
            precision=self.precision.name,
            # Before, half precision went through autocast; its entries differ in the last bits.
            **({} if self.precision.name == "fp32" else {"autocast": False}),
            **more,
            device=self.precision.device.type,
        )

    def _check_room(self, needed: int) -> None:
        """Refuse to fill a disk; what is in the cache already is counted as if it were not."""
        if needed < LEAST_BYTES:
            return
        free = shutil.disk_usage(self.cache.folder).free
        if needed > free - SPARE_BYTES:
            raise LoraGraftError(
                "LG-DATA-011",
                "The encoded captions do not fit on the disk.",
                where=f"{self.cache.folder}: {needed / 2**30:.1f} GiB for all texts that the run draws, "
                f"{free / 2**30:.1f} GiB are free",
                why="captions vary from use to use, and each text is kept.",
                fix="free some space, or set cache_text_encoder_outputs to false",
            )


def _name(number: int) -> str:
    """Name a tensor of a conditioning in the cache."""
    return f"cond_{number}" if number else "cond"


def _in_order(stored: Mapping[str, torch.Tensor]) -> Texts:
    return tuple(stored[_name(number)] for number in range(len(stored)))
