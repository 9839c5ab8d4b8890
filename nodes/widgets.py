"""Node widgets out of the settings' dataclasses: one explicit table, no host needed.

Saved workflows store widget values by position, so the order below is fixed for ever: a new
widget goes to the end of its table's last group and is optional.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..trainer import checks, config

# Names in widget order: first the visible ones (required inputs), then the advanced ones (optional
# inputs, so that prompts posted by older scripts stay valid when a setting is added).
DATASET_COMMON = (
    "resolution",
    "enable_bucket",
    "shuffle_caption",
    "keep_tokens",
    "caption_dropout_rate",
)
DATASET_ADVANCED = (
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "caption_separator",
    "caption_tag_dropout_rate",
    "flip_aug",
    "balance_concepts",
    "prior_loss_weight",
    "validation_split",
    "validation_seed",
    "caption_dropout_every_n_epochs",
    "caption_prefix",
    "caption_suffix",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "token_warmup_min",
    "token_warmup_step",
    "caption_template",
    "num_bucket",
)
TRAIN_COMMON = (
    "output_name",
    "network_dim",
    "network_alpha",
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_train_steps",
    "max_train_epochs",
    "train_batch_size",
    "min_snr_gamma",
    "mixed_precision",
    "clip_skip",
    "seed",
    "save_every_n_epochs",
    "sample_prompts",
)
# These came when Train LoRA had existing_run already, so they stand behind it.
TRAIN_LATER = ("attention", "base_storage", "memory", "blocks_to_swap")
TRAIN_ADVANCED = (
    "name_taken",
    "conv_dim",
    "conv_alpha",
    "network_train_unet_only",
    "optimizer_type",
    "optimizer_args",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_grad_norm",
    "max_token_length",
    "cache_latents",
    "save_precision",
    "save_every_n_steps",
    "sample_every_n_steps",
    "sample_steps",
    "sample_cfg",
    "preview_image",
    "metadata_title",
    "metadata_trigger_phrase",
    "training_comment",
    "embed_workflow",
    "engine",
    "deterministic",
    *TRAIN_LATER,
)

# A number widget cannot be empty: this value stands for "empty", and the tooltip below says so.
EMPTY: dict[str, int] = {
    "conv_dim": 0,
    "conv_alpha": 0,
    "unet_lr": -1,
    "text_encoder_lr": -1,
    "max_train_epochs": 0,
    "min_snr_gamma": 0,
    "save_every_n_steps": 0,
    "save_every_n_epochs": 0,
    "sample_every_n_steps": 0,
    "scale_weight_norms": 0,
    "loraplus_lr_ratio": 0,
    "loraplus_unet_lr_ratio": 0,
    "loraplus_text_encoder_lr_ratio": 0,
    "text_encoder_2_lr": -1,
    "text_encoder_3_lr": -1,
    "discrete_flow_shift": 0,
    "guidance_scale": -1,
    "t5xxl_max_token_length": 0,
    "lr_scheduler_min_lr_ratio": -1,
    "lr_scheduler_timescale": 0,
    "tokenizer_repeats": 0,
    "save_n_epoch_ratio": 0,
    "save_last_n_epochs": 0,
    "save_last_n_steps": 0,
    "save_last_n_epochs_state": 0,
    "save_last_n_steps_state": 0,
    "sample_every_n_epochs": 0,
    "validate_every_n_steps": 0,
    "validate_every_n_epochs": 0,
    "max_validation_steps": 0,
    "sample_cfg": 0,
    "sample_steps": 0,
}
STEPS = {
    "resolution": 8,
    "min_bucket_reso": 8,
    "max_bucket_reso": 8,
    "bucket_reso_steps": 8,
    "learning_rate": 1e-6,
    "unet_lr": 1e-6,
    "text_encoder_lr": 1e-6,
    "text_encoder_2_lr": 1e-6,
    "text_encoder_3_lr": 1e-6,
    "discrete_flow_shift": 0.1,
    "guidance_scale": 0.5,
    "t5xxl_max_token_length": 16,
    "lr_warmup_steps": 0.01,
    "lr_decay_steps": 0.01,
    "embedding_lr": 1e-4,
    "ema_decay": 1e-4,
    "huber_c": 0.01,
    "block_lr_zero_threshold": 0.05,
    "scale_weight_norms": 0.1,
    "loraplus_lr_ratio": 1,
    "loraplus_unet_lr_ratio": 1,
    "loraplus_text_encoder_lr_ratio": 1,
    "caption_dropout_rate": 0.01,
    "caption_tag_dropout_rate": 0.01,
    "prior_loss_weight": 0.05,
    "validation_split": 0.01,
    "token_warmup_step": 0.01,
    "network_alpha": 0.5,
    "conv_alpha": 0.5,
    "min_snr_gamma": 0.5,
    "lr_scheduler_power": 0.1,
    "max_grad_norm": 0.1,
    "sample_cfg": 0.5,
}
MAXIMA = {"seed": 2**53 - 1}  # a browser's numbers are exact up to here
MULTILINE = (
    *("sample_prompts", "caption_template", "network_reg_dims", "network_reg_lrs", "train_embeddings"),
)
# Numbers below 1 are a share of all steps, others a number of steps.
STEPS_OR_SHARE = ("lr_warmup_steps", "lr_decay_steps", "token_warmup_step")
# A setting's help serves as tooltip, except where a widget is written otherwise than a config file.
TOOLTIPS = {
    "resolution": "Side of the training area in pixels. With buckets, its square is the area that every "
    "bucket stays within.",
    # Braces, bars and at signs are syntax in ComfyUI's translated texts.
    "enable_wildcard": "Pick one of the words in braces that are parted by vertical bars, and one line of "
    "several, anew at each use.",
    "keep_tokens_separator": "Mark in a caption, usually three vertical bars: tags before it stay in "
    "place, as do those behind a second one.",
    "caption_template": "Text around every caption; the tags go where the word caption stands in "
    "braces. One of several lines is picked at each use.",
    "conv_dim": "Rank for 3x3 convolutions; 0 trains none of them, or with a preset that has convolutions "
    "takes network_dim and network_alpha.",
    "conv_alpha": "Alpha for 3x3 convolutions; 0 means 1.",
    "unet_lr": "Learning rate of the denoiser; -1 takes learning_rate, 0 leaves it out.",
    "text_encoder_lr": "Learning rate of the text encoder; -1 takes learning_rate, 0 leaves it out.",
    "text_encoder_2_lr": "Learning rate of the second text encoder; -1 takes that of the first, or for T5 "
    "and its like leaves it out, as 0 does.",
    "text_encoder_3_lr": "Learning rate of the third text encoder; -1 takes that of the first, or for T5 "
    "and its like leaves it out, as 0 does.",
    "discrete_flow_shift": "Moves the noise levels of timestep_sampling shift, sigma, logit_normal and mode: "
    "above 1 noisier (3 is usual), 1 not; 0 takes the model's.",
    "guidance_scale": "Guidance that a distilled model such as Flux.1 dev is told while it is trained (1 is "
    "usual); -1 takes the model's.",
    "t5xxl_max_token_length": "Longest caption for T5 and other encoders of whole sentences, in tokens; 0 "
    "takes the model's.",
    "max_train_epochs": "Number of epochs, replacing max_train_steps; 0 leaves it to max_train_steps.",
    "min_snr_gamma": "Min-SNR loss weighting (5 is usual); 0 weighs all timesteps alike.",
    "save_every_n_steps": "Also save every n steps; 0 does not.",
    "save_every_n_epochs": "Also save every n epochs; 0 does not.",
    "sample_every_n_steps": "Draw the sample prompts every n steps; 0 does not, and with "
    "sample_every_n_epochs 0 as well they are drawn at each save.",
    "sample_prompts": "Prompts drawn during training, one per line, one image each; --w --h --d --s --l --n "
    "after a prompt set its width, height, seed, steps, guidance scale and negative prompt.",
    "optimizer_args": "Optimizer options as kohya writes them, separated by spaces: "
    "weight_decay=0.01 betas=.9,.99",
    "lr_scheduler_args": "Options of the schedule, separated by spaces: T_0=400 decay=0.9",
    "network_reg_dims": "Ranks of single modules, one pattern=rank per line: the pattern is a regular "
    "expression that is looked for in the module's name. The first that is found counts; rank 0 leaves a "
    "module out.",
    "network_reg_lrs": "Learning rates of single modules, one pattern=rate per line: the pattern is a "
    "regular expression that is looked for in the module's name. The first that is found counts.",
    "network_weights": "LoRA file below models/loras to start from instead of from nothing.",
    "train_modules": "Train only modules in whose name one of these regular expressions is found, such as "
    "attn2 or up_blocks, separated by spaces; empty trains all that the preset has.",
    "train_embeddings": "Words whose embeddings are trained along with the LoRA, one per line: word, "
    "word*vectors or word=text to begin from*vectors.",
    "seed": "Seed of everything random in the run. It stays fixed, so that queueing again does not train "
    "again.",
}


@dataclass(frozen=True)
class Widget:
    """One widget; ``kind`` is int, float, bool, text or choice."""

    name: str
    kind: str
    default: Any
    tooltip: str
    advanced: bool
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    multiline: bool = False


def dataset_widgets() -> list[Widget]:
    """List Build Dataset's widgets in their fixed order."""
    return _widgets(config.DatasetConfig, DATASET_COMMON, DATASET_ADVANCED)


