"""Keys that the LoRA tab of kohya_ss' GUI saves, and the argument of kohya's scripts that each becomes.

HANDED_ON, RENAMED, BY_MODEL and NOISE name arguments, COMPUTED and OLDER are made into others, NOTED and
UNSAID train nothing; the network's keys stand in kohya_gui_network. Facts: bmaltais' kohya_ss 26.0.0,
kohya_gui/lora_gui.py and common_gui.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.kohya_keys import NUMBER, SWITCH, TEXT, WHOLE
from .kohya_scripts import FLUX, SD3, SDXL

EITHER = "text or a number"
CHOICE = "text, true or false"

# Handed on under the same name where they are not 0, off or empty.
HANDED_ON = (
    *("async_upload", "bucket_no_upscale", "bucket_reso_steps", "cache_latents", "cache_latents_to_disk"),
    *(
        "caption_dropout_every_n_epochs",
        "caption_dropout_rate",
        "caption_extension",
        "clip_skip",
        "color_aug",
    ),
    *("dataset_config", "debiased_estimation_loss", "dim_from_weights", "dynamo_backend", "enable_bucket"),
    *("flip_aug", "fp8_base", "full_bf16", "full_fp16", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "highvram", "huber_c", "huber_scale", "huber_schedule"),
    *("huggingface_path_in_repo", "huggingface_repo_id", "huggingface_repo_type", "huggingface_token"),
    *("huggingface_repo_visibility", "ip_noise_gamma", "ip_noise_gamma_random_strength", "keep_tokens"),
    *("learning_rate", "log_config", "log_tracker_config", "log_tracker_name", "log_with", "logging_dir"),
    *("loss_type", "lr_scheduler", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_type"),
    *("masked_loss", "max_bucket_reso", "max_data_loader_n_workers", "max_grad_norm", "max_timestep"),
    *("max_token_length", "max_train_epochs", "mem_eff_attn", "metadata_author", "metadata_description"),
    *("metadata_license", "metadata_tags", "metadata_title", "min_bucket_reso", "min_snr_gamma"),
    *("min_timestep", "mixed_precision", "network_alpha", "network_dim", "network_dropout"),
    *("network_weights", "output_dir", "output_name", "persistent_data_loader_workers"),
    *("pretrained_model_name_or_path", "prior_loss_weight", "random_crop", "reg_data_dir", "resume"),
    *("sample_every_n_epochs", "sample_every_n_steps", "sample_sampler", "save_every_n_epochs"),
    *("save_every_n_steps", "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps"),
    *("save_last_n_steps_state", "save_model_as", "save_precision", "save_state", "save_state_on_train_end"),
    *("save_state_to_huggingface", "scale_v_pred_loss_like_noise_pred", "scale_weight_norms", "seed"),
    *("shuffle_caption", "skip_cache_check", "train_batch_size", "train_data_dir", "training_comment"),
    *("unet_lr", "v2", "v_parameterization", "v_pred_like_loss", "vae", "vae_batch_size", "wandb_api_key"),
    *("wandb_run_name", "weighted_captions"),
)
# The same under another name.
RENAMED: Mapping[str, str] = {"optimizer": "optimizer_type", "max_resolution": "resolution"}

# A box of the window that names the model -> the script that it starts.
SCRIPTS: Mapping[str, str] = {
    "sdxl": SDXL,
    "flux1_checkbox": FLUX,
    "sd3_checkbox": SD3,
    "hunyuan_image_checkbox": "hunyuan_image_train_network.py",
    "anima_checkbox": "anima_train_network.py",
    "lumina_checkbox": "lumina_train_network.py",
}
_FLUX_NAMES = (
    *("ae", "apply_t5_attn_mask", "blocks_to_swap", "clip_l", "cpu_offload_checkpointing"),
    *("discrete_flow_shift", "fp8_base_unet", "guidance_scale", "model_prediction_type", "split_mode"),
    *("t5xxl", "t5xxl_max_token_length", "timestep_sampling"),
)
_SD3_NAMES = (
    *("blocks_to_swap", "clip_g", "clip_g_dropout_rate", "logit_mean", "logit_std", "mode_scale"),
    *("pos_emb_random_crop_rate", "save_clip", "save_t5xxl", "t5xxl_device", "t5xxl_dtype"),
    "weighting_scheme",
)
# Script -> the keys that are handed on for it alone, with the argument that each becomes.
BY_MODEL: Mapping[str, Mapping[str, str]] = {
    SDXL: {
        "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
        "sdxl_no_half_vae": "no_half_vae",
    },
    FLUX: {
        **dict(zip(_FLUX_NAMES, _FLUX_NAMES, strict=True)),
        "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
        "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    },
    SD3: {
        **dict(zip(_SD3_NAMES, _SD3_NAMES, strict=True)),
        "sd3_cache_text_encoder_outputs": "cache_text_encoder_outputs",
        "sd3_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
        "sd3_clip_l": "clip_l",
        "sd3_clip_l_dropout_rate": "clip_l_dropout_rate",
        "sd3_disable_mmap_load_safetensors": "disable_mmap_load_safetensors",
        "sd3_enable_scaled_pos_embed": "enable_scaled_pos_embed",
        "sd3_fused_backward_pass": "fused_backward_pass",
        "sd3_t5_dropout_rate": "t5_dropout_rate",
        "sd3_t5xxl": "t5xxl",
        "sd3_text_encoder_batch_size": "text_encoder_batch_size",
    },
}

# Keys of the noise -> the noise_offset_type with which they are handed on.
NOISE: Mapping[str, str] = {
    "adaptive_noise_scale": "Original",
    "noise_offset": "Original",
    "noise_offset_random_strength": "Original",
    "multires_noise_discount": "Multires",
    "multires_noise_iterations": "Multires",
}

# Keys that are made into other arguments, and the kinds of their values; kohya_gui says what becomes of them.
COMPUTED: Mapping[str, str] = {
    **dict.fromkeys(SCRIPTS, SWITCH),
    "model_type": TEXT,
    "additional_parameters": TEXT,
    "epoch": WHOLE,
    "max_train_steps": WHOLE,
    "lr_warmup": NUMBER,
    "lr_warmup_steps": NUMBER,
    "lr_scheduler_args": TEXT,
    "optimizer_args": TEXT,
    "text_encoder_lr": NUMBER,
    "t5xxl_lr": NUMBER,
    "noise_offset_type": TEXT,
    "xformers": CHOICE,
    "sample_prompts": TEXT,
    "resume_from_huggingface": CHOICE,
    "train_inpainting": SWITCH,
    "show_timesteps": TEXT,
}
# Keys of older versions that the GUI reads as another one.
OLDER: Mapping[str, str] = {
    "use_8bit_adam": SWITCH,
    "use_wandb": CHOICE,
    "lora_network_weights": TEXT,
}

_LAUNCHER = "it is an option of accelerate, which starts processes, and not of the run"
_NO_ARGUMENT = "kohya's scripts for LoRAs do not read it"
# Keys that train nothing, as long as they hold something else than these values a note says why.
NOTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("num_processes", "num_machines"), ((1,), _LAUNCHER)),
    **dict.fromkeys(("multi_gpu", "gpu_ids", "extra_accelerate_launch_args"), ((), _LAUNCHER)),
    **dict.fromkeys(("dynamo_use_fullgraph", "dynamo_use_dynamic"), ((), _LAUNCHER)),
    "dynamo_mode": (("default",), _LAUNCHER),
    "stop_text_encoder_training": ((), "the GUI does not hand it on"),
    "stop_text_encoder_training_pct": ((), "the GUI does not read it any more"),
    "no_token_padding": ((), "the GUI does not read it any more"),
    **dict.fromkeys(("conv_dims", "conv_alphas"), ((), "the GUI does not read it any more")),
    **dict.fromkeys(("locon", "network_train", "cache_latent"), ((), "the GUI does not read it any more")),
    "caption_extention": ((".txt", ".caption"), "the GUI does not read it any more"),
    **dict.fromkeys(("single_blocks_to_swap", "double_blocks_to_swap", "mem_eff_save"), ((), _NO_ARGUMENT)),
}
# Keys of the window, of memory and of models that the box does not name: nothing is said of them.
_ANIMA = (
    *("attn_mode", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "compile"),
    *("compile_backend", "compile_cache_size_limit", "compile_dynamic", "compile_fullgraph", "compile_mode"),
    *("discrete_flow_shift", "llm_adapter_path", "qwen3", "qwen3_max_token_length", "qwen_image_vae_2d"),
    *("sigmoid_scale", "split_attn", "t5_max_token_length", "t5_tokenizer_path", "timestep_sampling"),
    *("torch_compile", "unsloth_offload_checkpointing", "vae", "vae_chunk_size", "vae_disable_cache"),
)
_HUNYUAN = (
    *("attn_mode", "byt5", "discrete_flow_shift", "fp8_scaled", "fp8_vl", "image_cache_text_encoder_outputs"),
    *("image_cache_text_encoder_outputs_to_disk", "model_prediction_type", "sigmoid_scale", "split_attn"),
    *("text_encoder", "text_encoder_cpu", "timestep_sampling", "vae", "vae_chunk_size"),
)
_LUMINA = (
    *("ae", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "discrete_flow_shift"),
    *("gemma2", "gemma2_max_token_length", "model_prediction_type", "sigmoid_scale", "system_prompt"),
    *("timestep_sampling", "use_flash_attn", "use_sage_attn"),
)
UNSAID = (
    *("ask_for_file", "apply_preset", "file_path", "headless", "main_process_port", "model_list"),
    *("lowvram", "num_cpu_threads_per_process", "print_only", "save_as", "save_as_bool"),
    *("show_timesteps_resolution", "training_preset"),
    *(f"anima_{name}" for name in _ANIMA),
    *(f"hunyuan_{name}" for name in _HUNYUAN),
    *(f"lumina_{name}" for name in _LUMINA),
)

# What the window shows where a file says nothing, as far as that is neither 0, off nor empty.
WINDOW: Mapping[str, Any] = {
    "LoRA_type": "Standard",
    "LyCORIS_preset": "full",
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "caption_extension": ".txt",
    "clip_skip": 1,
    "conv_alpha": 1,
    "conv_dim": 1,
    "discrete_flow_shift": 3.0,
    "dynamo_backend": "no",
    "enable_bucket": True,
    "epoch": 1,
    "factor": -1,
    "ggpo_beta": 0.01,
    "ggpo_sigma": 0.03,
    "gradient_accumulation_steps": 1,
    "guidance_scale": 3.5,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "learning_rate": 1e-4,
    "logit_std": 1.0,
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "lr_warmup": 10,
    "max_bucket_reso": 2048,
    "max_grad_norm": 1.0,
    "max_resolution": "512,512",
    "max_timestep": 1000,
    "max_token_length": 75,
    "max_train_steps": 1600,
    "min_bucket_reso": 256,
    "mixed_precision": "fp16",
    "mode_scale": 1.29,
    "model_prediction_type": "sigma_scaled",
    "model_type": "flux",
    "multires_noise_discount": 0.3,
    "network_alpha": 1,
    "network_dim": 8,
    "noise_offset_type": "Original",
    "optimizer": "AdamW8bit",
    "prior_loss_weight": 1.0,
    "sample_sampler": "euler_a",
    "save_every_n_epochs": 1,
    "save_model_as": "safetensors",
    "save_precision": "fp16",
    "sd3_text_encoder_batch_size": 1,
    "t5xxl_dtype": "bf16",
    "t5xxl_max_token_length": 512,
    "text_encoder_lr": 1e-4,
    "timestep_sampling": "sigma",
    "train_batch_size": 1,
    "train_blocks": "all",
    "train_double_block_indices": "all",
    "train_on_input": True,
    "train_single_block_indices": "all",
    "unet_lr": 1e-4,
    "unit": 1,
    "weighting_scheme": "logit_normal",
    "xformers": "xformers",
}
