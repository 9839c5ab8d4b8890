"""lora-scripts' files: its own keys, and what its pages write."""

from __future__ import annotations

import pytest

from loragraft.trainer import api
from loragraft.trainer.imports.kohya import read_kohya
from loragraft.trainer.sample_prompts import parse_prompt
from loragraft_tests.trainer.kohya_configs import refusal, settings

LORA_SCRIPTS = """
[model_arguments]
v2 = false
v_parameterization = false
pretrained_model_name_or_path = "./sd-models/model.ckpt"
[dataset_arguments]
train_data_dir = "./train/aki"
reg_data_dir = ""
resolution = "512,512"
prior_loss_weight = 1
[additional_network_arguments]
network_dim = 32
network_alpha = 16
network_train_unet_only = false
network_train_text_encoder_only = false
network_module = "networks.lora"
network_args = []
[optimizer_arguments]
unet_lr = 1e-4
text_encoder_lr = 1e-5
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0
lr_restart_cycles = 1
[training_arguments]
train_batch_size = 1
noise_offset = 0.0
keep_tokens = 0
caption_extension = ".txt"
max_token_length = 225
seed = 1337
xformers = true
lowram = false
max_train_epochs = 10
resolution = "512,512"
clip_skip = 2
mixed_precision = "fp16"
enable_contrastive = false
noise_strength = 1.0
[sample_prompt_arguments]
sample_sampler = "euler_a"
sample_every_n_epochs = 5
[saving_arguments]
output_name = "aki"
save_every_n_epochs = 1
save_n_epoch_ratio = 0
save_state = false
save_model_as = "safetensors"
output_dir = "./output"
logging_dir = "./logs"
log_prefix = ""
save_precision = "fp16"
[others]
cache_latents = true
shuffle_caption = true
enable_bucket = true
"""


def test_lora_scripts_own_file_is_read_unchanged() -> None:
    imported = read_kohya(LORA_SCRIPTS)
    data, train = api.make_both(imported.settings)
    assert (train.network_dim, train.network_alpha, train.unet_lr, train.text_encoder_lr) == (
        32,
        16.0,
        1e-4,
        1e-5,
    )
    assert (train.optimizer_type, train.lr_scheduler, train.max_train_epochs) == (
        "AdamW8bit",
        "cosine_with_restarts",
        10,
    )
    assert (train.clip_skip, train.max_token_length, train.seed, train.noise_offset) == (2, 225, 1337, 0.0)
    assert data.shuffle_caption and data.enable_bucket and data.resolution == 512
    notes = "\n".join(imported.notes)
    for name in ("lr_restart_cycles", "enable_contrastive", "xformers", "sample_every_n_epochs"):
        assert f"{name}: " in notes


def test_a_key_of_lora_scripts_that_kohyas_trainer_ignores_is_refused() -> None:
    """lr_restart_cycles = 4 trains without restarts there, and nobody is told."""
    error = refusal("lr_restart_cycles = 4")
    assert error.code == "LG-IMP-002" and "lr_scheduler_num_cycles" in error.fix
    assert "algo=" in refusal('lycoris_algo = "lokr"').fix
    assert 'network_args = ["conv_dim=4"]' in refusal("conv_dim = 4").fix


def test_a_preset_of_lora_scripts_has_tables_that_say_nothing_of_training() -> None:
    text = (
        '[metadata]\nname = "x"\nversion = "0.0.1"\n[data]\nresolution = "768,768"\nbucket_no_upscale = true'
    )
    assert read_kohya(text).settings["resolution"] == 768


# ---- what lora-scripts' pages write ----

PAGE = """
positive_prompts = "1girl, solo"
negative_prompts = "lowres"
sample_width = 64
sample_height = 96
sample_every_n_epochs = 1
randomly_choice_prompt = false
"""


def test_prompts_of_lora_scripts_pages_are_drawn() -> None:
    found = read_kohya(PAGE)
    assert found.settings["sample_prompts"] == ["1girl, solo --n lowres --w 64 --h 96 --l 7 --s 24 --d 2333"]
    assert settings(PAGE)[1].sample_every_n_epochs == 1
    assert any("sample_prompts is made of them" in note for note in found.notes)
    off = read_kohya(f"enable_preview = false{PAGE}")
    assert "sample_prompts" not in off.settings and "sample_every_n_epochs" not in off.settings
    assert read_kohya(f'prompt_file = "a.txt"{PAGE}').places["sample_prompts"] == "a.txt"
    alone = read_kohya("sample_width = 64")
    assert any("draws nothing" in note for note in alone.notes)


def test_a_prompt_drawn_by_chance_is_refused() -> None:
    error = refusal(PAGE.replace("= false", "= true"))
    assert error.code == "LG-IMP-002" and "randomly_choice_prompt" in error.where


@pytest.mark.parametrize(
    "line",
    [
        'positive_prompts = ["1girl"]',
        'enable_preview = "false"',
        "prompt_file = 3",
        'sample_steps = "many"',
        "negative_prompts = ['low']",
        'randomly_choice_prompt = "no"',
    ],
)
def test_a_pages_value_of_another_kind_is_not_guessed_at(line: str) -> None:
    """A list as a prompt would be drawn with its brackets, and a text "false" would be taken as on."""
    own = line if line.startswith("positive_prompts") else f'positive_prompts = "1girl"\n{line}'
    error = refusal(own)
    assert error.code == "LG-CFG-003" and line.split()[0] in error.where
    found = read_kohya('positive_prompts = "1girl"\nsample_width = "64"').settings["sample_prompts"]
    assert found[0].startswith("1girl --w 64 "), "text that reads as a number is one, as in other keys"
    found = read_kohya('positive_prompts = "1girl"\nsample_width = 64.0\nsample_seed = "7.0"').settings
    prompt = parse_prompt(found["sample_prompts"][0])
    assert (prompt.width, prompt.seed) == (64, 7)
    assert "sample_cfg = 7" in refusal('positive_prompts = "1girl"\nsample_cfg = true').fix


def test_sample_prompts_may_be_the_prompts_themselves() -> None:
    text = "sample_prompts = '''(best:1.2), 1girl --n low  --w 64\n\nsolo --d 3'''"
    found = read_kohya(text)
    assert found.settings["sample_prompts"] == ["(best:1.2), 1girl --n low  --w 64", "solo --d 3"]
    assert found.places == {} and found.settings["sample_steps"] > 0
    assert read_kohya('sample_prompts = "a--b.txt"').places == {"sample_prompts": "a--b.txt"}
    assert read_kohya('sample_prompts = "./a--b/list"').places == {"sample_prompts": "./a--b/list"}


def test_a_page_of_lora_scripts_for_flux_is_taken_as_its_defaults_stand() -> None:
    """What every file of that page holds, as its schema has it: numbers as texts, keys of its own."""
    found = read_kohya(
        """
model_train_type = "flux-lora"
ae = "a.safetensors"
train_t5xxl = false
network_train_unet_only = true
learning_rate = "1e-4"
unet_lr = "1e-4"
text_encoder_lr = "1e-5"
network_module = "networks.lora_flux"
network_dim = 2
network_alpha = 16
network_scale = 1
enable_base_weight = false
enable_contrastive = false
enable_preview = false
log_with = "tensorboard"
clip_skip = 2
fp8_base = true
sdpa = true
"""
    )
    config = api.make_both(found.settings, where="test")[1]
    assert (config.unet_lr, config.text_encoder_lr, config.network_dim) == (1e-4, None, 2)
    assert config.log_with == "auto" and config.base_storage == "fp8"
