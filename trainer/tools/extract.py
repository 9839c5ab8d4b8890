"""Extract a LoRA from two checkpoints: the difference of their weights, approximated at a rank.

Each difference is taken apart by its singular values, up = U S, down = V'. As in kohya's
extract_lora_from_models, values beyond the ``clamp_quantile`` of both are cut off, and a text encoder is
left out where no weight of it differs by more than ``min_diff``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.files import compact
from ..errors import LoraGraftError, listed
from ..families import detect
from ..families.sources.sources import Source, parts_of
from ..families.sources.weights import FileWeights, joined
from ..metadata import LORA, MODULE
from .deltas import KOHYA
from .lora_file import PLAIN, LoraFile, Module
from .places import Place, trained_in
from .stream import open_weights

QUANTILE_VALUES = 2**24  # torch's quantile takes no more
IN_BLOCK = re.compile(r"(^|model\.)(\w*blocks?|layers|\w+_refiner)\.\d")  # of U-Nets and transformers


@dataclass(frozen=True)
class ExtractSettings:
    """Ranks, and what is cut off; ``conv_rank`` None leaves 3x3 convolutions out."""

    rank: int = 4
    conv_rank: int | None = None
    clamp_quantile: float = 0.99
    min_diff: float = 0.01


@dataclass(frozen=True)
class Extracted:
    """What became of one module; ``error`` is the part of the difference's norm that is not in it."""

    name: str
    rank: int
    norm: float
    error: float

    def __str__(self) -> str:
        return f"{self.name}: rank {self.rank}, difference {self.norm:.4g}, error {self.error:.2%}"


def extract_lora(
    original: Path,
    tuned: Path,
    settings: ExtractSettings,
    *,
    device: str = "cpu",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LoraFile, list[Extracted]]:
    """Return the LoRA that makes ``tuned`` of ``original``, and how well it does.

    Raises LG-TOOL-005, -008, -012, -013.
    """
    _check(settings)
    first, second = open_weights(original), open_weights(tuned)
    places = _common_places(first, second, settings, f"{original.name}, {tuned.name}")
    places = _without_same_texts(places, first, second, settings.min_diff)
    places = {name: p for name, p in places.items() if _is_of_interest(name, p, first, second)}
    modules: dict[str, Module] = {}
    report: list[Extracted] = []
    for done, (name, place) in enumerate(places.items(), 1):
        difference = _difference(first, second, place).to(device)
        module = _module(name, difference, settings)
        up, down = module.factors()
        norm = float(difference.norm())
        error = float((up @ down - difference.flatten(1).cpu()).norm()) / norm if norm else 0.0
        modules[name] = module
        report.append(Extracted(name, module.rank, norm, error))
        tell(done, len(places))
    if not any(told.norm for told in report):
        raise LoraGraftError(
            "LG-TOOL-012",
            "The two checkpoints do not differ.",
            where=f"{original.name}, {tuned.name}",
            why="the LoRA would change nothing.",
            fix="name the original model and a model that was trained from it",
        )
    return LoraFile(modules, _metadata(original, first, tuned, settings), tuned.stem), report


def _without_same_texts(
    places: dict[str, Place], first: FileWeights, second: FileWeights, min_diff: float
) -> dict[str, Place]:
    """Leave out the text encoders of which no weight differs by more than ``min_diff``."""
    encoders: dict[str, list[Place]] = {}
    for name, place in places.items():
        if name.startswith("lora_te"):
            encoders.setdefault(name.split("_")[1], []).append(place)
    same = tuple(
        f"lora_{encoder}_"
        for encoder, own in encoders.items()
        if not any(_difference(first, second, place).abs().max() > min_diff for place in own)
    )
    return {name: place for name, place in places.items() if not name.startswith(same)}


def _is_of_interest(name: str, place: Place, first: FileWeights, second: FileWeights) -> bool:
    """Say whether a module is one that LoRAs train, or another one of a transformer's that differs.

    Those are the layers outside of its numbered blocks, which no LoRA of the reference trainer has.
    """
    outside = name.startswith("lora_unet_") and not IN_BLOCK.search(place.key)
    return not outside or bool(_difference(first, second, place).any())


