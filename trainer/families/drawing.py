"""Draw images with any family: the denoiser as an estimate of x0, and Euler's way along falling sigmas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from PIL import Image

from ..engine.precision import visiting
from ..objective import NoiseSchedule, Objective, generator
from ..parts import Parts
from .base import Family, Reading, Texts


@dataclass(frozen=True)
class Guided:
    """What an image is drawn towards, and away from.

    ``cfg`` is classifier-free guidance (Ho & Salimans 2022), 1 without a negative prompt; ``guidance`` the
    distilled one of models that take it as an input, None for the family's usual. ``velocity`` says that the
    base predicts v and not noise, ``zero_terminal_snr`` that its last timestep is noise alone.
    """

    negative: str = ""
    cfg: float = 1.0
    guidance: float | None = None
    velocity: bool = False
    zero_terminal_snr: bool = False


@torch.no_grad()
def sample(
    family: Family,
    parts: Parts,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guided: Guided,
    reading: Reading,
) -> list[Image.Image]:
    """Draw an image of ``size`` (height, width) pixels for each prompt and its seed, by Euler's method."""
    device = next(parts.denoiser.parameters()).device
    objective = objective_of(family, guided)
    denoise = denoiser(family, parts, prompts, size, guided, reading)
    sigmas = objective.sigmas_for(steps, size).to(device)
    noise = start_noise(family.latent_shape(parts, *size), seeds).to(device)
    x = objective.start(noise, sigmas[0])
    for sigma, following in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (following - sigma)
    return to_images(family, parts, x)


def objective_of(family: Family, guided: Guided) -> Objective:
    """Return the objective to draw with: the family's, or the one that ends in noise alone."""
    objective = family.objective
    if guided.zero_terminal_snr and isinstance(objective, NoiseSchedule):
        return replace(objective, zero_terminal_snr=True)
    return objective


def start_noise(shape: Sequence[int], seeds: Sequence[int], *key: object) -> torch.Tensor:
    """Return standard normal noise (len(seeds), *shape), each a function of its seed, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(s, "sample", *key)) for s in seeds])


def denoiser(
    family: Family,
    parts: Parts,
    prompts: Sequence[str],
    size: tuple[int, int],
    guided: Guided,
    reading: Reading,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function from x and sigma () to the estimate of x0, for one prompt a row of x."""
    objective = objective_of(family, guided)
    has_negative = guided.cfg != 1
    texts = [*([guided.negative] * len(prompts) if has_negative else []), *prompts]
    cond = encode(family, parts, texts, reading)
    height, width = size
    one = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=cond[0].device)
    sizes = one.repeat(len(texts), 1) if family.uses_sizes else None

    @torch.no_grad()
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, x]) if has_negative else x
        t = objective.timestep(sigma).expand(len(both))
        noisy = objective.model_input(both, sigma)
        out = family.predict(parts, noisy, t, cond, sizes, guided.guidance).float()
        if has_negative:
            away, towards = out.chunk(2)
            out = away + guided.cfg * (towards - away)
        return objective.denoised(x, out, sigma, velocity=guided.velocity)

    return denoise


def encode(family: Family, parts: Parts, texts: Sequence[str], reading: Reading) -> Texts:
    """Return the conditioning of texts, read as long as the longest needs, on the denoiser's device."""
    device = next(parts.denoiser.parameters()).device
    reading = family.reading_for(parts, texts, reading)
    tokens = tuple(x.to(device) for x in family.tokenize(parts, texts, reading))
    with torch.no_grad(), visiting(parts.text_encoders, device):
        return family.encode_text(parts, tokens, reading)


@torch.no_grad()
def to_images(family: Family, parts: Parts, latents: torch.Tensor) -> list[Image.Image]:
    """Decode latents and round them to 8 bits."""
    with visiting(parts.vae, latents.device):
        pixels = family.decode(parts, latents)
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image.numpy()) for image in levels.cpu()]
