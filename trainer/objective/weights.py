"""How much each timestep counts in the loss: weights as functions of the signal-to-noise ratio."""

from __future__ import annotations

import torch

MAX_SNR = 1000.0  # the reference trainer's limit: the first timestep of some schedules has no noise at all


def min_snr_weight(snr: torch.Tensor, gamma: float, *, velocity: bool = False) -> torch.Tensor:
    """Min-SNR weight min(snr, gamma) / snr, for v-prediction / (snr + 1) (Hang et al. 2023)."""
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)


def debiased_weight(snr: torch.Tensor, *, velocity: bool = False) -> torch.Tensor:
    """Debiased estimation 1 / sqrt(snr) (Yu et al. 2024); for v-prediction 1 / (snr + 1)."""
    snr = snr.clamp(max=MAX_SNR)
    return 1 / (snr + 1) if velocity else 1 / snr.sqrt()


def like_noise_prediction(snr: torch.Tensor) -> torch.Tensor:
    """Return snr / (snr + 1), which weighs velocities' errors as errors of the noise in them."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def timestep_weight(
    snr: torch.Tensor,
    *,
    velocity: bool = False,
    min_snr_gamma: float | None = None,
    scale_v_like_noise: bool = False,
    v_like_loss: float = 0.0,
    debiased: bool = False,
) -> torch.Tensor | None:
    """Return the product of the weights asked for, (B,), in the reference trainer's order; None of none."""
    factors: list[torch.Tensor] = []
    if min_snr_gamma:
        factors.append(min_snr_weight(snr, min_snr_gamma, velocity=velocity))
    if scale_v_like_noise:
        factors.append(like_noise_prediction(snr))
    if v_like_loss:
        factors.append(1 + v_like_loss / like_noise_prediction(snr))
    if debiased:
        factors.append(debiased_weight(snr, velocity=velocity))
    if not factors:
        return None
    weight = factors[0]
    for factor in factors[1:]:
        weight = weight * factor
    return weight
