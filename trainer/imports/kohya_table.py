"""Every argument of kohya's scripts for LoRAs and what becomes of it here.

kohya_scripts says which script has which. An argument stands in exactly one table. HONOURED: the setting of
the same name. TRANSLATED: a setting of another name or form. PLACES: a path. NOTED: what it asks for is
always done, or means nothing here; a note says why. REFUSED: it would change the result and cannot be
honoured. Facts: sd-scripts 0.10.1.
"""

from __future__ import annotations

from typing import Any

from ..data.kohya_keys import NUMBER, SWITCH, TEXT, WHOLE

WORDS, STEPS = "a list of texts", "a whole number, or a share below 1"
RATES = "a rate for each text encoder"

# name -> the kind of its value; the setting of the same name is meant.
HONOURED: dict[str, str] = {
    # model and network
    "network_dim": WHOLE,
    "network_alpha": NUMBER,
    "network_dropout": NUMBER,
    "network_train_unet_only": SWITCH,
    "network_train_text_encoder_only": SWITCH,
    "network_weights": TEXT,
    "dim_from_weights": SWITCH,
    "scale_weight_norms": NUMBER,
    # learning
    "learning_rate": NUMBER,
    "unet_lr": NUMBER,
    "optimizer_args": WORDS,
    "lr_scheduler": TEXT,
    "lr_scheduler_type": TEXT,
    "lr_scheduler_args": WORDS,
    "lr_warmup_steps": STEPS,
    "lr_decay_steps": STEPS,
    "lr_scheduler_num_cycles": WHOLE,
    "lr_scheduler_power": NUMBER,
    "lr_scheduler_timescale": WHOLE,
    "lr_scheduler_min_lr_ratio": NUMBER,
    "max_grad_norm": NUMBER,
    "fused_backward_pass": SWITCH,
    # loss and noise
    "v_parameterization": SWITCH,
    "zero_terminal_snr": SWITCH,
    "min_snr_gamma": NUMBER,
    "scale_v_pred_loss_like_noise_pred": SWITCH,
    "v_pred_like_loss": NUMBER,
    "debiased_estimation_loss": SWITCH,
    "loss_type": TEXT,
    "huber_schedule": TEXT,
    "huber_c": NUMBER,
    "huber_scale": NUMBER,
    "noise_offset": NUMBER,
    "noise_offset_random_strength": SWITCH,
    "adaptive_noise_scale": NUMBER,
    "multires_noise_iterations": WHOLE,
    "multires_noise_discount": NUMBER,
    "ip_noise_gamma": NUMBER,
    "ip_noise_gamma_random_strength": SWITCH,
    "min_timestep": WHOLE,
    "max_timestep": WHOLE,
    "prior_loss_weight": NUMBER,
    # captions and images
    "clip_skip": WHOLE,
    "max_token_length": WHOLE,
    "weighted_captions": SWITCH,
    "cache_text_encoder_outputs": SWITCH,
    "t5xxl_max_token_length": WHOLE,
    "apply_t5_attn_mask": SWITCH,
    "guidance_scale": NUMBER,
    "shuffle_caption": SWITCH,
    "caption_separator": TEXT,
    "keep_tokens": WHOLE,
    "keep_tokens_separator": TEXT,
    "secondary_separator": TEXT,
    "enable_wildcard": SWITCH,
    "caption_prefix": TEXT,
    "caption_suffix": TEXT,
    "caption_dropout_rate": NUMBER,
    "caption_dropout_every_n_epochs": WHOLE,
    "caption_tag_dropout_rate": NUMBER,
    "token_warmup_min": WHOLE,
    "token_warmup_step": NUMBER,
    "flip_aug": SWITCH,
    "enable_bucket": SWITCH,
    "min_bucket_reso": WHOLE,
    "max_bucket_reso": WHOLE,
    "bucket_reso_steps": WHOLE,
    "bucket_no_upscale": SWITCH,
    # the run
    "max_train_steps": WHOLE,
    "max_train_epochs": WHOLE,
    "train_batch_size": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "gradient_checkpointing": SWITCH,
    "blocks_to_swap": WHOLE,
    "mixed_precision": TEXT,
    "seed": WHOLE,
    "cache_latents": SWITCH,
    "validation_seed": WHOLE,
    "validation_split": NUMBER,
    "validate_every_n_steps": WHOLE,
    "validate_every_n_epochs": WHOLE,
    "max_validation_steps": WHOLE,
    # saving
    "output_name": TEXT,
    "save_precision": TEXT,
    "save_every_n_steps": WHOLE,
    "save_every_n_epochs": WHOLE,
    "save_n_epoch_ratio": WHOLE,
    "save_last_n_epochs": WHOLE,
    "save_last_n_epochs_state": WHOLE,
    "save_last_n_steps": WHOLE,
    "save_last_n_steps_state": WHOLE,
    "sample_every_n_steps": WHOLE,
    "sample_every_n_epochs": WHOLE,
    "sample_at_first": SWITCH,
    "training_comment": TEXT,
    "metadata_title": TEXT,
    "metadata_trigger_phrase": TEXT,
}

