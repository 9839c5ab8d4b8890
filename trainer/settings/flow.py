"""Rectified flow: which noise levels are trained and how much each counts; the texts of its models."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

TIMESTEP_SAMPLINGS = (
    *("auto", "uniform", "sigmoid", "logit_normal", "mode", "shift", "flux_shift", "nextdit_shift", "sigma"),
)
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "cosmap")
PREDICTION_TYPES = ("auto", "raw", "denoised", "additive", "sigma_scaled")


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Rectified flow: SD3, Flux and later transformers."""

    timestep_sampling: str = setting(
        "auto",
        "How noise levels are drawn for SD3, Flux and other flow models; auto is what the model is usually "
        "trained with.",
        choices=TIMESTEP_SAMPLINGS,
        advanced=True,
    )
    sigmoid_scale: float = setting(
        1.0,
        "Spread of timestep_sampling sigmoid, shift and flux_shift: larger is more even.",
        minimum=0.01,
        maximum=100.0,
        advanced=True,
    )
    logit_mean: float = setting(
        0.0,
        "Centre of timestep_sampling logit_normal: above 0 noisier, below 0 less noisy.",
        minimum=-10.0,
        maximum=10.0,
        advanced=True,
    )
    logit_std: float = setting(
        1.0,
        "Spread of timestep_sampling logit_normal: larger is more even.",
        minimum=0.01,
        maximum=100.0,
        advanced=True,
    )
    mode_scale: float = setting(
        1.29,
        "How much timestep_sampling mode prefers the middle.",
        minimum=-1.0,
        maximum=1.75,
        advanced=True,
    )
    discrete_flow_shift: float | None = setting(
        None,
        "Moves the noise levels of timestep_sampling shift, sigma, logit_normal and mode: above 1 noisier "
        "(3 is usual), 1 not; empty takes the model's.",
        minimum=0.01,
        maximum=100.0,
        advanced=True,
    )
    weighting_scheme: str = setting(
        "none",
        "How much each noise level counts in the loss. sigma_sqrt: little noise most; cosmap: the middle "
        "most; none: all alike.",
        choices=WEIGHTING_SCHEMES,
        advanced=True,
    )
    model_prediction_type: str = setting(
        "auto",
        "What a flow model's output is compared as. raw: its velocity; denoised: the image that it points "
        "to, as kohya does for SD3; the others teach it another output; auto is what is usual for the model.",
        choices=PREDICTION_TYPES,
        advanced=True,
    )
    guidance_scale: float | None = setting(
        None,
        "Guidance that a distilled model such as Flux.1 dev is told while it is trained (1 is usual); empty "
        "takes the model's.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    t5xxl_max_token_length: int | None = setting(
        None,
        "Longest caption for T5 and other encoders of whole sentences, in tokens; empty takes the model's.",
        minimum=16,
        maximum=2048,
        advanced=True,
    )
    apply_t5_attn_mask: bool = setting(
        False, "Hide the empty places behind a caption from a model that reads T5.", advanced=True
    )
