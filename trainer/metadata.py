"""What a LoRA file says of itself: kohya's ss_* keys, modelspec, and this project's own.

Nothing here may depend on a clock, a host, a folder or chance: equal runs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .adapters.configured import network_args, network_module
from .adapters.files import PREDICTION, TERMINAL, VELOCITY, compact, read_tensors, tensor_hash
from .config import DatasetConfig, TrainConfig, as_dict, denoiser_lr, encoder_lr, resolution_wh
from .data.records import Record
from .data.train_set import TrainSet, training_samples
from .families import FAMILIES, Family
from .families.opening import Base
from .objective import Flow

# Settings that change neither the LoRA's tensors nor their order of making.
NOT_IN_HASH = (
    "fused_backward_pass",
    "engine",
    "attention",
    "memory",
    "blocks_to_swap",
    "gradient_checkpointing",
    "output_name",
    "name_taken",
    "cache_latents",
    "save_every_n_steps",
    "save_every_n_epochs",
    "save_n_epoch_ratio",
    "save_last_n_epochs",
    "save_last_n_steps",
    "save_last_n_epochs_state",
    "save_last_n_steps_state",
    "publish_checkpoints",
    "sample_prompts",
    "sample_at_first",
    "sample_every_n_steps",
    "sample_every_n_epochs",
    "sample_steps",
    "sample_cfg",
    "validate_every_n_steps",
    "validate_every_n_epochs",
    "validation_timesteps",
    "max_validation_steps",
    "log_with",
    "on_divergence",
    "resume",  # what it continues enters the hash by its content
    "preview_image",
    "metadata_title",
    "metadata_trigger_phrase",
    "training_comment",
    "embed_workflow",
    "save_as",
)


# Settings of runs and of datasets that the reference trainer's files tell under the same names.
OF_RUNS = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "gradient_accumulation_steps", "max_grad_norm"),
    *("gradient_checkpointing", "seed", "clip_skip", "max_token_length", "cache_latents", "min_snr_gamma"),
    *("scale_weight_norms", "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
    *("multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "zero_terminal_snr"),
    *("ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c"),
)
OF_DATA = (
    *("enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "shuffle_caption"),
    *("keep_tokens", "caption_dropout_rate", "caption_tag_dropout_rate"),
)
# Settings of a flow that the reference trainer's files tell, and its name of T5's mask.
OF_FLOW = (
    *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme", "logit_mean"),
    *("logit_std", "mode_scale", "model_prediction_type", "guidance_scale", "apply_t5_attn_mask"),
)

BASE, MODULE = "ss_base_model_version", "ss_network_module"
LORA = "networks.lora"  # kohya's module of plain LoRAs for bases that have none of their own
MODULES = {family.metadata[BASE]: family.metadata.get(MODULE, LORA) for family in FAMILIES.values()}

# Settings at their defaults are left out, so that a new setting leaves runs that were begun before it as they
# are. Where a default, or what a setting means, changes, this number has to.
HASH_VERSION = 2


def run_hash(
    base: Base, train_set: TrainSet, config: TrainConfig, total_steps: int | None, precision: str
) -> str:
    """Identify a run by all that its tensors depend on; ``total_steps`` None if they do not on it."""
    left_out = (*NOT_IN_HASH, "max_train_steps", "max_train_epochs", "mixed_precision")
    usual = as_dict(TrainConfig())
    settings = {k: v for k, v in as_dict(config).items() if k not in left_out and v != usual[k]}
    if config.network_weights:  # the run depends on the content, wherever it lies
        settings["network_weights"] = tensor_hash(read_tensors(Path(config.network_weights)))
    content = compact(
        [HASH_VERSION, settings, total_steps, precision, train_set.fingerprint, base.weights_hash]
    )
    return hashlib.sha256(content.encode()).hexdigest()


def trigger_words(train_set: TrainSet, config: TrainConfig) -> str:
    """Return the trigger words: those of the settings, else the class words that some caption holds.

    Class words beside caption files that leave them out were never shown to the model, and call nothing.
    """
    shown = [
        record.concept
        for record, own in zip(train_set.records, train_set.configs, strict=True)
        if record.concept and not record.is_reg and _is_shown(record, own)
    ]
    return config.metadata_trigger_phrase or ", ".join(dict.fromkeys(shown))


def _is_shown(record: Record, config: DatasetConfig) -> bool:
    """Say whether a caption, or what its settings put around it, holds the class words."""
    texts = (record.caption, config.caption_prefix, config.caption_suffix, config.caption_template)
    return any(record.concept.casefold() in text.casefold() for text in texts)


def build(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    *,
    run: str,
    precision: str,
    step: int,
    epoch: int,
    total_steps: int,
    num_epochs: int,
    batches_per_epoch: int,
    optimizer: str,
) -> dict[str, str]:
    """Return the metadata of the LoRA at ``step``, all but what depends on its tensors."""
    values: dict[str, object] = {
        **{f"ss_{name}": getattr(config, name) for name in OF_RUNS},
        **{f"ss_{name}": getattr(train_set.config, name) for name in OF_DATA},
        **_network_values(config, base.family),
        **_data_values(train_set),
        **_title_values(train_set, config),
        "ss_optimizer": optimizer,
        "ss_num_batches_per_epoch": batches_per_epoch,
        "ss_num_epochs": num_epochs,
        "ss_max_train_steps": total_steps,
        "ss_epoch": epoch,
        "ss_steps": step,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size * config.gradient_accumulation_steps,
        "ss_mixed_precision": {"fp32": "no"}.get(precision, precision),
        "ss_debiased_estimation": config.debiased_estimation_loss,
        "loragraft_run": run,
        "loragraft_base": base.weights_hash,
    }
    if isinstance(base.family.objective, Flow):
        values |= {f"ss_{name}": getattr(config, name) for name in OF_FLOW}
    if arguments := network_args(config):
        values["ss_network_args"] = compact(arguments)
    texts = {"ss_v2": "False", **base.family.metadata} | {k: _text(v) for k, v in values.items()}
    if config.v_parameterization:
        texts |= {PREDICTION: VELOCITY, "ss_v_parameterization": "True"}
        texts[TERMINAL] = str(config.zero_terminal_snr)
        texts |= base.family.velocity_metadata
    texts |= _told_of_images(train_set)
    texts["loragraft_settings"] = compact({"train": _told(config), "dataset": as_dict(train_set.config)})
    return texts


def lora_module(metadata: Mapping[str, str]) -> str:
    """Return kohya's module of plain LoRAs: that of the base that metadata name, else the one they name."""
    named = metadata.get(MODULE, "")
    return MODULES.get(metadata.get(BASE, ""), named if named.startswith(LORA) else LORA)


