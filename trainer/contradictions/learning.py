"""What contradicts itself in how it learns: rates, optimizer, block weights."""

from __future__ import annotations

from ..block_weights import SD1, WEIGHTS, block_lr_weights
from ..config import ENCODER_RATES, TrainConfig, denoiser_lr, encoder_lr, optimizer_kwargs, trains_encoders
from ..errors import nearest
from ..patterns import rules
from ..settings.optimizers import KNOWN, MODULES, Known, has_relative_steps, named
from . import schedule
from .refusals import bad_value, contradiction

LOWEST_ADAPTIVE = 0.1  # below it, the reference warns; nothing would be learnt
FAR_TOO_HIGH = 10  # times the rate from where a run is warned: nothing of the LoRA would be left
LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-002, -003 or -004 for the first fault."""
    if denoiser_lr(config) == 0 and not trains_encoders(config):
        raise contradiction(
            "Every learning rate is 0.",
            where,
            why="nothing would be trained.",
            fix="give learning_rate, unet_lr or text_encoder_lr a value above 0",
        )
    entry = named(config.optimizer_type)
    if entry is None:
        guess = nearest(config.optimizer_type, KNOWN)
        raise bad_value(
            "optimizer_type",
            config.optimizer_type,
            f"one of {', '.join(KNOWN)}, or a class of {', '.join(MODULES)}",
            where,
            guess[0] if guess else None,
        )
    _check_blocks(config, where)
    _check_patterns(config, where)
    _check_plus(config, where)
    if entry.adaptive:
        _check_adaptive(config, where)
    if has_relative_steps(entry, optimizer_kwargs(config)):
        _check_relative(config, where)
    else:
        _check_high(config, entry, where)
    _check_fused_backward(config, entry, where)
    if config.ema_decay and entry.schedule_free:
        raise contradiction(
            f"ema_decay is given together with {config.optimizer_type}.",
            where,
            why="a schedule-free optimizer averages the weights itself, and that average is what is saved.",
            fix="set ema_decay to 0, or choose another optimizer such as AdamW",
        )
    schedule.check(config, entry, where)


def _check_blocks(config: TrainConfig, where: str) -> None:
    given = [name for name in WEIGHTS if getattr(config, name)]
    try:
        block_lr_weights(config, SD1)
    except ValueError as error:
        raise bad_value(
            ", ".join(given), error, "a preset, a list or a number, as the help says", where
        ) from None
    if config.block_lr_zero_threshold and not given:
        raise contradiction(
            "block_lr_zero_threshold is set, but no block weight is.",
            where,
            why="it would have no effect.",
            fix="set down_lr_weight, mid_lr_weight or up_lr_weight, or block_lr_zero_threshold to 0",
        )
    if given and denoiser_lr(config) == 0:
        raise contradiction(
            f"{given[0]} is set, but the denoiser is not trained.",
            where,
            why="block weights are factors on the denoiser's learning rate, which is 0.",
            fix=f"clear {', '.join(given)}, or give unet_lr a value above 0",
        )


def _check_patterns(config: TrainConfig, where: str) -> None:
    try:
        found = rules(config.network_reg_lrs)
    except ValueError as error:
        raise bad_value(
            "network_reg_lrs",
            ", ".join(config.network_reg_lrs),
            f"pattern=rate, for instance attn2=1e-5 ({error})",
            where,
        ) from None
    for rule in found:
        if not 0 <= rule.value <= 10:
            raise bad_value("network_reg_lrs", f"{rule.text}={rule.value:g}", "rates from 0 to 10", where)


def _check_plus(config: TrainConfig, where: str) -> None:
    own = {
        "loraplus_unet_lr_ratio": denoiser_lr(config) > 0,
        "loraplus_text_encoder_lr_ratio": trains_encoders(config),
    }
    for name, is_trained in own.items():
        if getattr(config, name) is not None and not is_trained:
            raise contradiction(
                f"{name} is set, but that part is not trained.",
                where,
                why="it would have no effect.",
                fix=f"clear {name}, or train that part",
            )
    given = [name for name in LORAPLUS if getattr(config, name) is not None]
    if given and config.algo not in ("lora", "locon", "dylora"):
        raise contradiction(
            f"{given[0]} is set together with algo {config.algo}.",
            where,
            why="LoRA+ is about the two matrices of a LoRA, of which the second starts at zero.",
            fix=f"clear {', '.join(given)}, or set algo to lora or locon",
        )


def _rates(config: TrainConfig) -> dict[str, float]:
    """Return the rates of the parts by their settings; further text encoders where they differ."""
    first = encoder_lr(config)
    others = {name: encoder_lr(config, part) for part, name in ENCODER_RATES.items()}
    own = {name: rate for name, rate in others.items() if rate != first}
    return {"unet_lr": denoiser_lr(config), "text_encoder_lr": first, **own}


def _check_adaptive(config: TrainConfig, where: str) -> None:
    """Check the rates of an optimizer that estimates the step size itself, one for all tensors."""
    rates = [lr for lr in _rates(config).values() if lr > 0]
    rates += [config.embedding_lr] if config.train_embeddings else []
    name = config.optimizer_type
    if len(set(rates)) > 1:
        raise contradiction(
            f"{name} is given several learning rates: {', '.join(f'{rate:g}' for rate in rates)}.",
            where,
            why="it estimates one step size for all tensors; only the first rate would count.",
            fix="clear unet_lr and each text_encoder_lr (-1 on nodes) and set learning_rate to 1; 0 for a "
            "part leaves it out. The embedding_lr of trained words must be the same",
        )
    several = (*WEIGHTS, "network_reg_lrs", *LORAPLUS)
    if given := [n for n in several if getattr(config, n) not in ("", (), None)]:
        raise contradiction(
            f"{name} is used together with {given[0]}.",
            where,
            why="it estimates one step size for all tensors and can have only one learning rate.",
            fix=f"clear {', '.join(given)}, or choose another optimizer such as AdamW",
        )
    if rates[0] < LOWEST_ADAPTIVE:
        raise contradiction(
            f"The learning rate {rates[0]:g} is far too low for {name}.",
            where,
            why="it finds the step size itself and takes learning_rate as a factor on it, near 1.",
            fix="set learning_rate to 1 (0.5 to 2 is usual)",
        )


def _check_high(config: TrainConfig, entry: Known, where: str) -> None:
    """Check that the rate is one of this optimizer and not of another: 1 is an adaptive one's."""
    for name, rate in _rates(config).items():
        if rate >= FAR_TOO_HIGH * entry.too_high:
            shown = "learning_rate" if getattr(config, name) is None else name
            raise contradiction(
                f"{shown} {rate:g} is far too high for {config.optimizer_type}.",
                where,
                why="the first steps would leave nothing of the LoRA; 1 is a rate for adaptive optimizers.",
                fix=f"set {shown} to {entry.usual_lr:g}, or optimizer_type to Prodigy or DAdaptAdam",
            )


