"""What an objective offers: how noise is added, what is predicted, and the way back to an image."""

from __future__ import annotations

from typing import Protocol

import torch


class Objective(Protocol):
    """How much signal and how much noise there is at a timestep, and what the denoiser says of them.

    Sampling goes along falling sigmas, in the terms of Karras et al. 2022: from the estimate of x0 at each of
    them follows the slope (x - x0) / sigma of the way to the next.
    """

    @property
    def num_timesteps(self) -> int:
        """Timesteps are at least 0 and below this."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return noisy latents (B, C, h, w) at timesteps t (B,)."""

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, *, velocity: bool = False
    ) -> torch.Tensor:
        """Return what the denoiser is to predict; ``velocity`` where a family's models differ in it."""

    def sigmas_for(self, steps: int, size: tuple[int, int]) -> torch.Tensor:
        """Return (steps + 1,) falling sigmas, the last 0, for an image of (height, width) pixels."""

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return what sampling begins with at the largest sigma."""

    def model_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return noisy latents as the denoiser knows them."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the timestep () of a sigma."""

    def denoised(
        self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor, *, velocity: bool = False
    ) -> torch.Tensor:
        """Return the estimate of x0 that the denoiser's output is."""
