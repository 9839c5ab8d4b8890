"""Where and how fast it learns: learning rates, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("AdamW",)


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
    optimizer_type: str = setting("AdamW", "Optimizer.", choices=OPTIMIZERS, advanced=True)
    optimizer_args: tuple[str, ...] = setting(
        (), "Optimizer options as kohya writes them: key=value, literals only.", advanced=True
    )
    lr_scheduler: str = setting("cosine", "Shape of the learning rate over the run.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | float = setting(
        0, "Warm-up: a number of steps, or below 1 a share of all steps.", minimum=0, maximum=1_000_000
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
    max_grad_norm: float = setting(
        1.0, "Clip the gradient to this norm; 0 does not.", minimum=0, maximum=1e6, advanced=True
    )
