"""Enlarge small pictures with an upscale model, at most twice; the results go into a working copy."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from ..errors import LoraGraftError, listed
from .images import load_upright, shown, upright_mask
from .options import bad_option
from .records import Dataset, Record
from .report import counted
from .working_copy import Encoding, Item, copy_key, own_stems, write_items

Size = tuple[int, int]

MAX_FACTOR = 2.0  # beyond it a model invents more than it keeps, and the LoRA learns the invention
TILES = (512, 256, 128)  # tried in turn where memory is short
OVERLAP = 32  # pixels around a tile that are computed and thrown away, so that no seam is seen


@dataclasses.dataclass(frozen=True)
class Upscaler:
    """An upscale model: ``run`` takes (1, 3, H, W) float32 in 0..1 and gives it ``scale`` times as large.

    ``key`` names the weights, for the working copy.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    scale: int
    key: str


def upscale_small(
    dataset: Dataset,
    folder: Path | str,
    upscaler: Upscaler,
    *,
    target: int,
    encoding: Encoding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Return the dataset with each picture of less than ``target`` x ``target`` pixels' area enlarged to it.

    No side grows more than MAX_FACTOR times, nor more than the model enlarges. The enlarged pictures, with
    their crops applied, and their masks are written into ``folder``; all other records stay as they are.
    ``progress`` is called after each picture. Raises LG-CFG-003, LG-DATA-055, those of `write_items`.
    """
    if not 1 <= target <= 65_536:
        raise bad_option("upscale_to", target, "1 to 65536")
    if upscaler.scale < 2:
        raise _no_upscaler(f"it makes pictures {upscaler.scale} times as large.")
    small = {
        number: size
        for number, record in enumerate(dataset.records)
        if (size := enlarged_size(record, target, upscaler.scale))
    }
    if not small:
        return dataset.replaced(
            dataset.records, f"No picture is smaller than {target}x{target}: none enlarged."
        )
    encoding = encoding or Encoding()
    originals = [_with_hash(dataset.records[number]) for number in small]
    items = [
        _item(record, stem + encoding.suffix, size, upscaler, encoding)
        for record, stem, size in zip(originals, own_stems(originals), small.values(), strict=True)
    ]
    # One picture at a time: the model takes all of the device by itself.
    copy = write_items(folder, items, progress=progress, workers=1)
    records = list(dataset.records)
    for number, record in zip(small, copy.dataset.records, strict=True):
        records[number] = record
    return dataset.replaced(records, *_lines(originals, list(small.values()), target), *copy.dataset.lines)


def enlarged_size(record: Record, target: int, scale: float = MAX_FACTOR) -> Size | None:
    """Return the (width, height) that a record's picture is enlarged to; None where it is large enough."""
    height, width = record.size
    factor = min(target / math.sqrt(width * height), MAX_FACTOR, scale)
    size = round(width * factor), round(height * factor)
    return size if factor > 1 and size != (width, height) else None


def enlarged(image: Image.Image, size: Size, upscaler: Upscaler) -> Image.Image:
    """Return an RGB picture enlarged by the model, then brought to ``size`` (width, height)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None].float().div_(255)
    large = (enlarged_in_tiles(pixels, upscaler)[0].clamp(0, 1) * 255).round().to(torch.uint8)
    result = Image.fromarray(np.ascontiguousarray(large.permute(1, 2, 0).numpy()))
    return result if result.size == size else result.resize(size, Image.Resampling.LANCZOS)


def enlarged_in_tiles(pixels: torch.Tensor, upscaler: Upscaler) -> torch.Tensor:
    """Return (1, 3, H, W) enlarged, tile by tile; smaller tiles where the memory of a GPU is short."""
    for tile in TILES:
        try:
            with torch.no_grad():
                return _tiled(pixels, upscaler, tile)
        except torch.cuda.OutOfMemoryError:
            if tile == TILES[-1]:
                raise
            torch.cuda.empty_cache()
    raise AssertionError("the last tile size returns or raises")


def open_upscaler(path: Path | str, device: str = "cpu") -> Upscaler:
    """Open an upscale model from a .safetensors file with the package spandrel; raises LG-DATA-055."""
    file = Path(path)
    if file.suffix != ".safetensors":
        raise _no_upscaler(f"{shown(file.name)} is no .safetensors file; other formats can run code.")
    try:
        spandrel = importlib.import_module("spandrel")
    except ImportError as error:
        raise _no_upscaler(
            f"the package spandrel is missing: python -m pip install spandrel ({error})."
        ) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
        model = spandrel.ModelLoader(device=device).load_from_state_dict(weights)
    except (OSError, SafetensorError, spandrel.UnsupportedModelError) as error:
        raise _no_upscaler(f"{shown(file.name)} cannot be read: {shown(error, 100)}.") from error
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise _no_upscaler(f"{shown(file.name)} is no model that turns one picture into another.")
    model.to(device).model.train(False)
    return Upscaler(lambda pixels: model(pixels.to(device)), int(model.scale), weights_key(weights))


def weights_key(weights: dict[str, torch.Tensor]) -> str:
    """Return a hash of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


# ---- one picture ----


def _item(record: Record, name: str, size: Size, upscaler: Upscaler, encoding: Encoding) -> Item:
    def render(file: IO[bytes]) -> None:
        encoding.save(enlarged(load_upright(record), size, upscaler), file)

    def render_mask(file: IO[bytes]) -> None:
        mask = upright_mask(record).resize(size, Image.Resampling.BILINEAR)
        Encoding("png").save(mask, file)

    key = copy_key(record, encoding, "upscale", upscaler.key, upscaler.scale, size)
    return Item(record, name, key, render, render_mask if record.mask is not None else None)


def _tiled(pixels: torch.Tensor, upscaler: Upscaler, tile: int) -> torch.Tensor:
    _, channels, height, width = pixels.shape
    scale = upscaler.scale
    result = torch.empty(1, channels, height * scale, width * scale)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(height, top + tile), min(width, left + tile)
            y, x = max(0, top - OVERLAP), max(0, left - OVERLAP)
            seen = pixels[:, :, y : min(height, bottom + OVERLAP), x : min(width, right + OVERLAP)]
            part = upscaler.run(seen).float().cpu()
            if part.shape[2:] != (seen.shape[2] * scale, seen.shape[3] * scale) or part.shape[1] != channels:
                raise _no_upscaler(f"it made {tuple(part.shape)} of {tuple(seen.shape)}, expected x{scale}.")
            result[:, :, top * scale : bottom * scale, left * scale : right * scale] = part[
                :, :, (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
            ]
    return result


def _with_hash(record: Record) -> Record:
    """Return the record with its content hash: the working copy is keyed by it."""
    try:
        data = b"" if record.content_hash else record.path.read_bytes()
    except OSError:  # reading the picture will say so
        return record
    digest = record.content_hash or hashlib.sha256(data).hexdigest()
    return dataclasses.replace(record, content_hash=digest)


def _lines(originals: list[Record], sizes: list[Size], target: int) -> list[str]:
    factors = [
        math.sqrt(width * height / (record.size[0] * record.size[1]))
        for record, (width, height) in zip(originals, sizes, strict=True)
    ]
    lines = [f"Enlarged, {min(factors):.2f} to {max(factors):.2f} times: {counted(len(sizes), 'picture')}."]
    still = [
        f"{shown(record.name)} ({width}x{height})"
        for record, (width, height) in zip(originals, sizes, strict=True)
        if width * height < 0.99 * target**2
    ]
    if still:
        lines.append(f"Still smaller than {target}x{target}, for nothing grows further: {listed(still)}")
    return lines


def _no_upscaler(why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-055",
        "The upscale model cannot be used.",
        where="upscale_model",
        why=why,
        fix="take an ESRGAN-like model that makes pictures 2 or 4 times as large, as .safetensors",
    )
