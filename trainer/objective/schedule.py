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

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, *, velocity: bool = False
    ) -> torch.Tensor:
        """Return what the denoiser is to predict: the noise, or ``velocity``."""
        return self.velocity(latents, noise, t) if velocity else noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return v = sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans & Ho 2022, appendix D)."""
        a = self.signal(t).view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * latents

    def sigmas_for(self, steps: int, size: tuple[int, int]) -> torch.Tensor:
        """Return (steps + 1,) falling sigmas at evenly spaced timesteps, the last 0; of any image size."""
        t = torch.linspace(self.num_timesteps - 1, 0, steps).round().long()
        return torch.cat([self.sigmas[t], torch.zeros(1)])

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return x = x0 + sigma noise where nothing of x0 is left: what sampling begins with."""
        return noise * (1 + sigma**2) ** 0.5

    def model_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return x_t = sqrt(a_t) x, which the denoiser knows, for x = x0 + sigma noise."""
        return x / (1 + sigma**2) ** 0.5

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the timestep, int64 (), whose sigma is nearest in log."""
        return (self.sigmas.log().to(sigma.device) - sigma.log()).abs().argmin()

    def denoised(
        self, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor, *, velocity: bool = False
    ) -> torch.Tensor:
        """Return the estimate of x0 that the denoiser's output is, for x = x0 + sigma noise.

        A velocity tells x0 = sqrt(a_t) x_t - sqrt(1 - a_t) v (Salimans & Ho 2022).
        """
        if not velocity:
            return x - sigma * output
        share = 1 / (1 + sigma**2) ** 0.5  # sqrt(a_t)
        return x * share**2 - output * sigma * share


@lru_cache(maxsize=32)
def _alphas_cumprod(schedule: NoiseSchedule, device: torch.device) -> torch.Tensor:
    """Keep the table on the device: captured steps must not copy it from the host."""
    return schedule.alphas_cumprod.to(device)