# name -> its kind; kohya, kohya_values and kohya_network say what becomes of them.
TRANSLATED: dict[str, str] = {
    "network_module": TEXT,
    "network_args": WORDS,
    "text_encoder_lr": RATES,
    "optimizer_type": TEXT,
    "use_8bit_adam": SWITCH,
    "use_lion_optimizer": SWITCH,
    "resolution": "a whole number or width,height",
    "fp8_base": SWITCH,
    "fp8_base_unet": SWITCH,
    "log_with": TEXT,
    "caption_extension": TEXT,
    "caption_extention": TEXT,
    "alpha_mask": SWITCH,
    "masked_loss": SWITCH,
    "in_json": TEXT,
    "dataset_repeats": WHOLE,
    "cache_text_encoder_outputs_to_disk": SWITCH,
    "timestep_sampling": TEXT,
    "sigmoid_scale": NUMBER,
    "discrete_flow_shift": NUMBER,
    "training_shift": NUMBER,
    "weighting_scheme": TEXT,
    "logit_mean": NUMBER,
    "logit_std": NUMBER,
    "mode_scale": NUMBER,
    "model_prediction_type": TEXT,
    "model_type": TEXT,
}

# name -> what lies there.
PLACES: dict[str, str] = {
    "pretrained_model_name_or_path": "base model",
    "vae": "VAE",
    "ae": "VAE",
    "clip_l": "text encoder",
    "clip_g": "text encoder",
    "t5xxl": "text encoder",
    "train_data_dir": "image folder",
    "reg_data_dir": "folder of regularisation images",
    "dataset_config": "dataset config",
    "output_dir": "output folder",
    "sample_prompts": "file of sample prompts",
}

_ONE_DEVICE = "the processes of a run agree on their gradients by themselves"
_NO_WORKERS = "pictures are encoded once and batches are read from the cache, so there is no loader process"
_ATTENTION = "attention=auto measures the ways that this machine has and takes the fastest"
_LOGS = "a run's folder holds its TensorBoard files, log.jsonl and log.log"
_DEEPSPEED = "deepspeed is off"
# name -> (kind, why nothing has to be done for it)
NOTED: dict[str, tuple[str, str]] = {
    "xformers": (SWITCH, _ATTENTION),
    "sdpa": (SWITCH, _ATTENTION),
    "mem_eff_attn": (SWITCH, _ATTENTION),
    "torch_compile": (SWITCH, "engine=auto replays whole steps as CUDA graphs where it can"),
    "dynamo_backend": (TEXT, "nothing is compiled; engine=auto chooses"),
    "lowram": (SWITCH, "weights are read straight to where they are used"),
    "highvram": (SWITCH, "memory=auto frees memory only where a run would not fit"),
    "full_fp16": (SWITCH, "the LoRA itself stays in fp32, which is more exact and costs little"),
    "full_bf16": (SWITCH, "the LoRA itself stays in fp32, which is more exact and costs little"),
    "cpu_offload_checkpointing": (SWITCH, "memory=auto swaps blocks where a run would not fit"),
    "no_half_vae": (SWITCH, "the VAE is never run in a precision in which it overflows"),
    "vae_batch_size": (WHOLE, "the encoder's batch size changes no result and is chosen here"),
    "cache_latents_to_disk": (SWITCH, "latents are always kept on disk, named by content, not beside images"),
    "skip_cache_check": (SWITCH, "cache files are named by the content they hold, so none can be stale"),
    "cache_info": (SWITCH, "what is known of an image is kept by its content"),
    "tokenizer_cache_dir": (TEXT, "the tokenizer is looked for where --tokenizer says, or nearby"),
    "max_data_loader_n_workers": (WHOLE, _NO_WORKERS),
    "persistent_data_loader_workers": (SWITCH, _NO_WORKERS),
    "ddp_timeout": (WHOLE, _ONE_DEVICE),
    "ddp_gradient_as_bucket_view": (SWITCH, _ONE_DEVICE),
    "ddp_static_graph": (SWITCH, _ONE_DEVICE),
    "save_state": (SWITCH, "the state of a run is kept with every save"),
    "save_state_on_train_end": (SWITCH, "the state of a run is kept with every save"),
    "logging_dir": (TEXT, _LOGS),
    "log_prefix": (TEXT, _LOGS),
    "log_tracker_name": (TEXT, _LOGS),
    "log_tracker_config": (TEXT, _LOGS),
    "wandb_run_name": (TEXT, _LOGS),
    "wandb_api_key": (TEXT, "nothing is sent anywhere; keys are not read"),
    "log_config": (SWITCH, "run.toml in the run's folder always holds every setting"),
    "console_log_level": (TEXT, "the log is always complete"),
    "console_log_file": (TEXT, "log.log in the run's folder is always written"),
    "console_log_simple": (SWITCH, "the log is plain text"),
    "sample_sampler": (TEXT, "samples are drawn by Euler's method"),
    "zero_stage": (WHOLE, _DEEPSPEED),
    "offload_optimizer_device": (TEXT, _DEEPSPEED),
    "offload_optimizer_nvme_path": (TEXT, _DEEPSPEED),
    "offload_param_device": (TEXT, _DEEPSPEED),
    "offload_param_nvme_path": (TEXT, _DEEPSPEED),
    "zero3_init_flag": (SWITCH, _DEEPSPEED),
    "zero3_save_16bit_model": (SWITCH, _DEEPSPEED),
    "fp16_master_weights_and_gradients": (SWITCH, _DEEPSPEED),
    "output_config": (SWITCH, "--print_settings shows what a config becomes"),
    "metadata_author": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_description": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_license": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_tags": (TEXT, "the tags in the metadata are counted from the captions"),
    "metadata_usage_hint": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_thumbnail": (TEXT, "preview_image draws the picture that managers show"),
    "metadata_merged_from": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_preprocessor": (TEXT, "this entry of the metadata is not written; training_comment is"),
    "metadata_is_negative_embedding": (TEXT, "the file holds no embedding"),
    "huggingface_repo_type": (TEXT, "nothing is uploaded"),
    "huggingface_path_in_repo": (TEXT, "nothing is uploaded"),
    "huggingface_token": (TEXT, "nothing is uploaded; tokens are not read"),
    "huggingface_repo_visibility": (TEXT, "nothing is uploaded"),
    "async_upload": (SWITCH, "nothing is uploaded"),
    "v2": (SWITCH, "the base model's weights tell"),
    "disable_mmap_load_safetensors": (SWITCH, "weights are read straight to where they are used"),
    "text_encoder_batch_size": (WHOLE, "the batch size of encoding changes no result"),
    "split_mode": (SWITCH, "memory=auto swaps blocks where a run would not fit"),
    **dict.fromkeys(("save_clip", "save_t5xxl"), (SWITCH, "kohya's trainer has not made it work either")),
    **dict.fromkeys(("t5xxl_device", "t5xxl_dtype"), (TEXT, "kohya's trainer has not made it work either")),
}

