"""Draw images from a base model with LoRAs merged in, embeddings, emphasis and any sampler: `loragraft
sample`.

What is not set is what is usual for the base's family. A LoRA named in a prompt, <lora:name:0.8>, counts for
that prompt alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn

from ..adapters.files import PREDICTION, TERMINAL, VELOCITY
from ..engine.precision import pick_device, place, resolve
from ..errors import LoraGraftError, listed, nearest
from ..families.base import Family, Reading
from ..families.drawing import Guided, denoiser, objective_of, start_noise, to_images
from ..families.opening import Base
from ..parts import Parts
from .convert import to_common
from .deltas import ON_WEIGHT, bias_change, delta, refusal
from .embeddings import add_embeddings
from .look import Look, SampleSettings, check_look, look_of
from .lora_file import LoraFile, read_lora
from .samplers import SAMPLERS
from .sigmas import levels
from .unflatten import flatten

TAG = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")
Loras = tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Drawing:
    """An image, its prompt without LoRA tags, its seed, and all that it was drawn with as one text.

    ``drawn_with`` is what all images of a call have in common, in a few words.
    """

    image: Image.Image
    prompt: str
    seed: int
    parameters: str
    drawn_with: str


def draw_images(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    lora_folder: Path | None = None,
    embeddings: Sequence[Path] = (),
    device: torch.device | str | None = None,
) -> Iterator[Drawing]:
    """Yield an image for every prompt and seed, in this order.

    LoRA tags in prompts are looked up in ``lora_folder``. Raises LG-TOOL-005, -010, -015, -016.
    """
    look = look_of(base.family, settings)
    check_look(base.family, look, settings, has_embeddings=bool(embeddings))
    read = [read_tags(prompt, lora_folder) for prompt in prompts]
    parts, merged = None, None
    for prompt, own in read:
        wanted = (*loras, *own)
        if parts is None or wanted != merged:
            parts, merged = _ready(base, wanted, embeddings, settings, device), wanted
        for start in range(0, len(seeds), settings.batch):
            batch = seeds[start : start + settings.batch]
            for image, seed in zip(_draw(base, parts, prompt, batch, look, settings), batch, strict=True):
                told = parameters(base, prompt, seed, look, settings, wanted)
                yield Drawing(image, prompt, seed, told, str(look))


def read_tags(prompt: str, folder: Path | None) -> tuple[str, Loras]:
    """Take <lora:name:strength> out of a prompt; returns the prompt and files. Raises LG-TOOL-016."""
    found: list[tuple[Path, float]] = []
    for match in TAG.finditer(prompt):
        name, strength = match[1].strip(), match[2] or "1"
        known = {p.stem: p for p in sorted(folder.glob("*.safetensors"))} if folder is not None else {}
        try:
            found.append((known[name], float(strength)))
        except (KeyError, ValueError):
            guess = nearest(name, known)
            raise LoraGraftError(
                "LG-TOOL-016",
                f"The LoRA of {match[0][:60]!r} cannot be used.",
                where=f"prompt {prompt[:60]!r}",
                why="no such file is in the LoRA folder, or the strength is no number."
                if folder is not None
                else "no folder of LoRAs is named.",
                fix=f"write <lora:{guess[0]}:1>"
                if guess
                else "name the folder with --lora_dir, or use --lora",
            ) from None
    return " ".join(TAG.sub(" ", prompt).split()), tuple(found)


def parameters(
    base: Base,
    prompt: str,
    seed: int,
    look: Look,
    settings: SampleSettings,
    loras: Sequence[tuple[Path, float]],
) -> str:
    """Return what an image was drawn with, in the form that webui writes and others read."""
    height, width = look.size
    told: dict[str, object] = {
        "Steps": look.steps,
        "Sampler": look.sampler,
        "Schedule type": look.schedule,
        "CFG scale": f"{look.cfg:g}",
        **({} if look.guidance is None else {"Distilled CFG Scale": f"{look.guidance:g}"}),
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": base.name,
    }
    if settings.clip_skip > 1:
        told["Clip skip"] = settings.clip_skip
    if settings.velocity:
        told["Prediction"] = "v"
    if base.vae_name:
        told["VAE"] = base.vae_name
    if loras:
        told["Lora"] = " ".join(f"{path.stem}:{strength:g}" for path, strength in loras)
    negative = f"\nNegative prompt: {settings.negative}" if settings.negative else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in told.items())


def merge_into_modules(family: Family, parts: Parts, files: Sequence[tuple[LoraFile, float]]) -> None:
    """Add LoRAs to a model's weights in memory, in new float32 tensors; raises LG-TOOL-003, -010."""
    layers = _layers(family, parts)
    changes: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for file, strength in files:
        common = to_common(file)
        if others := [m for m in common.modules.values() if m.kind not in ON_WEIGHT]:
            raise refusal(others, "Drawing with a merged LoRA")
        if unknown := [name for name in common.modules if name not in layers]:
            raise LoraGraftError(
                "LG-TOOL-010",
                f"{len(unknown)} of the LoRA's {len(common.modules)} modules are not in this base model.",
                where=f"{file.name}: {listed(unknown, limit=3)}",
                why="these parts would be left out in silence.",
                fix="use the LoRA with the kind of base model that it was trained on",
            )
        for name, module in common.modules.items():
            weight = cast(torch.Tensor, layers[name].weight).detach().float()
            change = strength * delta(module, weight)
            changes[name] = changes[name] + change if name in changes else change
            if (shift := bias_change(module)) is not None:
                biases[name] = biases.get(name, torch.zeros_like(shift)) + strength * shift
    for values, which in ((changes, "weight"), (biases, "bias")):
        for name, change in values.items():
            before = cast(torch.Tensor, getattr(layers[name], which)).detach().float()
            setattr(layers[name], which, nn.Parameter(before + change.to(before), requires_grad=False))


