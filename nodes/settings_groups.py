"""The settings nodes: which settings stand on which node, and what a choice on it shows. No host needed.

Train LoRA has the settings that most runs touch. The others stand on nodes beside it, one a subject,
whose ``settings`` output is linked to it, or to the next of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..trainer import checks, config
from ..trainer.errors import LoraGraftError, listed
from . import widgets

Settings = dict[str, Any]  # settings by name, checked values


@dataclass(frozen=True)
class Linked:
    """What flows between these nodes: settings that were given, and those that a config leaves out.

    The latter have the defaults of the trainer that the config is for; they count where no node gives them.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> Settings:
        """All settings."""
        return {**self.left_out, **self.given}


@dataclass(frozen=True)
class Group:
    """One settings node: ``choice`` is the setting whose value decides which of ``options`` are shown.

    A new node has the first of the options, so that has to be the setting's default. Saved workflows store
    the values of ``always`` by position: new ones go to the end.
    """

    node_id: str
    title: str
    description: str
    aliases: tuple[str, ...]
    choice: str
    options: Mapping[str, tuple[str, ...]]
    always: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All settings of the node, each once."""
        shown = [name for names in self.options.values() for name in names]
        first = (self.choice,) if self.choice else ()
        return tuple(dict.fromkeys((*first, *shown, *self.always)))


CONV = ("conv_dim", "conv_alpha")
HUBER = ("huber_schedule", "huber_c", "huber_scale")
ROTATION = ("constraint",)

NETWORK = Group(
    "LoraGraftNetwork",
    "Network",
    "The kind of network: LoRA, LoHa, LoKr, DyLoRA and others, with convolutions, dropouts, and a file to "
    "start from. Rank and alpha stand on Train LoRA.",
    ("lycoris", "loha", "lokr", "dora", "locon", "dropout"),
    "algo",
    {
        "lora": (*CONV, "dora_wd", "wd_on_output", "rs_lora", "use_tucker"),
        "locon": (*CONV, "dora_wd", "wd_on_output", "rs_lora", "use_tucker"),
        "loha": (*CONV, "dora_wd", "wd_on_output", "rs_lora", "use_tucker", "rank_dropout_scale"),
        "lokr": (
            *("factor", "decompose_both", "full_matrix", "unbalanced_factorization", *CONV, "dora_wd"),
            *("wd_on_output", "rs_lora", "use_tucker", "rank_dropout_scale"),
        ),
        "dylora": ("unit", *CONV),
        "ia3": (),
        "oft": ROTATION,
        "boft": (*ROTATION, "rescaled"),
        "glora": ("rs_lora",),
        "full": ("rank_dropout_scale",),
    },
    (
        *("preset", "train_norm", "network_train_text_encoder_only", "network_dropout", "rank_dropout"),
        *("module_dropout", "scale_weight_norms", "network_weights", "dim_from_weights", "train_modules"),
    ),
)
BLOCKS = Group(
    "LoraGraftBlocks",
    "Blocks",
    "How fast each block of the denoiser learns, and with which rank. The bars show the weights.",
    ("block weight", "lbw", "down_lr_weight"),
    "",
    {},
    (
        *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
        *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
        *("network_reg_dims", "network_reg_lrs"),
    ),
)
OPTIMIZER = Group(
    "LoraGraftOptimizer",
    "Optimizer",
    "The optimizer and its options. One whose library is missing is refused with the command that installs"
    " it.",
    ("prodigy", "adafactor", "lion", "8bit", "lora+"),
    "",
    {},
    (
        *("optimizer_type", "optimizer_args", "loraplus_lr_ratio", "loraplus_unet_lr_ratio"),
        *("loraplus_text_encoder_lr_ratio", "scale_lr", "fused_backward_pass", "ema_decay"),
        *("text_encoder_2_lr", "text_encoder_3_lr"),
    ),
)
SCHEDULE = Group(
    "LoraGraftSchedule",
    "Schedule",
    "How the learning rate changes over the run. The curve shows it before anything is trained.",
    ("lr_scheduler", "warmup", "restarts"),
    "lr_scheduler",
    {
        "cosine": (),
        "constant": (),
        "constant_with_warmup": (),
        "linear": (),
        "cosine_with_restarts": ("lr_scheduler_num_cycles",),
        "polynomial": ("lr_scheduler_power",),
        "cosine_with_min_lr": ("lr_scheduler_min_lr_ratio", "lr_scheduler_num_cycles"),
        "inverse_sqrt": ("lr_scheduler_timescale",),
        "warmup_stable_decay": ("lr_decay_steps", "lr_scheduler_min_lr_ratio", "lr_scheduler_num_cycles"),
        "piecewise_constant": (),
        "cosine_with_warm_restarts": ("lr_scheduler_num_cycles",),
        "adafactor": (),
    },
    ("lr_warmup_steps", "lr_scheduler_type", "lr_scheduler_args"),
)
LOSS = Group(
    "LoraGraftLoss",
    "Loss and Noise",
    "What is predicted, how much each prediction counts, and what the noise is.",
    ("huber", "noise offset", "v-prediction", "min snr", "multires noise", "flow shift", "timestep sampling"),
    "loss_type",
    {"l2": (), "l1": (), "huber": HUBER, "smooth_l1": HUBER},
    (
        *("v_parameterization", "zero_terminal_snr", "debiased_estimation_loss"),
        *("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "noise_offset"),
        *("noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations"),
        *("multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength"),
        *("min_timestep", "max_timestep", "masked_loss", "mask_range"),
        *("timestep_sampling", "discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std"),
        *("mode_scale", "weighting_scheme", "model_prediction_type", "guidance_scale"),
    ),
)
TEXT = Group(
    "LoraGraftText",
    "Text and Embeddings",
    "How captions are read, and words whose embeddings are trained along with the LoRA.",
    ("textual inversion", "embedding", "prompt weights"),
    "",
    {},
    (
        *("train_embeddings", "embedding_lr", "weighted_captions", "weighted_captions_keep_mean"),
        *("cache_text_encoder_outputs", "tokenizer_repeats", "t5xxl_max_token_length"),
        "apply_t5_attn_mask",
    ),
)
SAVING = Group(
    "LoraGraftSaving",
    "Saving and Validation",
    "What is kept on the way, when it is measured on images that were kept out, and which run is continued.",
    ("validation", "checkpoint", "resume", "tensorboard"),
    "",
    {},
    (
        *("publish_checkpoints", "save_n_epoch_ratio", "save_last_n_epochs", "save_last_n_steps"),
        *("save_last_n_epochs_state", "save_last_n_steps_state", "sample_at_first", "sample_every_n_epochs"),
        *("validate_every_n_steps", "validate_every_n_epochs", "validation_timesteps"),
        *("max_validation_steps", "log_with", "on_divergence", "resume", "save_as"),
    ),
)
GROUPS: Mapping[str, Group] = {
    group.node_id: group for group in (NETWORK, BLOCKS, OPTIMIZER, SCHEDULE, LOSS, TEXT, SAVING)
}


def values_of(group: Group, given: Mapping[str, Any]) -> Settings:
    """Return the plain settings that a node's widgets mean; raises LG-CFG errors, naming the node."""
    flat: Settings = {}
    for name, value in given.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    plain = widgets.settings(config.TrainConfig, flat)
    return checks.check_values(config.TrainConfig, plain, where=group.title)