_EVERY_STEP = "it changes the pixels at every use, but pictures are encoded once and kept"
_NO_UPLOAD = "nothing is ever uploaded or fetched"
_NO_DEEPSPEED = "nothing of a run is spread over devices but its pictures"
_EXACT = "a run continues by itself at exactly the step where it stopped"
_POSITIONS = "places in a picture are numbered as the base model learnt them"
_CROP = "remove it, and crop beforehand (loragraft dataset crop)"
# name -> (kind, values that ask for nothing, why it cannot be honoured, what to do)
REFUSED: dict[str, tuple[str, tuple[Any, ...], str, str]] = {
    "color_aug": (SWITCH, (False,), _EVERY_STEP, "remove it; flip_aug works"),
    "random_crop": (SWITCH, (False,), _EVERY_STEP, _CROP),
    "face_crop_aug_range": (TEXT, (), _EVERY_STEP, _CROP),
    "resize_interpolation": (TEXT, ("lanczos",), "pictures are resized with Lanczos", "remove it"),
    "conditioning_data_dir": (TEXT, (), "it is for training a ControlNet", "remove it"),
    "dataset_class": (TEXT, (), "it names Python code to run", "remove it, and use dataset_config"),
    "debug_dataset": (
        SWITCH,
        (False,),
        "it shows the dataset instead of training",
        "loragraft dataset report",
    ),
    "deepspeed": (SWITCH, (False,), _NO_DEEPSPEED, "remove it; memory=auto makes a run fit"),
    "base_weights": (
        WORDS,
        ([],),
        "the base would be another model than the file names",
        "merge them first (loragraft lora merge-checkpoint), and name the merged model",
    ),
    "base_weights_multiplier": (WORDS, ([],), "it belongs to base_weights", "remove it"),
    "resume": (
        TEXT,
        (),
        f"a saved state of kohya's trainer can run code when it is opened; {_EXACT}",
        "give the LoRA file of that state as network_weights",
    ),
    "initial_epoch": (WHOLE, (), _EXACT, "remove it, and start the same command again to continue"),
    "initial_step": (WHOLE, (0,), _EXACT, "remove it, and start the same command again to continue"),
    "skip_until_initial_step": (SWITCH, (False,), _EXACT, "remove it"),
    "no_metadata": (
        SWITCH,
        (False,),
        "the trigger words and the base's name would be lost to every program that shows them",
        "remove it",
    ),
    "save_model_as": (
        TEXT,
        ("safetensors",),
        "a file of the other formats can run code when it is opened",
        "set save_model_as to safetensors",
    ),
    "huggingface_repo_id": (TEXT, (), _NO_UPLOAD, "remove it, and upload the file yourself"),
    "save_state_to_huggingface": (SWITCH, (False,), _NO_UPLOAD, "remove it"),
    "resume_from_huggingface": (SWITCH, (False,), _NO_UPLOAD, "remove it"),
    "config_file": (TEXT, (), "a config names another config", "give that file itself"),
    "controlnet_model_name_or_path": (TEXT, (), "it is for training a ControlNet", "remove it"),
    "apply_lg_attn_mask": (SWITCH, (False,), "SD3 reads both CLIPs with their padding", "remove it"),
    **dict.fromkeys(
        ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"),
        (NUMBER, (0, 0.0), "captions are left out for all text encoders at once", "use caption_dropout_rate"),
    ),
    "pos_emb_random_crop_rate": (NUMBER, (0, 0.0), _POSITIONS, "remove it"),
    "enable_scaled_pos_embed": (SWITCH, (False,), _POSITIONS, "remove it"),
}

