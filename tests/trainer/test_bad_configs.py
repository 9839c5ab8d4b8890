"""Wrong and contradictory configs of three trainers: each is refused with the nearest valid setting.

A row is a config (or its changes), the code of the refusal and a part of its remedy. Below them stand right
ones, some of them strange, that must not be refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports.kohya import read_kohya

# ---- kohya's sd-scripts: TOML ----

KOHYA: dict[str, tuple[str, str, str]] = {
    # names
    "misspelt": ("learning_rat = 1e-4", "LG-CFG-001", "learning_rate"),
    "of another trainer": ("lora_rank = 16", "LG-CFG-001", "did you mean"),
    "plural": ("network_dims = 16", "LG-CFG-001", "'network_dim'"),
    "conv_alphas (S0)": ('network_args = ["conv_dim=16", "conv_alphas=1"]', "LG-CFG-001", "'conv_alpha'"),
    "conv_dim outside network_args": ("conv_dim = 16", "LG-IMP-002", 'network_args = ["conv_dim=16"]'),
    "algo for kohya's own module": ('network_args = ["algo=loha"]', "LG-IMP-002", "lycoris.kohya"),
    "block weights for LyCORIS": (
        'network_module = "lycoris.kohya"\nnetwork_args = ["down_lr_weight=sine"]',
        "LG-IMP-002",
        "networks.lora",
    ),
    "network_args without =": ('network_args = ["conv_dim"]', "LG-CFG-003", "conv_dim=4"),
    "network_args twice": ('network_args = ["conv_dim=4", "conv_dim=8"]', "LG-CFG-003", "conv_dim once"),
    "unknown module": ('network_module = "networks.lola"', "LG-IMP-002", "networks.lora"),
    "module of another family": (
        'network_module = "networks.lora_lumina"',
        "LG-IMP-002",
        "networks.lora",
    ),
    # kinds and ranges
    "rate as words": ('learning_rate = "fast"', "LG-CFG-003", "learning_rate = 1e-4"),
    "switch as words": ('shuffle_caption = "yes"', "LG-CFG-003", "shuffle_caption = true"),
    "half a rank": ("network_dim = 4.5", "LG-CFG-003", "network_dim = 4"),
    "rank 0": ("network_dim = 0", "LG-CFG-003", "1 to 1024"),
    "negative alpha": ("network_alpha = -1", "LG-CFG-003", "0 to 4096"),
    "negative rate": ("learning_rate = -1e-4", "LG-CFG-003", "0 to 10"),
    "num_cycles 0": (
        'lr_scheduler = "cosine_with_restarts"\nlr_scheduler_num_cycles = 0',
        "LG-CFG-003",
        "1 to 1000",
    ),
    "power 0": ('lr_scheduler = "polynomial"\nlr_scheduler_power = 0', "LG-CFG-003", "0.01"),
    "clip_skip 0": ("clip_skip = 0", "LG-CFG-003", "1 to 12"),
    "token length 300": ("max_token_length = 300", "LG-CFG-003", "75, 150, 225"),
    "dropout 1": ("network_dropout = 1.0", "LG-CFG-003", "0 to 0.99"),
    "caption dropout 2": ("caption_dropout_rate = 2.0", "LG-CFG-003", "0 to 1"),
    "batch 0": ("train_batch_size = 0", "LG-CFG-003", "1 to 1024"),
    "no steps": ("max_train_steps = 0", "LG-CFG-003", "1 to"),
    "save every 0 epochs": ("save_every_n_epochs = 0", "LG-CFG-003", "1 to"),
    "warm-up as a share above 1": ('lr_scheduler = "cosine"\nlr_warmup_steps = 1.5', "LG-CFG-003", "'2'"),
    "unknown schedule": ('lr_scheduler = "cosin"', "LG-CFG-003", "'cosine'"),
    "unknown optimizer": ('optimizer_type = "AdamWW"', "LG-CFG-003", "AdamW"),
    "unknown precision": ('mixed_precision = "fp8"', "LG-CFG-003", "'fp32'"),
    "unknown loss": ('loss_type = "huberr"', "LG-CFG-003", "'huber'"),
    "crooked resolution": ("resolution = 500", "LG-CFG-005", "512"),
    "resolution with an x": ('resolution = "512x768"', "LG-CFG-003", "512,768"),
    "buckets too small": ("resolution = 2048\nenable_bucket = true", "LG-CFG-006", "4096"),
    "timesteps crossed": ("min_timestep = 800\nmax_timestep = 200", "LG-CFG-004", "199"),
    # contradictions
    "nothing to train": ("unet_lr = 0\ntext_encoder_lr = 0", "LG-CFG-004", "above 0"),
    "conv_alpha alone": ('network_args = ["conv_alpha=4"]', "LG-CFG-004", "conv_dim"),
    "both parts alone": (
        "network_train_unet_only = true\nnetwork_train_text_encoder_only = true",
        "LG-CFG-004",
        "network_train",
    ),
    "warm-up of a constant rate": ("lr_warmup_steps = 100", "LG-CFG-004", "constant_with_warmup"),
    "warm-up longer than the run": (
        'lr_scheduler = "cosine"\nlr_warmup_steps = 200\nmax_train_steps = 100',
        "LG-CFG-004",
        "lr_warmup_steps",
    ),
    "cycles of a schedule without": (
        'lr_scheduler = "cosine"\nlr_scheduler_num_cycles = 4',
        "LG-CFG-004",
        "cosine_with_restarts",
    ),
    "power of a schedule without": (
        'lr_scheduler = "cosine"\nlr_scheduler_power = 2',
        "LG-CFG-004",
        "polynomial",
    ),
    "lr 1.0 with AdamW": ("learning_rate = 1.0", "LG-CFG-004", "0.0001"),
    "AdamW's rate with Prodigy": (
        'optimizer_type = "Prodigy"\nlearning_rate = 1e-4',
        "LG-CFG-004",
        "1",
    ),
    "two rates with an adaptive optimizer": (
        'optimizer_type = "DAdaptAdam"\nlearning_rate = 1.0\nunet_lr = 1.0\ntext_encoder_lr = 0.5',
        "LG-CFG-004",
        "text_encoder_lr",
    ),
    "block weights with an adaptive optimizer": (
        'optimizer_type = "Prodigy"\nlearning_rate = 1.0\nnetwork_args = ["down_lr_weight=sine"]',
        "LG-CFG-004",
        "down_lr_weight",
    ),
    "two optimizers": ('use_8bit_adam = true\noptimizer_type = "Lion"', "LG-IMP-002", "use_8bit_adam"),
    "an option that is no literal": ('optimizer_args = ["weight_decay=much"]', "LG-CFG-002", "0.01"),
    "keep_tokens with nothing to keep": ("keep_tokens = 1", "LG-CFG-004", "shuffle_caption"),
    "cached text with text encoder training": (
        "cache_text_encoder_outputs = true\ntext_encoder_lr = 5e-5",
        "LG-CFG-004",
        "network_train_unet_only",
    ),
    "adaptive noise without an offset": ("adaptive_noise_scale = 0.05", "LG-CFG-004", "noise_offset"),
    "v-prediction's weight without it": (
        "scale_v_pred_loss_like_noise_pred = true",
        "LG-CFG-004",
        "v_parameterization",
    ),
    "zero terminal SNR without v": ("zero_terminal_snr = true", "LG-CFG-004", "v_parameterization"),
    "huber's threshold without huber": ("huber_c = 0.2", "LG-CFG-004", "huber"),
    "multires discount without iterations": (
        "multires_noise_discount = 0.5",
        "LG-CFG-004",
        "multires_noise_iterations",
    ),
    "fused backward with AdamW8bit": (
        'optimizer_type = "AdamW8bit"\nlearning_rate = 1e-4\nfused_backward_pass = true\nmax_grad_norm = 0',
        "LG-CFG-004",
        "fused_backward_pass",
    ),
    "weights' dims without weights": ("dim_from_weights = true", "LG-CFG-004", "network_weights"),
    "dylora's unit": (
        'network_module = "networks.dylora"\nnetwork_dim = 16\nnetwork_args = ["unit=5"]',
        "LG-CFG-003",
        "4",
    ),
    "blocks of another family": ('network_args = ["block_dims=4,4,4"]', "LG-CFG-003", "25"),
    "a bare block weight of words": (
        'network_args = ["down_lr_weight=sinus"]',
        "LG-CFG-003",
        "down_lr_weight",
    ),
    "threshold without block weights": (
        'network_args = ["block_lr_zero_threshold=0.1"]',
        "LG-CFG-004",
        "block_lr_zero_threshold",
    ),
    "use_cp without convolutions": (
        'network_module = "lycoris.kohya"\nnetwork_args = ["preset=attn-only", "use_cp=True"]',
        "LG-CFG-004",
        "conv_dim",
    ),
    "factor of a LoHa": (
        'network_module = "lycoris.kohya"\nnetwork_args = ["algo=loha", "factor=4"]',
        "LG-CFG-004",
        "lokr",
    ),
    "restarts and a class": (
        'lr_scheduler_type = "CosineAnnealingLR"\nlr_warmup_steps = 100',
        "LG-CFG-004",
        "warmup",
    ),
    # what cannot be honoured
    "random crop": ("random_crop = true", "LG-IMP-002", "crop beforehand"),
    "colours": ("color_aug = true", "LG-IMP-002", "flip_aug"),
    "arguments of two scripts": ('ae = "a"\ntraining_shift = 2.0', "LG-IMP-002", "training_shift"),
    "a pickle as product": ('save_model_as = "ckpt"', "LG-IMP-002", "safetensors"),
    "upload": ('huggingface_repo_id = "me/x"', "LG-IMP-002", "upload the file yourself"),
    "wandb": ('log_with = "wandb"', "LG-IMP-002", "tensorboard"),
    "three text encoder rates": ("text_encoder_lr = [1e-4, 5e-5, 1e-5]", "LG-IMP-002", "2 rates"),
    "deepspeed": ("deepspeed = true", "LG-IMP-002", "memory=auto"),
    "no metadata": ("no_metadata = true", "LG-IMP-002", "remove"),
    "a saved state": ('resume = "out/state"', "LG-IMP-002", "network_weights"),
}

# ---- command lines ----

LINES: dict[str, tuple[str, str, str]] = {
    "S0: block weights under Flux": (
        "accelerate launch flux_train_network.py --learning_rate 1.6e-3 --network_dim 16 --network_alpha 1 "
        "--network_args 'conv_dim=16' 'block_lr_zero_threshold=0.1' 'down_lr_weight=sine-.5'",
        "LG-IMP-002",
        "network_reg_lrs",
    ),
    "S0: the same line for SD 1.5": (
        "accelerate launch train_network.py --learning_rate 1.6e-3 --network_dim 16 --network_alpha 1 "
        "--network_args 'conv_dim=16' 'conv_alphas=1' 'down_lr_weight=sine-.5' 'up_lr_weight=cosine+1'",
        "LG-CFG-001",
        "'conv_alpha'",
    ),
    "no value": ("train_network.py --network_dim --shuffle_caption", "LG-CFG-003", "--network_dim 1"),
    "an unknown switch": ("train_network.py --shufle_caption", "LG-CFG-001", "shuffle_caption"),
    "a variable": ("train_network.py --output_dir $Env:OUT", "LG-IMP-001", "each value"),
    "fine-tuning": ("fine_tune.py --learning_rate 1e-6", "LG-IMP-003", "train_network.py"),
    "network_args without quotes around a space": (
        "train_network.py --network_args conv_dim = 4",
        "LG-CFG-003",
        "conv_dim=4",
    ),
}

# ---- lora-scripts ----

SCRIPTS: dict[str, tuple[str, str, str]] = {
    "restarts that nobody reads": ("lr_restart_cycles = 4", "LG-IMP-002", "lr_scheduler_num_cycles"),
    "lycoris_algo": ('lycoris_algo = "lokr"', "LG-IMP-002", "algo="),
    "network_args_custom": ('network_args_custom = ["a=1"]', "LG-IMP-002", "network_args"),
    "a preview by chance": (
        "enable_preview = true\nrandomly_choice_prompt = true",
        "LG-IMP-002",
        "positive_prompts",
    ),
    "another training type": ('model_train_type = "sdxl-finetune"', "LG-IMP-002", "LoRA"),
    "stop_text_encoder_training": ("stop_text_encoder_training = 100", "LG-IMP-002", "remove it"),
    "contrastive training": ("enable_contrastive = true", "LG-IMP-002", "remove"),
}

# ---- HCP-Diffusion: changes of a right file ----

HCP_RIGHT = """
_base_: [cfgs/train/train_base.yaml, cfgs/train/tuning_base.yaml]
lora_unet:
  - {lr: 1e-4, rank: 8, layers: ['re:.*\\.attn.?$', 're:.*\\.ff$']}
