"""Loss and noise: what is predicted, and how much each prediction counts."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss and noise: what is predicted, and how much each prediction counts."""

    min_snr_gamma: float | None = setting(
        None,
        "Min-SNR loss weighting (5 is usual); empty weighs all timesteps alike.",
        minimum=0.001,
        maximum=1000,
    )