# What kohya takes where a config says nothing, as far as a default here differs.
KOHYA_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-6,
    "network_dim": 4,
    "network_alpha": 1.0,
    "lr_scheduler": "constant",
    "mixed_precision": "fp32",
    "save_precision": "fp32",
    "output_name": "last",
    "enable_bucket": False,
}
# Honoured arguments where the default here stays although kohya's differs, and why.
KEPT_DEFAULTS: dict[str, str] = {
    "seed": "kohya draws another seed each time, so that no run can be repeated",
    "cache_latents": "the latents are the same, encoded once",
}
# Numbers whose 0 kohya takes as: off, like leaving the argument out.
ZERO_IS_OFF = (
    *("min_snr_gamma", "noise_offset", "ip_noise_gamma", "multires_noise_iterations", "adaptive_noise_scale"),
    *("network_dropout", "scale_weight_norms", "v_pred_like_loss", "save_n_epoch_ratio"),
    *("sample_every_n_steps", "sample_every_n_epochs", "dataset_repeats"),
)

# Keys that lora-scripts writes into its TOML beside kohya's, and the values that ask for nothing.
# kohya's trainer ignores every one of them.
LORA_SCRIPTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_train_type": (
        ("sd-lora", "lora-basic", "lora-master", "sdxl-lora", "sd3-lora", "flux-lora"),
        "use the settings of a LoRA",
    ),
    "enable_contrastive": ((False,), "remove it"),
    "negative_sampling_method": (("Random-Noise",), "remove it"),
    "noise_strength": ((1, 1.0), "remove it"),
    "contrastive_weight": ((0.05,), "remove it"),
    "contrastive_warmup_steps": ((100,), "remove it"),
    "lr_restart_cycles": ((1,), "did you mean 'lr_scheduler_num_cycles'?"),
    "lycoris_algo": ((), 'write network_args = ["algo=..."]'),
    "lokr_factor": ((), 'write network_args = ["factor=..."]'),
    "dylora_unit": ((), 'write network_args = ["unit=..."]'),
    "dropout": ((0, 0.0), 'write network_args = ["dropout=..."]'),
    "prodigy_d0": ((), 'write optimizer_args = ["d0=..."]'),
    "prodigy_d_coef": ((), 'write optimizer_args = ["d_coef=..."]'),
    "enable_base_weight": ((False,), "merge the LoRA into the base first (loragraft lora merge-checkpoint)"),
    "enable_block_weights": ((False,), 'write network_args = ["down_lr_weight=...", ...]'),
    "ui_custom_params": ((), "write its lines into the file itself"),
    "train_t5xxl": ((False,), 'write network_args = ["train_t5xxl=True"]'),
    "network_scale": ((1, 1.0), "remove it"),
    "gpu_ids": (([],), "set CUDA_VISIBLE_DEVICES"),
    "network_args_custom": (([],), "did you mean 'network_args'?"),
    "optimizer_args_custom": (([],), "did you mean 'optimizer_args'?"),
}
# Tables of a lora-scripts preset that say nothing about training.
LORA_SCRIPTS_TABLES = ("metadata",)


def all_arguments() -> set[str]:
    """Return the name of every argument in the tables."""
    return {*HONOURED, *TRANSLATED, *PLACES, *NOTED, *REFUSED}


def kind_of(name: str) -> str:
    """Return the kind of an argument's value."""
    if name in HONOURED:
        return HONOURED[name]
    if name in TRANSLATED:
        return TRANSLATED[name]
    if name in NOTED:
        return NOTED[name][0]
    return REFUSED[name][0] if name in REFUSED else TEXT
