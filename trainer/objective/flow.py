"""Rectified flow: a straight line from image to noise, shifts along it, and what a model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

PIXELS_PER_TOKEN = 16  # an autoencoder of 8 and patches of 2x2 latents: what sizes are counted in


def shifted(s: torch.Tensor, shift: float) -> torch.Tensor:
    """Return noise levels moved towards noise, shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23).

    0 and 1 stay where they are; a shift of 1 moves nothing.
    """
    return shift * s / (1 + (shift - 1) * s)


def tokens_of(size: tuple[int, int]) -> int:
    """Return how many patches an image has; ``size`` in pixels."""
    return (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)


@dataclass(frozen=True)
class LinearMu:
    """The logarithm of a shift that grows in a line with an image's tokens; the defaults are Flux.1's."""

    base: float = 0.5
    top: float = 1.15
    base_tokens: int = 256
    top_tokens: int = 4096

    def __call__(self, tokens: int, steps: int = 0) -> float:
        """Return mu for an image of so many tokens, however many steps are taken."""
        slope = (self.top - self.base) / (self.top_tokens - self.base_tokens)
        return self.base + slope * (tokens - self.base_tokens)


FLUX_MU = LinearMu()


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x_s = (1 - s) x + s n, whose velocity n - x the model predicts (Liu et al. 2022).

    Timesteps t are ``num_timesteps`` times the noise level s, which goes from 0 (image) to 1 (noise), and
    need not be whole. Sampling's levels are moved by ``shift``, or by exp(mu) where ``dynamic`` gives mu for
    an image's tokens and the number of steps; ``terminal`` stretches them so that the last is that level.
    """

    num_timesteps: int = 1000
    shift: float = 1.0
    dynamic: Callable[[int, int], float] | None = None
    terminal: float = 0.0

    def level(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the noise levels of timesteps t (B,) in the shape that multiplies ``like`` (B, ...)."""
        return (t / self.num_timesteps).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what lies at timesteps t (B,) on the way from latents to noise."""
        s = self.level(t, latents)
        return (1.0 - s) * latents + s * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, *, velocity: bool = True
    ) -> torch.Tensor:
        """Return n - x, the same at every timestep; a flow has nothing else to predict."""
        return noise - latents

    def sigmas_for(self, steps: int, size: tuple[int, int]) -> torch.Tensor:
        """Return the (steps + 1,) falling noise levels to sample an image at, from 1 to 0, float32.

        ``size`` (height, width) is in pixels. Steps are even in s before the shift, as diffusers takes
        them for Flux and ComfyUI's schedule "simple" for all.
        """
        s = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        mu = None if self.dynamic is None else self.dynamic(tokens_of(size), steps)
        s = shifted(s, self.shift if mu is None else math.exp(mu))
        if self.terminal and steps > 1:
            s = 1 - (1 - s) * (1 - self.terminal) / (1 - s[-1])
        return torch.cat([s, s.new_zeros(1)]).float()

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return what sampling begins with at level ``sigma`` (): the noise's share of it."""
        return noise * sigma

    def model_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return what the model sees of x: x itself."""
        return x

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the timestep of a noise level, float32."""
        return self.num_timesteps * sigma

    def denoised(
        self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor, *, velocity: bool = True
    ) -> torch.Tensor:
        """Return the image that x and the model's output at level ``sigma`` point to, x - s v."""
        return x - sigma * output


# (the model's output, x_s, s) -> what is compared, and (x, n) -> what it is compared with. The reference
# trainer's names; its script for SD3 has no name for "denoised" and always compares so.
Predicted = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Wanted = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PREDICTIONS: Mapping[str, tuple[Predicted, Wanted]] = {
    # the velocity: what released models predict
    "raw": (lambda v, noisy, s: v, lambda x, n: n - x),
    # x_s - s v against x: its error is that of the velocity times s, so squares are weighed by s^2
    "denoised": (lambda v, noisy, s: noisy - s * v, lambda x, n: x),
    # the two others teach the model another output than samplers expect of it
    "additive": (lambda v, noisy, s: v + noisy, lambda x, n: n - x),
    "sigma_scaled": (lambda v, noisy, s: noisy - s * v, lambda x, n: n - x),
}

LEAST_LEVEL = 1e-3  # of the reference's discrete schedule; sigma_sqrt has no bound below it
WEIGHTINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # 1 / s^2: takes back the s^2 of "denoised"
    "sigma_sqrt": lambda s: s.clamp(min=LEAST_LEVEL) ** -2.0,
    # most at the middle (Esser et al. 2024, section 3.1)
    "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2)),
}


def flow_weight(scheme: str, s: torch.Tensor) -> torch.Tensor | None:
    """Return how much noise levels s (B,) count in the loss; None for "none", where all do alike."""
    return WEIGHTINGS[scheme](s) if scheme in WEIGHTINGS else None
