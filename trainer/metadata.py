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


# Settings of a flow that the reference trainer's files tell, and its name of T5's mask.
OF_FLOW = (
    *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme", "logit_mean"),
    *("logit_std", "mode_scale", "model_prediction_type", "guidance_scale", "apply_t5_attn_mask"),
)

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
    """Return the trigger words: those of the settings, else the concepts' class words."""
    return config.metadata_trigger_phrase or ", ".join(
        dict.fromkeys(r.concept for r in train_set.records if r.concept and not r.is_reg)
    )


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
    data = train_set.config
    width, height = resolution_wh(data)
    title = config.metadata_title or config.output_name
    values: dict[str, object] = {
        "ss_output_name": config.output_name,
        "ss_network_module": network_module(config),
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha or float(config.network_dim),
        "ss_network_dropout": config.network_dropout or None,
        "ss_scale_weight_norms": config.scale_weight_norms,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": denoiser_lr(config),
        "ss_text_encoder_lr": encoder_lr(config),
        "ss_optimizer": optimizer,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_num_train_images": training_samples(train_set),
        "ss_num_reg_images": sum(r.is_reg for r in train_set.records),
        "ss_num_batches_per_epoch": batches_per_epoch,
        "ss_num_epochs": num_epochs,
        "ss_max_train_steps": total_steps,
        "ss_epoch": epoch,
        "ss_steps": step,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size * config.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_mixed_precision": {"fp32": "no"}.get(precision, precision),
        "ss_seed": config.seed,
        "ss_clip_skip": config.clip_skip,
        "ss_max_token_length": config.max_token_length,
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_cache_latents": config.cache_latents,
        "ss_v2": False,
        "ss_resolution": f"({width}, {height})",
        "ss_enable_bucket": data.enable_bucket,
        "ss_bucket_no_upscale": data.bucket_no_upscale,
        "ss_min_bucket_reso": data.min_bucket_reso,
        "ss_max_bucket_reso": data.max_bucket_reso,
        "ss_shuffle_caption": data.shuffle_caption,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": data.caption_dropout_rate,
        "ss_caption_tag_dropout_rate": data.caption_tag_dropout_rate,
        "ss_training_comment": config.training_comment or None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.trigger_phrase": trigger_words(train_set, config),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.encoder_layer": config.clip_skip,
        "loragraft_run": run,
        "loragraft_base": base.weights_hash,
    }
    if isinstance(base.family.objective, Flow):
        values |= {f"ss_{name}": getattr(config, name) for name in OF_FLOW}
    if arguments := network_args(config):
        values["ss_network_args"] = compact(arguments)
    texts = {k: _text(v) for k, v in values.items()}
    texts |= base.family.metadata
    if config.v_parameterization:
        texts |= {PREDICTION: VELOCITY, "ss_v_parameterization": "True"}
        texts[TERMINAL] = str(config.zero_terminal_snr)
        texts |= getattr(base.family, "velocity_metadata", {})  # of a family that calls such models otherwise
    trained = [r for r in train_set.records if not r.is_reg]
    texts["ss_tag_frequency"] = compact(_tag_frequency(trained, data))
    texts["ss_dataset_dirs"] = compact(_dataset_dirs(trained))
    if reg := [r for r in train_set.records if r.is_reg]:
        texts["ss_reg_dataset_dirs"] = compact(_dataset_dirs(reg))
    texts["ss_bucket_info"] = compact(_bucket_info(train_set))
    texts["loragraft_settings"] = compact({"train": _told(config), "dataset": as_dict(data)})
    return texts


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
