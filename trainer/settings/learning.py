"""Where and how fast it learns: learning rates, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting
from .optimizers import OPTIMIZERS

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "inverse_sqrt",
    "warmup_stable_decay",
    "piecewise_constant",
    "cosine_with_warm_restarts",
    "adafactor",
)
PRESETS = "sine, cosine, linear, reverse_linear or zeros, with an offset such as sine+.5 or sine-.5"


# The class that guides name for cosine with warm restarts, which is not to be had: what is ours instead.
WARM_RESTARTS = "cosine_annealing_warmup.CosineAnnealingWarmupRestarts"


def steps_of(value: int | float, total_steps: int) -> int:
    """Return a number of steps, or a share of all that is below 1, in steps."""
    return int(value * total_steps) if isinstance(value, float) and value < 1 else int(value)


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """Where and how fast it learns: learning rates, optimizer, schedule."""

    learning_rate: float = setting(
        1e-4, "Learning rate where no own one is given.", minimum=0.0, maximum=10.0
    )
    unet_lr: float | None = setting(
        None,
        "Learning rate of the denoiser; empty takes learning_rate, 0 leaves it out.",
        minimum=0.0,
        maximum=10.0,
    )
    text_encoder_lr: float | None = setting(
        None,
        "Learning rate of the text encoder; empty takes learning_rate, 0 leaves it out.",
        minimum=0.0,
        maximum=10.0,
    )
    text_encoder_2_lr: float | None = setting(
        None,
        "Learning rate of the second text encoder; empty takes that of the first, or for T5 and its like "
        "leaves it out, as 0 does.",
        minimum=0.0,
        maximum=10.0,
        advanced=True,
    )
    text_encoder_3_lr: float | None = setting(
        None,
        "Learning rate of the third text encoder; empty takes that of the first, or for T5 and its like "
        "leaves it out, as 0 does.",
        minimum=0.0,
        maximum=10.0,
        advanced=True,
    )
    scale_lr: bool = setting(
        False, "Multiply all learning rates by the images that one step sees.", advanced=True
    )
    down_lr_weight: str = setting(
        "",
        f"Weights of the denoiser's down blocks on its learning rate: {PRESETS}, one number, or a list such "
        "as 0,0.5,1. A block of weight 0 is not trained.",
        advanced=True,
    )
    mid_lr_weight: str = setting(
        "", "Weights of the denoiser's middle blocks on its learning rate: a number or a list.", advanced=True
    )
    up_lr_weight: str = setting(
        "", "Weights of the denoiser's up blocks, written as those of the down blocks.", advanced=True
    )
    block_lr_zero_threshold: float = setting(
        0.0,
        "Blocks whose weight is not above this are not trained.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    network_reg_lrs: tuple[str, ...] = setting(
        (),
        "Learning rates of single modules: pattern=rate, the pattern a regular expression that is looked for "
        "in the module's name; the first that is found counts.",
        advanced=True,
    )
    loraplus_lr_ratio: float | None = setting(
        None,
        "LoRA+: the up matrices learn this many times as fast; 16 is usual, empty is 1.",
        minimum=0.001,
        maximum=1000.0,
        advanced=True,
    )
    loraplus_unet_lr_ratio: float | None = setting(
        None, "LoRA+ ratio of the denoiser alone.", minimum=0.001, maximum=1000.0, advanced=True
    )
    loraplus_text_encoder_lr_ratio: float | None = setting(
        None, "LoRA+ ratio of the text encoder alone.", minimum=0.001, maximum=1000.0, advanced=True
    )
    optimizer_type: str = setting(
        "AdamW",
        "Optimizer. Config files also take a class by name, such as pytorch_optimizer.Muon or "
        "torch.optim.NAdam.",
        choices=OPTIMIZERS,
        advanced=True,
        open=True,
    )
    optimizer_args: tuple[str, ...] = setting(
        (), "Optimizer options as kohya writes them: key=value, literals only.", advanced=True
    )
    lr_scheduler: str = setting("cosine", "Shape of the learning rate over the run.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | float = setting(
        0, "Warm-up: a number of steps, or below 1 a share of all steps.", minimum=0, maximum=1_000_000
    )
    lr_decay_steps: int | float = setting(
        0,
        "Length of the decay of warmup_stable_decay: a number of steps, or below 1 a share of all steps.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    lr_scheduler_num_cycles: int = setting(
        1, "Number of cycles for cosine_with_restarts.", minimum=1, maximum=1000, advanced=True
    )
    lr_scheduler_power: float = setting(
        1.0,
        "Power for polynomial: a smaller one holds the rate up longer.",
        minimum=0.01,
        maximum=100,
        advanced=True,
    )
    lr_scheduler_min_lr_ratio: float | None = setting(
        None,
        "Lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share of the learning rate.",
        minimum=0.0,
        maximum=1.0,
        advanced=True,
    )
    lr_scheduler_timescale: int | None = setting(
        None,
        "Time scale of inverse_sqrt in steps; empty takes the warm-up's length, or 10000 without one.",
        minimum=1,
        maximum=10_000_000,
        advanced=True,
    )
    lr_scheduler_type: str = setting(
        "",
        "Another schedule by its class: one of torch.optim.lr_scheduler or diffusers.optimization. It "
        "replaces lr_scheduler.",
        advanced=True,
    )
    lr_scheduler_args: tuple[str, ...] = setting(
        (), "Options of the schedule: key=value, literals only.", advanced=True
    )
    max_grad_norm: float = setting(
        1.0, "Clip the gradient to this norm; 0 does not.", minimum=0, maximum=1e6, advanced=True
    )
    fused_backward_pass: bool = setting(
        False,
        "Take each tensor's optimizer step within the backward pass, so that not all gradients are held at "
        "once. It needs max_grad_norm 0.",
        advanced=True,
    )
    ema_decay: float = setting(
        0.0,
        "Save, draw and validate an average of the trained weights over the steps: how much of it stays at "
        "each step, usually 0.99 to 0.9999; 0 takes the weights as they are.",
        minimum=0.0,
        maximum=0.999999,
        advanced=True,
    )