def joined(before: Linked | None, own: Linked, title: str) -> Linked:
    """Return the settings of nodes linked in a row; raises LG-NODE-030 where two give one setting."""
    before = before or Linked()
    twice = [name for name in own.given if name in before.given]
    if twice:
        raise LoraGraftError(
            "LG-NODE-030",
            f"Two linked nodes give {listed(twice, limit=4)}.",
            where=f"{title}: settings",
            why="only one of the two values could count.",
            fix="take one of the nodes out of the row",
        )
    return Linked({**before.given, **own.given}, {**before.left_out, **own.left_out})


def told(linked: Mapping[str, Any], on_node: Mapping[str, Any]) -> list[str]:
    """Say which widgets of Train LoRA give way to linked settings of another value."""
    names = [n for n, value in linked.items() if n in on_node and on_node[n] != value]
    return [f"{n} = {linked[n]!r} from the linked settings, instead of {on_node[n]!r}" for n in names]


def found_weights(run: config.TrainConfig, known: str, find: Callable[[str], Path]) -> config.TrainConfig:
    """Return a run's config with the file that it starts from found by its name; ``known`` is found already.

    The only way from a sweep's text to a file.
    """
    named = run.network_weights
    return run if named in ("", known) else replace(run, network_weights=str(find(named)))


def inputs_of(io: Any, group: Group) -> list[Any]:
    """Return the V3 inputs of a settings node; ``io`` is comfy_api's module."""
    table = {w.name: w for w in widgets.widgets_of(config.TrainConfig, group.names)}

    def made(names: Iterable[str]) -> list[Any]:
        return widgets.inputs(io, (table[name] for name in names))

    inputs = []
    if group.choice:
        options = [io.DynamicCombo.Option(key, made(names)) for key, names in group.options.items()]
        inputs.append(
            io.DynamicCombo.Input(group.choice, options=options, tooltip=table[group.choice].tooltip)
        )
    return inputs + made(group.always)
