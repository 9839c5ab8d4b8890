"""Images as moments of their latents, and masks of the latents' size: encoded once, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from ..config import TrainConfig
from ..data.cache import TensorCache, key_of
from ..data.images import load_mask, load_pixels, mask_key, pixels_key
from ..data.train_set import TrainSet
from ..engine.precision import Precision, visiting
from ..errors import LoraGraftError
from ..events import Cached
from ..families.opening import Base
from ..parts import Parts

Moments = dict[str, torch.Tensor]
Use = tuple[int, bool]  # a record's index, and whether it is mirrored
Picture = tuple[torch.Tensor, torch.Tensor | None]  # pixels and mask

MID_GREY = 127  # the grey that counts 1 where masks are HCP-Diffusion's


def hcp_weights(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask in [0, 1] as HCP-Diffusion reads its greys: 0 to 127 as 0 to 1, 128 to 255 as 1 to 5."""
    grey = mask * 255
    return torch.where(grey <= MID_GREY, grey / MID_GREY, 1 + (grey - MID_GREY) / (255 - MID_GREY) * 4)


class Pictures:
    """The pictures of a train set, encoded and kept."""

    def __init__(
        self,
        base: Base,
        parts: Parts,
        train_set: TrainSet,
        config: TrainConfig,
        precision: Precision,
        cache: TensorCache,
    ) -> None:
        self.base, self.parts, self.train_set = base, parts, train_set
        self.config, self.precision, self.cache = config, precision, cache
        self.is_masked = config.masked_loss and any(r.mask is not None for r in train_set.records)
        self._moments: dict[Use, Moments] = {}

    def prepare(self) -> Iterator[Cached]:
        """Encode all pictures, unless they are to be encoded at every step."""
        if not self.config.cache_latents:
            nn.Module.to(self.parts.vae, self.precision.device)  # every step uses it
            return
        with visiting(self.parts.vae, self.precision.device):
            yield from self._prepare()

    def moments(self, use: Use) -> Moments:
        """Return a picture's moments (1, C, h, w), and its mask (1, 1, h, w) where it has one."""
        return self._moments[use] if use in self._moments else self._encode(use, self._read(use))

    def _prepare(self) -> Iterator[Cached]:
        uses, missing = self._uses(), dict[Use, str]()
        for use in uses:
            key = self._key(*use)
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

    def _uses(self) -> list[Use]:
        """List what is encoded: every record, and mirrored too where it may be."""
        configs = self.train_set.configs
        return [
            (i, flip) for i, data in enumerate(configs) for flip in (False, True) if data.flip_aug or not flip
        ]

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
        mask = load_mask(*where)[None, None] if self._has_mask(index) else None
        if mask is not None and self.config.mask_range == "hcp":
            mask = hcp_weights(mask)
        return (pixels.flip(-1) if flip else pixels), mask

    def _has_mask(self, index: int) -> bool:
        return self.config.masked_loss and self.train_set.records[index].mask is not None

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

    def _key(self, index: int, flip: bool) -> str:
        record, has_mask = self.train_set.records[index], self._has_mask(index)
        edits: dict[str, object] = {
            "mask": (mask_key(record) or None) if has_mask else None,
            "mask_range": self.config.mask_range if has_mask and self.config.mask_range != "kohya" else None,
            "flip": flip or None,
        }
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