def _layers(family: Family, parts: Parts) -> dict[str, Any]:
    """Return every linear layer, convolution and normalisation layer under kohya's name.

    What a family trains has the family's names in a file, which may be others than the modules'.
    """
    found: dict[str, Any] = {}
    # The only text encoder is kohya's te, of several the first is te1.
    encoders = list(parts.text_encoders.values())
    numbered = [(f"lora_te{n}_", encoder) for n, encoder in enumerate(encoders, 1)]
    for prefix, root in (
        ("lora_unet_", parts.denoiser),
        *(numbered if len(encoders) > 1 else [("lora_te_", encoders[0])]),
    ):
        for path, module in root.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
                text = prefix != "lora_unet_" and not path.startswith("text_model.")
                found[prefix + flatten(f"text_model.{path}" if text else path)] = module
    trained = family.targets(parts, convolutions=True, preset="everything", norms=True)
    return found | {target.key: parts.part(target.part).get_submodule(target.path) for target in trained}


def _ready(
    base: Base,
    loras: Sequence[tuple[Path, float]],
    embeddings: Sequence[Path],
    settings: SampleSettings,
    device: torch.device | str | None,
) -> Parts:
    """Load the base with everything in it, on the device and in the arithmetic's precision."""
    files = [(read_lora(path), strength) for path, strength in loras]
    for file, _ in files:
        _check_prediction(file, base, settings)
    parts = base.load()
    add_embeddings(parts, embeddings)
    merge_into_modules(base.family, parts, files)
    place(
        parts,
        resolve(settings.mixed_precision, pick_device(device)),
        owned=base.owned,
        text_at_every_step=False,
    )
    return parts


def _check_prediction(file: LoraFile, base: Base, settings: SampleSettings) -> None:
    """Refuse a LoRA whose metadata name another prediction or noise than is drawn with."""
    reason = None
    if file.metadata.get(TERMINAL) == "True" and not base.zero_terminal:
        reason, fix = "with zero_terminal_snr, and the noise here ends earlier", "use loragraft preview"
    elif file.metadata.get(PREDICTION) == VELOCITY and not (settings.velocity or base.velocity):
        reason, fix = "for a base that predicts v", "add --v_parameterization"
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            f"'{file.name[:60]}' cannot be drawn with these settings.",
            where=f"{file.name[:60]}: metadata",
            why=f"it was trained {reason}; the images would not be what it learnt.",
            fix=fix,
        )


@torch.no_grad()
def _draw(
    base: Base, parts: Parts, prompt: str, seeds: Sequence[int], look: Look, settings: SampleSettings
) -> list[Image.Image]:
    family, device = base.family, next(parts.denoiser.parameters()).device
    velocity = settings.velocity or bool(base.velocity)
    guided = Guided(settings.negative, look.cfg, look.guidance, velocity, bool(base.zero_terminal))
    has_emphasis = "weighted_captions" not in family.ignored
    reading = Reading(clip_skip=settings.clip_skip, weighted=has_emphasis, keep_mean=settings.keep_mean)
    denoise = denoiser(family, parts, [prompt] * len(seeds), look.size, guided, reading)
    objective = objective_of(family, guided)
    sigmas = levels(look.schedule, objective, look.steps, look.size).to(device)
    shape = family.latent_shape(parts, *look.size)

    def noise(*key: object) -> torch.Tensor:
        return start_noise(shape, seeds, *key).to(device)

    begun = objective.start(noise(), sigmas[0])
    return to_images(family, parts, SAMPLERS[look.sampler](denoise, begun, sigmas, noise))
