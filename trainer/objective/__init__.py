"""Noise, targets, errors and loss weights of diffusion: pure functions with the papers' names."""

from .base import Objective
from .draws import generator
from .errors import diffusion_losses, huber_threshold, pointwise
from .flow import FLUX_MU, Flow, LinearMu, flow_weight, tokens_of
from .flow_times import SAMPLINGS, Times, drawn_level
from .noise import coarse_sizes, multires_noise, offset_noise
from .schedule import NoiseSchedule
from .weights import debiased_weight, like_noise_prediction, min_snr_weight, timestep_weight

__all__ = [
    "FLUX_MU",
    "SAMPLINGS",
    "Flow",
    "LinearMu",
    "NoiseSchedule",
    "Objective",
    "Times",
    "coarse_sizes",
    "debiased_weight",
    "diffusion_losses",
    "drawn_level",
    "flow_weight",
    "generator",
    "huber_threshold",
    "like_noise_prediction",
    "min_snr_weight",
    "multires_noise",
    "offset_noise",
    "pointwise",
    "timestep_weight",
    "tokens_of",
]