train: {train_steps: 600, scheduler: {name: constant_with_warmup, num_warmup_steps: 50}}
model: {tokenizer_repeats: 1}
"""
HCP: dict[str, tuple[str, str, str]] = {
    "a misspelt table": ("modle.clip_skip=1", "LG-CFG-001", "model"),
    "a misspelt key": ("train.train_epoch=1", "LG-CFG-001", "train_epochs"),
    "a schedule of another length": ("train.scheduler.name=cosine", "LG-IMP-002", "num_training_steps: 600"),
    "a share as rank": ("lora_unet.0.rank=0.1", "LG-IMP-002", "whole number"),
    "rank 0": ("lora_unet.0.rank=0", "LG-CFG-003", "rank: 8"),
    "a rate of words": ("lora_unet.0.lr=fast", "LG-CFG-003", "lr: 1e-4"),
    "no layers": ("lora_unet.0.layers=[]", "LG-CFG-003", "layers: ['re:"),
    "a plugin": ("plugin_unet={x: {lr: 1}}", "LG-IMP-002", "remove"),
    "weights and a LoRA": ("unet=[{lr: 1e-6, layers: ['']}]", "LG-IMP-002", "remove unet"),
    "words of a textual inversion": (
        "tokenizer_pt.train=[{name: a, lr: 1e-3}]",
        "LG-IMP-002",
        "train_embeddings",
    ),
    "DreamArtist": ("train.cfg_scale=1.0-3.0", "LG-IMP-002", "remove"),
    "an unknown optimizer": ("train.optimizer.type=adam9", "LG-IMP-002", "adamw"),
    "a pattern that can take for ever": ("lora_unet.0.layers=['re:(a+)+$']", "LG-CFG-003", "to_k"),
    "a longer warm-up than the run": ("train.train_steps=20", "LG-CFG-004", "lr_warmup_steps"),
    "too many chunks": ("model.tokenizer_repeats=99", "LG-CFG-003", "1 to 10"),
}


def _hcp(folder: Path, *overrides: str) -> None:
    file = folder / "a.yaml"
    file.write_text(HCP_RIGHT, encoding="utf-8")
    api.make_both(api.read_foreign(file, overrides=overrides).settings, where="a.yaml")


def _refusal(name: str, code: str, remedy: str, error: LoraGraftError) -> None:
    assert error.code == code, f"{name}: {error}"
    assert remedy in error.fix, f"{name}: {error}"
    assert remedy and error.where and error.why


def test_there_are_at_least_60_of_them() -> None:
    assert len(KOHYA) + len(LINES) + len(SCRIPTS) + len(HCP) >= 60
    assert len(RIGHT) >= 20


@pytest.mark.parametrize("name", [*KOHYA, *SCRIPTS])
def test_a_wrong_toml_is_refused_with_the_nearest_valid_setting(name: str) -> None:
    text, code, remedy = {**KOHYA, **SCRIPTS}[name]
    start = "" if "resolution" in text else "resolution = 512\n"
    with pytest.raises(LoraGraftError) as caught:
        api.make_both(read_kohya(start + text).settings, where="config")
    _refusal(name, code, remedy, caught.value)


@pytest.mark.parametrize("name", LINES)
def test_a_wrong_command_line_is_refused(name: str) -> None:
    text, code, remedy = LINES[name]
    with pytest.raises(LoraGraftError) as caught:
        api.make_both(read_kohya(text).settings, where="config")
    _refusal(name, code, remedy, caught.value)


@pytest.mark.parametrize("name", HCP)
def test_a_wrong_file_of_hcp_diffusion_is_refused(name: str, tmp_path: Path) -> None:
    override, code, remedy = HCP[name]
    with pytest.raises(LoraGraftError) as caught:
        _hcp(tmp_path, override)
    _refusal(name, code, remedy, caught.value)


# ---- right ones ----

RIGHT: dict[str, tuple[str, ...]] = {
    "nothing but a size": ("resolution = 512",),
    "S1: numbers": (
        "network_dim = 32",
        "network_alpha = 16",
        "train_batch_size = 2",
        "learning_rate = 1e-4",
        'lr_scheduler = "cosine"',
    ),
    "S1: LoHa": (
        'network_module = "lycoris.kohya"',
        "network_dim = 6",
        "network_alpha = 3",
        "unet_lr = 5e-5",
        'network_args = ["algo=loha", "conv_dim=2", "conv_alpha=1"]',
    ),
    "S3: restarts": (
        "unet_lr = 1e-4",
        "text_encoder_lr = 5e-5",
        'lr_scheduler = "cosine_with_restarts"',
        "lr_scheduler_num_cycles = 4",
        "lr_warmup_steps = 0.05",
    ),
    "S4: AdamW8bit": (
        'optimizer_type = "AdamW8bit"',
        'optimizer_args = ["weight_decay=0.01", "betas=0.9,0.999"]',
        "learning_rate = 1e-4",
    ),
    "S4: DAdaptAdam": (
        'optimizer_type = "DAdaptAdam"',
        "learning_rate = 1.0",
        "unet_lr = 1.0",
        "text_encoder_lr = 1.0",
        'optimizer_args = ["decouple=True", "weight_decay=0.01", "betas=0.9,0.99"]',
    ),
    "S4: Prodigy": (
        'optimizer_type = "Prodigy"',
        "learning_rate = 1.0",
        'optimizer_args = ["decouple=True", "weight_decay=0.01", "d_coef=2", '
        '"use_bias_correction=True", "safeguard_warmup=True"]',
    ),
    "S4: Lion": (
        'optimizer_type = "Lion"',
        "learning_rate = 1e-5",
    ),
    "S4: polynomial": (
        "learning_rate = 1e-4",
        'lr_scheduler = "polynomial"',
        "lr_scheduler_power = 0.75",
    ),
    "S4: LoCon": (
        'network_module = "lycoris.kohya"',
        "network_dim = 64",
        "network_alpha = 64",
        'network_args = ["conv_dim=32", "conv_alpha=32", "algo=locon"]',
    ),
    "S4: everything on": (
        "learning_rate = 1e-4",
        "min_snr_gamma = 5",
        "scale_weight_norms = 1.0",
        "network_dropout = 0.1",
        "shuffle_caption = true",
        "keep_tokens = 1",
        "noise_offset = 0.05",
        "max_token_length = 225",
        "clip_skip = 2",
        "gradient_checkpointing = true",
        "enable_bucket = true",
        "min_bucket_reso = 256",
        "max_bucket_reso = 1536",
    ),
    "S0: block weights": (
        "learning_rate = 1.6e-3",
        "network_dim = 16",
        "network_alpha = 1",
        'network_args = ["conv_dim=16", "conv_alpha=1", "block_lr_zero_threshold=0.1", '
        '"down_lr_weight=sine-.5", "mid_lr_weight=2", "up_lr_weight=cosine+1"]',
    ),
    "S0: lists": (
        "learning_rate = 1e-4",
        'network_args = ["down_lr_weight=0.5,0.5,0.5,0.5,1,1,1,1,1.5,1.5,1.5,1.5"]',
    ),
    "LoKr with a factor": (
        'network_module = "lycoris.kohya"',
        'network_args = ["algo=lokr", "factor=4", "use_cp=True"]',
    ),
    "DyLoRA": (
        'network_module = "networks.dylora"',
        "network_dim = 16",
        'network_args = ["unit=4"]',
    ),
    "U-Net alone": (
        "network_train_unet_only = true",
        "unet_lr = 1e-4",
    ),
    "text encoder off by its rate": (
        "learning_rate = 1e-4",
        "text_encoder_lr = 0",
    ),
    "multires noise": (
        "multires_noise_iterations = 6",
        "multires_noise_discount = 0.3",
    ),
    "v-prediction": (
        "v_parameterization = true",
        "zero_terminal_snr = true",
        "scale_v_pred_loss_like_noise_pred = true",
    ),
    "huber": (
        'loss_type = "huber"',
        'huber_schedule = "snr"',
        "huber_c = 0.1",
    ),
    "switches off": (
        "v2 = false",
        "random_crop = false",
        "xformers = false",
        "save_state = false",
        "no_metadata = false",
    ),
    "zeros that mean off": (
        "noise_offset = 0",
        "min_snr_gamma = 0",
        "multires_noise_iterations = 0",
        "network_dropout = 0",
    ),
    "Adafactor's own rates": (
        'optimizer_type = "Adafactor"',
        "learning_rate = 1e-3",
    ),
    "Adafactor with a rate": (
        'optimizer_type = "adafactor"',
        "learning_rate = 1e-4",
        'lr_scheduler = "constant"',
        'optimizer_args = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]',
    ),
    "cached text without text encoder": (
        "cache_text_encoder_outputs = true",
        "network_train_unet_only = true",
    ),
    "a regular size with buckets": (
        'resolution = "512,768"',
        "enable_bucket = true",
    ),
    "a class of torch": (
        'lr_scheduler_type = "CosineAnnealingLR"',
        "learning_rate = 1e-4",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_config_is_taken(name: str) -> None:
    text = "\n".join(RIGHT[name])
    start = "" if "resolution" in text else "resolution = 512\n"
    data, train = api.make_both(read_kohya(start + text).settings, where=name)
    assert dataclasses.is_dataclass(data) and dataclasses.is_dataclass(train)


def test_a_right_file_of_hcp_diffusion_is_taken(tmp_path: Path) -> None:
    _hcp(tmp_path)
    _hcp(tmp_path, "train.train_epochs=10", "train.scale_lr=false", "lora_unet.0.rank=16")
