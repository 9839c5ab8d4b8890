"""HCP-Diffusion's training YAML outside its data: what becomes of each key, and what its base files say.

Facts: HCP-Diffusion's cfgs/train/train_base.yaml, tuning_base.yaml and examples, hcpdiff/train_ac.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Key -> why nothing has to be done for it.
NOTED: Mapping[str, str] = {
    "allow_tf32": "the arithmetic is that of mixed_precision",
    "vis_info": "sample_prompts draws pictures on the way",
    "previewer": "sample_prompts draws pictures on the way",
    "logger": "a run's folder holds its TensorBoard files, log.jsonl and log.log",
    "train.workers": "pictures are encoded once and batches are read from the cache",
    "train.set_grads_to_none": "it saves memory alone, and is always done",
    "train.optimizer_pt": "no word's embedding is trained",
    "train.scale_lr_pt": "no word's embedding is trained",
    "train.scheduler_pt": "no word's embedding is trained",
    "model.enable_xformers": "attention=auto measures the ways that this machine has and takes the fastest",
    "model.revision": "the base model is a file or folder that is there",
    "model.tokenizer_name": "the tokenizer is looked for where --tokenizer says, or nearby",
}
_WHOLE_RUN = "a run continues by itself at exactly the step where it stopped"
# Key -> (values that ask for nothing, why it cannot be honoured, what to do).
REFUSED: Mapping[str, tuple[tuple[Any, ...], str, str]] = {
    "ckpt_type": (
        ("safetensors",),
        "a file of the other format can run code when it is opened",
        "write ckpt_type: safetensors",
    ),
    "plugin_unet": ((None, {}), "plugins are Python classes of HCP-Diffusion", "remove it"),
    "plugin_TE": ((None, {}), "plugins are Python classes of HCP-Diffusion", "remove it"),
    "train.resume": ((None,), _WHOLE_RUN, "give an earlier LoRA as network_weights"),
    "train.cfg_scale": (
        ("1.0", 1.0, 1),
        "it is DreamArtist's, which trains with negative words",
        "remove it",
    ),
}
# Keys that are translated, by table; hcp_train says how.
KNOWN: Mapping[str, tuple[str, ...]] = {
    "": (
        *("exp_dir", "mixed_precision", "seed", "train", "model", "data", "tokenizer_pt"),
        *("unet", "lora_unet", "text_encoder", "lora_text_encoder"),
    ),
    "train": (
        *("train_steps", "train_epochs", "gradient_accumulation_steps", "max_grad_norm", "save_step", "loss"),
        *("optimizer", "scale_lr", "scheduler"),
    ),
    "model": (
        *("pretrained_model_name_or_path", "tokenizer_repeats", "gradient_checkpointing", "clip_skip"),
        *("noise_scheduler", "ema_unet", "ema_text_encoder"),
    ),
}

# What train_base.yaml and tuning_base.yaml say, which every example inherits.
BASE: dict[str, Any] = {
    "exp_dir": "exps/",
    "mixed_precision": "fp16",
    "seed": 114514,
    "train": {
        "train_steps": 1000,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "save_step": 100,
        "optimizer": {"type": "adamw", "weight_decay": 1e-3},
        "scale_lr": True,
        "scheduler": {"name": "one_cycle", "num_warmup_steps": 200, "num_training_steps": 1000},
    },
    "model": {"tokenizer_repeats": 2, "gradient_checkpointing": True, "clip_skip": 0},
}
_WARMUP: dict[str, Any] = {
    "train": {
        "scheduler": {"name": "constant_with_warmup", "num_warmup_steps": 50, "num_training_steps": 600},
    },
    "model": {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5", "tokenizer_repeats": 1},
}
_TEXT_ENCODER = [{"lr": 1e-5, "rank": 4, "layers": ["re:.*self_attn$", "re:.*mlp$"]}]
_ATTENTION = {"lr": 1e-4, "rank": 8, "layers": ["re:.*\\.attn.?$", "re:.*\\.ff$"]}
_RESNETS = ["re:.*\\.resnets$", "re:.*\\.proj_in$", "re:.*\\.proj_out$", "re:.*\\.conv$"]
# What its other files say beyond BASE.
SHIPPED: Mapping[str, dict[str, Any]] = {
    "cfgs/train/train_base.yaml": {},
    "cfgs/train/tuning_base.yaml": {},
    "cfgs/train/examples/fine-tuning.yaml": {**_WARMUP, "unet": [{"lr": 1e-6, "layers": [""]}]},
    "cfgs/train/examples/DreamBooth.yaml": {**_WARMUP, "unet": [{"lr": 1e-6, "layers": [""]}]},
    "cfgs/train/examples/lora_conventional.yaml": {
        **_WARMUP,
        "lora_unet": [_ATTENTION],
        "lora_text_encoder": _TEXT_ENCODER,
    },
    "cfgs/train/examples/locon.yaml": {
        **_WARMUP,
        "lora_unet": [_ATTENTION, {"lr": 1e-4, "rank": 8, "layers": _RESNETS}],
        "lora_text_encoder": _TEXT_ENCODER,
    },
}

OPTIMIZERS: Mapping[str, str] = {"adamw": "AdamW", "adamw_8bit": "AdamW8bit"}
OPTIMIZER_CLASSES: Mapping[str, str] = {
    "lion_pytorch.Lion": "Lion",
    "torch.optim.AdamW": "AdamW",
    "bitsandbytes.optim.AdamW8bit": "AdamW8bit",
}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
# Options of a schedule that are settings of their own here.
SCHEDULE_OPTIONS: Mapping[str, str] = {"num_cycles": "lr_scheduler_num_cycles", "power": "lr_scheduler_power"}
ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR"
LOSSES = ("MSELoss", "MinSNRLoss")
