"""Noise, targets and loss weights of eps-prediction diffusion: pure functions with the papers' names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator that is a function of ``key`` alone, e.g. (seed, step, sample, "noise")."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class NoiseSchedule:
    """Stable Diffusion's discrete schedule: betas linear in the square root (Rombach et al. 2022)."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """The signal's share of variance at each timestep, (num_timesteps,) float32."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2
        return torch.cumprod(1.0 - betas, dim=0)

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """Noise over signal at each timestep, as k-diffusion counts it, (num_timesteps,) float32."""
        a = self.alphas_cumprod
        return ((1 - a) / a) ** 0.5

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio at timesteps t (B,)."""
        a = _alphas_cumprod(self, t.device)[t]
        return a / (1 - a)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Forward diffusion x_t = sqrt(a_t) x + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4)."""
        a = _alphas_cumprod(self, latents.device)[t].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise


@lru_cache(maxsize=32)
def _alphas_cumprod(schedule: NoiseSchedule, device: torch.device) -> torch.Tensor:
    """Keep the table on the device: captured steps must not copy it from the host."""
    return schedule.alphas_cumprod.to(device)


def min_snr_weight(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weight for eps-prediction, min(snr, gamma) / snr (Hang et al. 2023)."""
    return snr.clamp(max=gamma) / snr


def diffusion_losses(
    pred: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each sample's mean squared error times its weight, both (B,); computed in float32.

    ``mask`` (B, 1, h, w) weighs the places; masked places still count in the mean, as in kohya's trainer.
    """
    squared = (pred.float() - target.float()).square()
    per_sample = (squared if mask is None else squared * mask).mean(dim=(1, 2, 3))
    return per_sample if weight is None else per_sample * weight