def _network_values(config: TrainConfig, family: Family) -> dict[str, object]:
    return {
        MODULE: network_module(config, family.metadata.get(MODULE, LORA)),
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha or float(config.network_dim),
        "ss_network_dropout": config.network_dropout or None,
        "ss_unet_lr": denoiser_lr(config),
        "ss_text_encoder_lr": encoder_lr(config),
    }


def _data_values(train_set: TrainSet) -> dict[str, object]:
    width, height = resolution_wh(train_set.config)
    return {
        "ss_num_train_images": training_samples(train_set),
        "ss_num_reg_images": sum(r.is_reg for r in train_set.records),
        "ss_resolution": f"({width}, {height})",
        "modelspec.resolution": f"{width}x{height}",
    }


def _title_values(train_set: TrainSet, config: TrainConfig) -> dict[str, object]:
    return {
        "ss_output_name": config.output_name,
        "ss_training_comment": config.training_comment or None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.metadata_title or config.output_name,
        "modelspec.trigger_phrase": trigger_words(train_set, config),
        "modelspec.encoder_layer": config.clip_skip,
    }


def _told_of_images(train_set: TrainSet) -> dict[str, str]:
    """Return the tags, folders and buckets, as JSON texts."""
    trained = [r for r in train_set.records if not r.is_reg]
    told: dict[str, object] = {
        "ss_tag_frequency": _tag_frequency(trained, train_set.config),
        "ss_dataset_dirs": _dataset_dirs(trained),
        "ss_bucket_info": _bucket_info(train_set),
    }
    if reg := [r for r in train_set.records if r.is_reg]:
        told["ss_reg_dataset_dirs"] = _dataset_dirs(reg)
    return {name: compact(value) for name, value in told.items()}


def with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the metadata with the hashes that depend on the saved tensors."""
    digest = tensor_hash(tensors)
    return {**metadata, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def with_workflow(metadata: Mapping[str, str], workflow: str | None) -> dict[str, str]:
    """Return the metadata with ComfyUI's workflow, so that dropping the file on the canvas opens it."""
    if not workflow:
        return dict(metadata)
    json.loads(workflow)
    return {**metadata, "workflow": workflow}


def _told(config: TrainConfig) -> dict[str, object]:
    """Return the settings without what says something of this machine: a file's folder."""
    name = Path(config.network_weights).name if config.network_weights else ""
    return {**as_dict(config), "network_weights": name}


def _text(value: object) -> str:
    return value if isinstance(value, str) else str(value)


def _tag_frequency(records: Sequence[Record], data: DatasetConfig) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for record in records:
        tags = (t.strip() for t in record.caption.split(data.caption_separator))
        counts.setdefault(_folder_name(record.repeats, record.concept), Counter()).update(
            t for t in tags if t
        )
    return {folder: dict(tags) for folder, tags in counts.items()}


def _dataset_dirs(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    dirs: dict[str, dict[str, int]] = {}
    for record in records:
        entry = dirs.setdefault(
            _folder_name(record.repeats, record.concept), {"n_repeats": record.repeats, "img_count": 0}
        )
        entry["img_count"] += 1
    return dirs


def _bucket_info(train_set: TrainSet) -> dict[str, object]:
    counts: Counter[tuple[int, int]] = Counter()
    for record, bucket in zip(train_set.records, train_set.buckets, strict=True):
        counts[bucket] += record.repeats
    buckets = {str(i): {"resolution": list(b), "count": n} for i, (b, n) in enumerate(sorted(counts.items()))}
    return {"buckets": buckets}


def _folder_name(repeats: int, concept: str) -> str:
    return f"{repeats}_{concept}"
