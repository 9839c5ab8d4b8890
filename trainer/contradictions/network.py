"""What contradicts itself in how the LoRA is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..config import ENCODER_RATES, TrainConfig, denoiser_lr
from ..patterns import patterns, rules
from ..settings.presets import PRESETS
from .refusals import bad_value, contradiction

RANKED = ("lora", "locon", "loha", "lokr", "dylora", "glora")  # scaled by alpha / rank
PLAIN = ("lora", "locon")
# How many blocks U-Nets have: SD1.x and SD2.x 12 down, 1 middle, 12 up; SDXL 9, 3, 9 and those around.
BLOCK_COUNTS = (25, 23)

# Settings that only some networks have: which, and what the others lack.
ONLY_FOR: Mapping[str, tuple[tuple[str, ...], str]] = {
    "dora_wd": ((*PLAIN, "loha", "lokr"), "it has no update that DoRA's lengths could lie around"),
    "use_tucker": ((*PLAIN, "loha", "lokr"), "it has no form of its own for convolutions"),
    "rs_lora": (RANKED, "it is not scaled by a rank"),
    "factor": (("lokr",), "it has no Kronecker factors"),
    "decompose_both": (("lokr",), "it has no Kronecker factors"),
    "full_matrix": (("lokr",), "it has no Kronecker factors"),
    "unbalanced_factorization": (("lokr",), "it has no Kronecker factors"),
    "unit": (("dylora",), "it trains all its ranks at once"),
    "constraint": (("oft", "boft"), "it turns nothing"),
    "rescaled": (("boft",), "ComfyUI reads such factors of boft alone"),
    "network_dropout": (PLAIN, "there is no rank between its tensors where values could be left out"),
    "rank_dropout": ((*PLAIN, "loha", "lokr", "full"), "the reference has no such dropout for it"),
    "rank_dropout_scale": ((*PLAIN, "loha", "lokr", "full"), "the reference has no such dropout for it"),
    "scale_weight_norms": (
        (*PLAIN, "loha", "lokr", "dylora", "oft", "boft"),
        "the reference has no rule for it",
    ),
}
# Settings that mean nothing without another one.
NEEDS: Mapping[str, tuple[str, str]] = {
    "conv_alpha": ("conv_dim", "without conv_dim no convolution is trained and conv_alpha has no effect"),
    "conv_block_alphas": ("conv_block_dims", "without them no block's convolutions are trained"),
    "wd_on_output": ("dora_wd", "it says how DoRA measures lengths"),
    "rank_dropout_scale": ("rank_dropout", "there is nothing to make up for"),
    "dim_from_weights": ("network_weights", "there is no file to take ranks from"),
}
# Settings that say the same as another one, so that one of them would not count.
INSTEAD: Mapping[str, tuple[str, ...]] = {
    "dim_from_weights": (
        *("conv_dim", "network_reg_dims", "block_dims", "block_alphas", "conv_block_dims", "rs_lora"),
        *("preset", "train_norm", "train_modules"),
    ),
    "full_matrix": ("decompose_both",),
    "dora_wd": ("network_dropout",),
    "network_train_unet_only": (
        *("network_train_text_encoder_only", "text_encoder_lr", "text_encoder_2_lr", "text_encoder_3_lr"),
    ),
    "network_train_text_encoder_only": (
        "unet_lr",
        "train_norm",
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
    ),
}
OF_DENOISER = (
    *("conv_dim", "train_norm", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
)
WITH_CONVOLUTIONS = tuple(name for name, preset in PRESETS.items() if preset.convolutions)
WITHOUT_TEXT = tuple(name for name, preset in PRESETS.items() if not (preset.text or preset.endings))
FIXES = {"conv_alpha": "set conv_dim (usually a half to a quarter of network_dim), or clear conv_alpha"}


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-003 or LG-CFG-004 for the first fault."""
    _check_algorithm(config, where)
    _check_pairs(config, where)
    _check_parts(config, where)
    _check_convolutions(config, where)
    _check_numbers(config, where)


def _check_algorithm(config: TrainConfig, where: str) -> None:
    for name, (algorithms, why) in ONLY_FOR.items():
        if _is_given(config, name) and config.algo not in algorithms:
            raise contradiction(
                f"{name} is given, but algo is '{config.algo}'.",
                where,
                why=f"{why}.",
                fix=f"set algo to {' or '.join(algorithms)}, or take {name} back",
            )


