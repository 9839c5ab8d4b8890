"""How much signal and how much noise there is at each timestep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

# The signal that samplers leave at a step of noise alone (ComfyUI's number): sigma is 4519, not infinite.
LEAST_SIGNAL = 4.8973451890853435e-08


@dataclass(frozen=True)
class NoiseSchedule:
    """Stable Diffusion's discrete schedule: betas linear in the square root (Rombach et al. 2022).

    ``zero_terminal_snr`` shifts and scales the signal so that none is left at the last timestep and as much
    as before at the first (Lin et al. 2023, algorithm 1).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """The signal's share of variance at each timestep, (num_timesteps,) float32."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2
        a = torch.cumprod(1.0 - betas, dim=0)
        if not self.zero_terminal_snr:
            return a
        signal = a.sqrt()
        first, last = signal[0].clone(), signal[-1].clone()
        return ((signal - last) * (first / (first - last))) ** 2

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """Noise over signal at each timestep, as k-diffusion counts it, (num_timesteps,) float32; finite."""
        a = self.alphas_cumprod.clamp(min=LEAST_SIGNAL)
        return ((1 - a) / a) ** 0.5

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio at timesteps t (B,)."""
        a = self.signal(t)
        return a / (1 - a)

    def signal(self, t: torch.Tensor) -> torch.Tensor:
        """Return the signal's share of variance at timesteps t (B,), on t's device."""
        return _alphas_cumprod(self, t.device)[t]

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Forward diffusion x_t = sqrt(a_t) x + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4)."""
        a = self.signal(t).view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return v = sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans & Ho 2022, appendix D)."""
        a = self.signal(t).view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * latents


@lru_cache(maxsize=32)
def _alphas_cumprod(schedule: NoiseSchedule, device: torch.device) -> torch.Tensor:
    """Keep the table on the device: captured steps must not copy it from the host."""
    return schedule.alphas_cumprod.to(device)
