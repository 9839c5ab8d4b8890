"""Scripts of sd-scripts that train a LoRA: which of the arguments each has, what it takes by default.

All of them have the arguments of train_network.py; ONLY says which scripts have the others. What a script
has and never looks at is IDLE there: kohya's trainer goes on without a word. Facts: sd-scripts 0.10.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SDXL, SD3, FLUX = "sdxl_train_network.py", "sd3_train_network.py", "flux_train_network.py"
TRANSFORMERS = (SD3, FLUX)

ONLY_SWITCHES = (
    *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "disable_mmap_load_safetensors"),
)
# An argument that train_network.py does not have -> the scripts that have it.
ONLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(ONLY_SWITCHES, (SDXL, SD3, FLUX)),
    **dict.fromkeys(
        (
            *("clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask", "text_encoder_batch_size"),
            *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "blocks_to_swap"),
        ),
        TRANSFORMERS,
    ),
    **dict.fromkeys(
        (
            *("clip_g", "training_shift", "save_clip", "save_t5xxl", "t5xxl_device", "t5xxl_dtype"),
            *("apply_lg_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"),
            *("pos_emb_random_crop_rate", "enable_scaled_pos_embed"),
        ),
        (SD3,),
    ),
    **dict.fromkeys(
        (
            *("ae", "guidance_scale", "timestep_sampling", "sigmoid_scale", "model_prediction_type"),
            *("discrete_flow_shift", "model_type", "split_mode", "controlnet_model_name_or_path"),
        ),
        (FLUX,),
    ),
}
# Taken whatever the script: a TOML names none, and they change no result of those without them.
LENIENT = ONLY_SWITCHES

_SNR = "a flow has no signal-to-noise ratio"
_NOISE = "kohya's trainer draws plain noise for it"
_IDLE_ON_FLOWS: Mapping[str, str] = {
    **dict.fromkeys(("min_snr_gamma", "debiased_estimation_loss", "zero_terminal_snr"), _SNR),
    **dict.fromkeys(("v_parameterization", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"), _SNR),
    **dict.fromkeys(("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"), _NOISE),
    **dict.fromkeys(("multires_noise_iterations", "multires_noise_discount"), _NOISE),
    "max_token_length": "it is about CLIP in Stable Diffusion 1 and 2; t5xxl_max_token_length is T5's",
    "clip_skip": "the layers that are read are fixed",
}


@dataclass(frozen=True)
class Script:
    """One script: its name, what it trains, the network module that is its own, and what it never looks at.

    ``encoders`` are the kinds of its text encoders; ``defaults`` are settings where a config says nothing.
    """

    program: str
    base: str
    module: str = "networks.lora"
    encoders: tuple[str, ...] = ("clip",)
    idle: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sample_steps: int = 30
    sample_cfg: float = 7.5


# A TOML names no script, and those for SD 1, 2 and SDXL have the same arguments.
UNNAMED = Script("train_network.py", "Stable Diffusion 1, 2 or XL", encoders=("clip", "clip"))
SCRIPTS: Mapping[str, Script] = {
    script.program: script
    for script in (
        Script("train_network.py", "Stable Diffusion 1 and 2"),
        Script(
            SDXL,
            "SDXL",
            encoders=("clip", "clip"),
            idle={"clip_skip": "SDXL reads both text encoders before their last layer"},
        ),
        Script(
            SD3,
            "SD3",
            "networks.lora_sd3",
            ("clip", "clip", "t5"),
            {
                **_IDLE_ON_FLOWS,
                "ip_noise_gamma": _NOISE,
                "ip_noise_gamma_random_strength": _NOISE,
            },
            {"t5xxl_max_token_length": 256},
        ),
        Script(
            FLUX,
            "Flux",
            "networks.lora_flux",
            ("clip", "t5"),
            {
                **_IDLE_ON_FLOWS,
                "min_timestep": "it draws from all timesteps",
                "max_timestep": "it draws from all timesteps",
            },
            {"guidance_scale": 3.5},
            sample_steps=20,
            sample_cfg=1.0,
        ),
    )
}

_SCHNELL = replace(
    SCRIPTS[FLUX],
    base="Flux schnell",
    idle={**SCRIPTS[FLUX].idle, "guidance_scale": "schnell is told no guidance"},
    defaults={},
)
_CHROMA = replace(
    SCRIPTS[FLUX],
    base="Chroma",
    encoders=(),
    idle={
        **SCRIPTS[FLUX].idle,
        "guidance_scale": "Chroma is told no guidance",
        "apply_t5_attn_mask": "T5's padding is always hidden from Chroma",
        "clip_l": "Chroma has no CLIP",
        "text_encoder_lr": "Chroma has no CLIP",
    },
    defaults={},
)

# What lora-scripts calls the training of a LoRA -> the script that it starts.
LORA_SCRIPTS_TYPES: Mapping[str, str] = {
    "sdxl-lora": SDXL,
    "sd3-lora": SD3,
    "flux-lora": FLUX,
}

# Scripts that train something else -> what.
OTHERS: Mapping[str, str] = {
    "lumina_train_network.py": "Lumina",
    "hunyuan_image_train_network.py": "HunyuanImage",
    "anima_train_network.py": "Anima",
    "train_db.py": "the whole model",
    "fine_tune.py": "the whole model",
    "sdxl_train.py": "the whole SDXL model",
    "flux_train.py": "the whole Flux model",
    "sd3_train.py": "the whole SD3 model",
    "train_textual_inversion.py": "embeddings alone",
    "sdxl_train_textual_inversion.py": "embeddings alone",
    "train_controlnet.py": "a ControlNet",
    "train_control_net.py": "a ControlNet",
}
# Arguments of those scripts alone, and what they are for.
OTHERS_ARGUMENTS: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "system_prompt", "gemma2_max_token_length"), "Lumina"),
    "stop_text_encoder_training": "the whole model",
}


def has(script: Script, name: str) -> bool:
    """Say whether a script takes an argument that is in the tables."""
    return name in LENIENT or name not in ONLY or script.program in ONLY[name]


def of_model(script: Script, values: Mapping[str, Any]) -> Script:
    """Return the script as it is for a model that it treats otherwise: Chroma, or schnell by its file."""
    if script.program != FLUX:
        return script
    if values.get("model_type") == "chroma":
        return _CHROMA
    base = re.split(r"[\\/]", str(values.get("pretrained_model_name_or_path", "")))[-1]
    return _SCHNELL if "schnell" in base.casefold() else script


def script_of(given: Mapping[str, Any]) -> Script:
    """Return the script that a config without a program is for, by what it gives."""
    kind = LORA_SCRIPTS_TYPES.get(str(given.get("model_train_type")))
    modules = {script.module: script.program for script in SCRIPTS.values() if script.program in TRANSFORMERS}
    named = kind or modules.get(str(given.get("network_module")))
    return SCRIPTS[named] if named else _by_arguments(given)


def _by_arguments(names: Collection[str]) -> Script:
    """Return the script that alone has these arguments; SD3's where both have them and no ae is named."""
    users = [ONLY[name] for name in names if name in ONLY]
    for program in (FLUX, SD3):
        if (program,) in users:
            return SCRIPTS[program]
    return SCRIPTS[SD3] if TRANSFORMERS in users else UNNAMED