def _module(name: str, difference: torch.Tensor, settings: ExtractSettings) -> Module:
    out, fan_in, *kernel = difference.shape
    large = bool(kernel) and tuple(kernel) != (1, 1)
    wanted = settings.conv_rank if large and settings.conv_rank is not None else settings.rank
    rank = min(wanted, out, fan_in)
    u, s, vh = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    limit = float("inf")
    if settings.clamp_quantile < 1:
        limit = _quantile(torch.cat([up.flatten(), down.flatten()]), settings.clamp_quantile)
    tensors = {
        "up": up.clamp(-limit, limit).reshape(out, rank, *(1 for _ in kernel)).cpu(),
        "down": down.clamp(-limit, limit).reshape(rank, fan_in, *kernel).cpu(),
        "alpha": torch.tensor(float(rank)),
    }
    return Module(name, PLAIN, tensors, KOHYA)


def _quantile(values: torch.Tensor, q: float) -> float:
    """Return the q-quantile as torch does, of any number of values."""
    if values.numel() <= QUANTILE_VALUES:
        return float(torch.quantile(values, q))
    place = q * (values.numel() - 1)
    low = float(values.kthvalue(int(place) + 1).values)
    high = float(values.kthvalue(min(int(place) + 2, values.numel())).values)
    return low + (high - low) * (place - int(place))


def _difference(first: FileWeights, second: FileWeights, place: Place) -> torch.Tensor:
    return place.rows(second[place.key].float()) - place.rows(first[place.key].float())


def _common_places(
    first: FileWeights, second: FileWeights, settings: ExtractSettings, where: str
) -> dict[str, Place]:
    shapes = {key: tuple(first[key].shape) for key in first}
    places = trained_in(first, shapes, convolutions=settings.conv_rank is not None)
    wrong = [
        p.key for p in places.values() if p.key not in second or tuple(second[p.key].shape) != shapes[p.key]
    ]
    if wrong or not places:
        raise LoraGraftError(
            "LG-TOOL-013",
            "The two checkpoints are not of one architecture, or of none that is known.",
            where=f"{where}: {listed(wrong or ['no known module'], limit=3)}",
            why="weights that are not in both have no difference.",
            fix="name two checkpoints of one model, or the files of its denoiser, both in .safetensors",
        )
    return places


def _check(settings: ExtractSettings) -> None:
    reason = None
    if settings.rank < 1 or (settings.conv_rank is not None and settings.conv_rank < 1):
        reason = "a rank is at least 1."
    elif not 0 < settings.clamp_quantile <= 1:
        reason = "clamp_quantile lies above 0 and is at most 1, which cuts nothing off."
    elif settings.min_diff < 0:
        reason = "min_diff is not negative."
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            "A LoRA cannot be extracted so.",
            where=f"rank {settings.rank}, conv_rank {settings.conv_rank}, quantile {settings.clamp_quantile}",
            why=reason,
            fix="for instance rank 32, clamp_quantile 0.99, min_diff 0.01",
        )


def _metadata(original: Path, weights: FileWeights, tuned: Path, settings: ExtractSettings) -> dict[str, str]:
    metadata = {
        MODULE: LORA,
        **_of_base(original.name, weights),
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": str(float(settings.rank)),
        "loragraft_extracted": compact({"original": original.name, "tuned": tuned.name}),
    }
    if settings.conv_rank is not None:
        arguments = {"conv_dim": str(settings.conv_rank), "conv_alpha": str(float(settings.conv_rank))}
        metadata["ss_network_args"] = compact(arguments)
    return metadata


def _of_base(name: str, weights: FileWeights) -> dict[str, str]:
    """Return what a LoRA's metadata say of its base; nothing where the family is not known."""
    try:
        parts = parts_of(Source(name, weights))
        family = detect(joined(list(parts.values())), where=name)
    except LoraGraftError:
        return {}
    return {"ss_v2": "False", **family.metadata}
