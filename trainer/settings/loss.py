"""Loss and noise: what is predicted, and how much each prediction counts."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
MASK_RANGES = ("kohya", "hcp")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss and noise: what is predicted, and how much each prediction counts."""

    min_snr_gamma: float | None = setting(
        None,
        "Min-SNR loss weighting (5 is usual); empty weighs all timesteps alike.",
        minimum=0.001,
        maximum=1000,
    )
    v_parameterization: bool = setting(
        False, "The base model predicts velocity (v) and not noise; a base model's page says so."
    )
    zero_terminal_snr: bool = setting(
        False,
        "Change the noise schedule so that its last step is noise alone. For base models that were trained "
        "so; needs v_parameterization.",
        advanced=True,
    )
    debiased_estimation_loss: bool = setting(
        False, "Weigh noisy timesteps more: debiased estimation loss.", advanced=True
    )
    scale_v_pred_loss_like_noise_pred: bool = setting(
        False,
        "Weigh the timesteps of a v-prediction model as those of a noise-prediction model are.",
        advanced=True,
    )
    v_pred_like_loss: float = setting(
        0.0,
        "Add this share of the loss that a v-prediction model would have; 0 adds none.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    loss_type: str = setting(
        "l2",
        "How an error counts. l2: squared; l1: as it is; huber and smooth_l1: squared while small, as it is "
        "beyond a threshold.",
        choices=LOSS_TYPES,
        advanced=True,
    )
    huber_schedule: str = setting(
        "snr",
        "How the threshold of huber and smooth_l1 falls with the timestep: constant does not.",
        choices=HUBER_SCHEDULES,
        advanced=True,
    )
    huber_c: float = setting(
        0.1,
        "Threshold of huber and smooth_l1; with a schedule, its value at the noisiest timestep.",
        minimum=1e-6,
        maximum=1.0,
        advanced=True,
    )
    huber_scale: float = setting(
        1.0,
        "Factor on the threshold of the constant and the exponential huber_schedule.",
        minimum=1e-6,
        maximum=1000.0,
        advanced=True,
    )
    noise_offset: float = setting(
        0.0,
        "Shift the noise of each channel as a whole, so that dark and bright pictures are learnt (0.05 to "
        "0.1 is usual); 0 does not.",
        minimum=0.0,
        maximum=10.0,
    )
    noise_offset_random_strength: bool = setting(
        False, "Draw the strength of each sample's noise_offset between 0 and the setting.", advanced=True
    )
    adaptive_noise_scale: float = setting(
        0.0,
        "Add this times the absolute mean of each latent channel to noise_offset; may be negative, 0 does "
        "not.",
        minimum=-10.0,
        maximum=10.0,
        advanced=True,
    )
    multires_noise_iterations: int = setting(
        0, "Add noise of so many coarser sizes (6 to 10 is usual); 0 does not.", minimum=0, maximum=64
    )
    multires_noise_discount: float = setting(
        0.3,
        "Factor on each coarser size of the multires noise; smaller is weaker (0.3 to 0.8 is usual).",
        minimum=0.0,
        maximum=1.0,
        advanced=True,
    )
    ip_noise_gamma: float = setting(
        0.0,
        "Input perturbation: disturb the noise that the model sees by this share of other noise (0.1 is "
        "usual); 0 does not.",
        minimum=0.0,
        maximum=10.0,
        advanced=True,
    )
    ip_noise_gamma_random_strength: bool = setting(
        False, "Draw the strength of each sample's ip_noise_gamma between 0 and the setting.", advanced=True
    )
    min_timestep: int = setting(
        0, "Train timesteps from this one on; 0 is the least noisy.", minimum=0, maximum=999, advanced=True
    )
    max_timestep: int = setting(
        1000, "Train timesteps below this one; 1000 trains all.", minimum=1, maximum=1000, advanced=True
    )
    masked_loss: bool = setting(
        True, "Weigh the places of a picture by its mask where it has one.", advanced=True
    )
    mask_range: str = setting(
        "kohya",
        "What a mask's greys mean. kohya: black 0 to white 1; hcp: black 0 to mid-grey 1, and on to white 5.",
        choices=MASK_RANGES,
        advanced=True,
    )
