"""Noise, targets, errors and loss weights of diffusion: pure functions with the papers' names."""

from .draws import generator
from .errors import diffusion_losses, huber_threshold, pointwise
from .noise import coarse_sizes, multires_noise, offset_noise
from .schedule import NoiseSchedule
from .weights import debiased_weight, like_noise_prediction, min_snr_weight, timestep_weight

__all__ = [
    "NoiseSchedule",
    "coarse_sizes",
    "debiased_weight",
    "diffusion_losses",
    "generator",
    "huber_threshold",
    "like_noise_prediction",
    "min_snr_weight",
    "multires_noise",
    "offset_noise",
    "pointwise",
    "timestep_weight",
]