def train_widgets() -> list[Widget]:
    """List Train LoRA's widgets in their fixed order."""
    return _widgets(config.TrainConfig, TRAIN_COMMON, TRAIN_ADVANCED)


def dataset_config(values: Mapping[str, Any]) -> config.DatasetConfig:
    """Build the DatasetConfig that widget values mean; raises LoraGraftError as any other source does."""
    return checks.make(config.DatasetConfig, settings(config.DatasetConfig, values), where="Build Dataset")


def train_config(values: Mapping[str, Any], linked: Mapping[str, Any] | None = None) -> config.TrainConfig:
    """Build the TrainConfig that widget values mean; raises LoraGraftError as any other source does.

    ``linked`` are plain settings that count instead of the widgets of their names.
    """
    plain = {**settings(config.TrainConfig, values), **(linked or {})}
    return checks.make(config.TrainConfig, plain, where="Train LoRA")


def settings(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn widget values into plain settings: 0 or -1 into empty, lines into a tuple, "75" into 75."""
    hints = typing.get_type_hints(cls)
    return {name: _setting(name, value, hints.get(name, str)) for name, value in values.items()}


def as_widget(name: str, value: Any) -> Any:
    """Return a setting as its widget holds it: the value that stands for empty, lines of text."""
    if value is None:
        return EMPTY[name]
    if isinstance(value, tuple | list):
        return ("\n" if name in MULTILINE else " ").join(map(str, value))
    return value


def _setting(name: str, value: Any, hint: Any) -> Any:
    if name in EMPTY and value == EMPTY[name]:
        return None
    if hint == tuple[str, ...] and isinstance(value, str):
        parts = value.splitlines() if name in MULTILINE else value.split()
        return tuple(p.strip() for p in parts if p.strip())
    if name == "max_token_length" and isinstance(value, str) and value.isdecimal():
        return int(value)
    if name in STEPS_OR_SHARE and isinstance(value, float) and value >= 1 and value.is_integer():
        return int(value)
    if name in STEPS_OR_SHARE and value == 0:
        return 0
    return value


def widgets_of(cls: type, names: Iterable[str]) -> list[Widget]:
    """List the widgets of these settings, none of them folded away."""
    return _widgets(cls, names, ())


def _widgets(cls: type, common: Iterable[str], advanced: Iterable[str]) -> list[Widget]:
    hints = typing.get_type_hints(cls)
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    names = [*((n, False) for n in common), *((n, True) for n in advanced)]
    return [
        _widget(name, hints[name], fields[name].default, config.info_of(cls, name), late)
        for name, late in names
    ]


def _widget(name: str, hint: Any, default: Any, info: config.Info, advanced: bool) -> Widget:
    tooltip = tooltip_of(name, info.help)
    kinds = typing.get_args(hint) or (hint,)
    if info.choices:
        return Widget(name, "choice", str(default), tooltip, advanced, choices=info.choices)
    if hint is bool:
        return Widget(name, "bool", default, tooltip, advanced)
    if hint is str or hint == tuple[str, ...]:
        text = "" if default == () else default
        return Widget(name, "text", text, tooltip, advanced, multiline=name in MULTILINE)
    kind = "float" if float in kinds else "int"
    empty = EMPTY.get(name)
    number = float if kind == "float" else int
    default = number(default if default is not None else typing.cast(int, empty))
    low = info.minimum if empty is None else empty
    high = MAXIMA.get(name, info.maximum)
    return Widget(
        name,
        kind,
        default,
        tooltip,
        advanced,
        minimum=None if low is None else number(low),
        maximum=None if high is None else number(high),
        step=STEPS.get(name, 1 if kind == "int" else 0.01),
    )


def tooltip_of(name: str, help: str) -> str:
    """Return a widget's tooltip; a number that may be empty in a config file says what stands for that."""
    if name in EMPTY and name not in TOOLTIPS:
        return f"{help} Here {EMPTY[name]} stands for empty."
    return TOOLTIPS.get(name, help)


def inputs(io: Any, widgets: Iterable[Widget]) -> list[Any]:
    """Return the V3 inputs of these widgets; ``io`` is comfy_api's module."""
    return [_input(io, w) for w in widgets]


def _input(io: Any, w: Widget) -> Any:
    common: dict[str, Any] = {"default": w.default, "tooltip": w.tooltip}
    if w.advanced:
        common |= {"advanced": True, "optional": True}
    if w.kind == "bool":
        return io.Boolean.Input(w.name, **common)
    if w.kind == "choice":
        return io.Combo.Input(w.name, options=list(w.choices), **common)
    if w.kind == "text":
        return io.String.Input(w.name, multiline=w.multiline, **common)
    limits = {"min": w.minimum, "max": w.maximum, "step": w.step}
    if w.kind == "int":
        # Fixed by default: a seed that changes by itself would train anew at every queueing.
        control = io.ControlAfterGenerate.fixed if w.name == "seed" else None
        return io.Int.Input(w.name, control_after_generate=control, **limits, **common)
    # round=False: the browser must not round 5e-7 away.
    return io.Float.Input(w.name, round=False, **limits, **common)