def _check_relative(config: TrainConfig, where: str) -> None:
    """Check Adafactor with relative_step (its default): it takes no learning rate at all."""
    default = type(config).__dataclass_fields__["learning_rate"].default
    own = (*WEIGHTS, "network_reg_lrs", *LORAPLUS)
    given = [n for n in ("unet_lr", *ENCODER_RATES.values()) if getattr(config, n)]
    given += ["learning_rate"] if config.learning_rate not in (default, 0.0) else []
    given += [n for n in own if getattr(config, n) not in ("", (), None)]
    given += ["scale_lr"] if config.scale_lr else []
    if given:
        raise contradiction(
            f"{given[0]} is set, but Adafactor's relative steps take no learning rate.",
            where,
            why="with relative_step, which is its default, it makes the size of its steps itself.",
            fix="add relative_step=False scale_parameter=False to optimizer_args, or leave "
            f"{', '.join(given)} at the default",
        )
    if config.lr_scheduler != "adafactor":
        raise contradiction(
            f"lr_scheduler is {config.lr_scheduler}, but Adafactor's relative steps follow no schedule.",
            where,
            why="with relative_step, which is its default, it makes the size of its steps itself.",
            fix="set lr_scheduler to adafactor, or add relative_step=False to optimizer_args",
        )


def _check_fused_backward(config: TrainConfig, entry: Known, where: str) -> None:
    if not config.fused_backward_pass:
        return
    able = ", ".join(name for name, known in KNOWN.items() if known.separable)
    reasons = {
        f"optimizer_type {config.optimizer_type}": (
            not entry.separable,
            f"choose one of {able}, which take their step for one tensor after the other",
        ),
        "max_grad_norm": (config.max_grad_norm > 0, "set max_grad_norm to 0: the norm is over all gradients"),
        "gradient_accumulation_steps": (
            config.gradient_accumulation_steps > 1,
            "set gradient_accumulation_steps to 1",
        ),
        "engine": (config.engine not in ("auto", "eager"), "set engine to auto or eager"),
        "mixed_precision fp16": (config.mixed_precision == "fp16", "set mixed_precision to bf16 or fp32"),
    }
    for what, (is_wrong, fix) in reasons.items():
        if is_wrong:
            raise contradiction(
                f"fused_backward_pass is on together with {what}.",
                where,
                why="it takes each tensor's step as soon as its gradient is there, and the gradient is gone.",
                fix=f"{fix}; or switch fused_backward_pass off",
            )