def _check_pairs(config: TrainConfig, where: str) -> None:
    for name, (needed, why) in NEEDS.items():
        if _is_given(config, name) and not _is_given(config, needed):
            fix = FIXES.get(name, f"set {needed}, or take {name} back")
            raise contradiction(f"{name} is given, but {needed} is not.", where, why=f"{why}.", fix=fix)
    for name, others in INSTEAD.items():
        other = next((o for o in others if _is_given(config, o) and getattr(config, o) != 0), None)
        if _is_given(config, name) and other is not None:
            raise contradiction(
                f"{name} is on, but {other} is given.",
                where,
                why=f"{other} would have no effect.",
                fix=f"take {other} back, or switch {name} off",
            )
    by_outputs = config.algo not in PLAIN or config.dora_wd or config.use_tucker
    if config.rank_dropout_scale and not by_outputs:
        raise contradiction(
            "rank_dropout_scale is on, but algo is a plain LoRA.",
            where,
            why="a LoRA's rank_dropout always makes up for what is left out.",
            fix="switch rank_dropout_scale off",
        )
    if config.network_dropout and config.use_tucker:
        raise contradiction(
            "network_dropout is given together with use_tucker.",
            where,
            why="in Tucker form there is no activation of the rank's size.",
            fix="take one of them back, or use rank_dropout",
        )


def _check_parts(config: TrainConfig, where: str) -> None:
    idle = next((name for name in OF_DENOISER if _is_given(config, name)), None)
    if idle is not None and denoiser_lr(config) == 0:
        raise contradiction(
            f"{idle} is given, but the denoiser is not trained.",
            where,
            why=f"{idle} is about the denoiser's modules alone, and its learning rate is 0.",
            fix=f"take {idle} back, or train the denoiser",
        )
    without_text = config.preset in WITHOUT_TEXT
    rate = next((name for name in ENCODER_RATES.values() if getattr(config, name)), None)
    if without_text and (config.network_train_text_encoder_only or rate is not None):
        given = rate or "network_train_text_encoder_only"
        raise contradiction(
            f"preset is '{config.preset}', but {given} is given.",
            where,
            why="this preset trains no module of the text encoder.",
            fix=f"take {given} back, or choose a preset such as full or attn-mlp",
        )


def _check_convolutions(config: TrainConfig, where: str) -> None:
    own = config.conv_dim is not None or bool(config.conv_block_dims)
    if own and config.preset and config.preset not in WITH_CONVOLUTIONS:
        given = "conv_dim" if config.conv_dim is not None else "conv_block_dims"
        raise contradiction(
            f"{given} is given, but preset '{config.preset}' has no convolutions.",
            where,
            why=f"{given} would have no effect.",
            fix=f"clear {given}, or choose {' or '.join(WITH_CONVOLUTIONS)}",
        )
    needing = "algo 'locon'" if config.algo == "locon" else "use_tucker" if config.use_tucker else ""
    trained = own or config.preset in WITH_CONVOLUTIONS or config.dim_from_weights
    if needing and not trained:
        raise contradiction(
            f"{needing} is given, but conv_dim is not.",
            where,
            why="without conv_dim no convolution is trained.",
            fix="set conv_dim (usually a half to a quarter of network_dim), or take it back",
        )


def _check_numbers(config: TrainConfig, where: str) -> None:
    if config.factor == 0:
        raise bad_value("factor", 0, "-1, or 1 and more", where)
    for name in ("network_dim", "conv_dim"):
        dim = getattr(config, name)
        if config.algo == "dylora" and dim is not None and dim % config.unit:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            near = min(divisors, key=lambda n: abs(n - config.unit))
            raise bad_value("unit", config.unit, f"a divisor of {name} {dim}", where, str(near))
    for name in ("block_dims", "conv_block_dims"):
        _check_list(config, name, where, lambda x: x.is_integer() and 0 <= x <= 1024)
    for name in ("block_alphas", "conv_block_alphas"):
        _check_list(config, name, where, lambda x: 0 <= x <= 4096)
    try:
        found = rules(config.network_reg_dims)
    except ValueError as error:
        expected = f"patterns with ranks, such as to_k$=8 ({error})"
        raise bad_value("network_reg_dims", config.network_reg_dims, expected, where) from None
    try:
        patterns(config.train_modules)
    except ValueError as error:
        expected = f"patterns, such as attn2 or to_k$ ({error})"
        raise bad_value("train_modules", config.train_modules, expected, where) from None
    for rule in found:
        if not (rule.value.is_integer() and 0 <= rule.value <= 1024):
            raise bad_value("network_reg_dims", f"{rule.text}={rule.value:g}", "ranks of 0 to 1024", where)


def _check_list(config: TrainConfig, name: str, where: str, is_good: Callable[[float], bool]) -> None:
    text = getattr(config, name)
    if not text:
        return
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in BLOCK_COUNTS or not all(is_good(value) for value in values):
        kind = "alphas" if name.endswith("alphas") else "whole numbers of 0 to 1024"
        given = f" (there are {len(values)})" if values and len(values) not in BLOCK_COUNTS else ""
        most, fewer = BLOCK_COUNTS
        raise bad_value(name, text, f"{most} {kind}, for SDXL {fewer}, separated by commas{given}", where)


def _is_given(config: TrainConfig, name: str) -> bool:
    """Say whether a setting is other than its default."""
    return bool(getattr(config, name) != type(config).__dataclass_fields__[name].default)
