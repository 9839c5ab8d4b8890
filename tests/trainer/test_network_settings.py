"""Settings of the network that contradict each other, each refused with a way out that is taken."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.adapters.configured import settings_of
from loragraft.trainer.adapters.methods import METHODS, SAME_AS
from loragraft.trainer.block_weights import SD1
from loragraft.trainer.settings.network import ALGORITHMS
from loragraft_tests.trainer.data_folders import Refusal

TWENTY_FIVE = ",".join(["4"] * 25)

CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"algo": "ia3", "dora_wd": True}, ("dora_wd", "ia3", "lora or locon or loha or lokr")),
    ({"algo": "oft", "dora_wd": True}, ("dora_wd", "oft")),
    ({"wd_on_output": True}, ("wd_on_output", "dora_wd")),
    ({"algo": "glora", "use_tucker": True, "conv_dim": 4}, ("use_tucker", "glora")),
    ({"use_tucker": True}, ("use_tucker", "conv_dim")),
    ({"algo": "loha", "use_tucker": True}, ("use_tucker", "conv_dim")),
    ({"algo": "locon"}, ("locon", "conv_dim")),
    ({"factor": 4}, ("factor", "lokr")),
    ({"algo": "loha", "decompose_both": True}, ("decompose_both", "lokr")),
    ({"full_matrix": True}, ("full_matrix", "lokr")),
    ({"unbalanced_factorization": True}, ("unbalanced_factorization", "lokr")),
    ({"algo": "lokr", "full_matrix": True, "decompose_both": True}, ("full_matrix", "decompose_both")),
    ({"unit": 2}, ("unit", "dylora")),
    ({"constraint": 0.1}, ("constraint", "oft or boft")),
    ({"algo": "oft", "rescaled": True}, ("rescaled", "boft", "ComfyUI")),
    ({"algo": "full", "rs_lora": True}, ("rs_lora", "full")),
    ({"algo": "loha", "network_dropout": 0.1}, ("network_dropout", "loha")),
    ({"dora_wd": True, "network_dropout": 0.1}, ("dora_wd", "network_dropout")),
    ({"use_tucker": True, "conv_dim": 4, "network_dropout": 0.1}, ("network_dropout", "use_tucker")),
    ({"algo": "oft", "rank_dropout": 0.1}, ("rank_dropout", "oft")),
    ({"algo": "loha", "rank_dropout_scale": True}, ("rank_dropout_scale", "rank_dropout")),
    ({"rank_dropout": 0.1, "rank_dropout_scale": True}, ("rank_dropout_scale", "plain LoRA")),
    ({"algo": "ia3", "scale_weight_norms": 1.0}, ("scale_weight_norms", "ia3")),
    ({"dim_from_weights": True}, ("dim_from_weights", "network_weights")),
    (
        {"dim_from_weights": True, "network_weights": "x.safetensors", "conv_dim": 4},
        ("dim_from_weights", "conv_dim"),
    ),
    (
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        ("network_train_unet_only", "network_train_text_encoder_only"),
    ),
    (
        {"network_train_unet_only": True, "text_encoder_lr": 1e-4},
        ("network_train_unet_only", "text_encoder_lr"),
    ),
    (
        {"network_train_text_encoder_only": True, "unet_lr": 1e-4},
        ("network_train_text_encoder_only", "unet_lr"),
    ),
    (
        {"network_train_text_encoder_only": True, "train_norm": True},
        ("network_train_text_encoder_only", "norm"),
    ),
    ({"preset": "unet-only", "text_encoder_lr": 1e-4}, ("unet-only", "text_encoder_lr")),
    (
        {"preset": "unet-only", "network_train_text_encoder_only": True},
        ("unet-only", "network_train_text_encoder_only"),
    ),
    ({"preset": "attn-mlp", "conv_dim": 4}, ("conv_dim", "attn-mlp", "full or unet-only")),
    ({"conv_alpha": 1.0}, ("conv_alpha", "conv_dim")),
    ({"conv_block_alphas": TWENTY_FIVE}, ("conv_block_alphas", "conv_block_dims")),
    ({"conv_dim": 4, "network_train_text_encoder_only": True}, ("conv_dim", "denoiser is not trained")),
    ({"block_dims": TWENTY_FIVE, "unet_lr": 0.0}, ("block_dims", "denoiser is not trained")),
    ({"train_norm": True, "unet_lr": 0.0}, ("train_norm", "denoiser is not trained")),
]
BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"algo": "dylora", "unit": 5, "network_dim": 32}, ("unit", "network_dim 32", "'4'")),
    ({"algo": "dylora", "unit": 4, "network_dim": 8, "conv_dim": 6}, ("unit", "conv_dim 6", "'3'")),
    ({"algo": "lokr", "factor": 0}, ("factor", "-1")),
    ({"network_dropout": 1.0}, ("network_dropout", "0 to 0.99")),
    ({"rank_dropout": 1.0}, ("rank_dropout", "0 to 0.99")),
    ({"module_dropout": -0.1}, ("module_dropout", "0 to 0.99")),
    ({"network_alpha": -1.0}, ("network_alpha", "0 to")),
    ({"algo": "lorq"}, ("algo", "'lora'")),
    ({"preset": "attn"}, ("preset", "attn-")),
    ({"block_dims": "4,4,4"}, ("block_dims", "25 whole numbers", "there are 3")),
    ({"block_dims": TWENTY_FIVE + ",4"}, ("block_dims", "for SDXL 23", "there are 26")),
    ({"block_dims": TWENTY_FIVE[:-1] + "x"}, ("block_dims", "25 whole numbers")),
    ({"block_dims": TWENTY_FIVE[:-1] + "2.5"}, ("block_dims", "25 whole numbers")),
    ({"block_dims": TWENTY_FIVE[:-1] + "nan"}, ("block_dims", "25 whole numbers")),
    ({"block_dims": TWENTY_FIVE[:-1] + "1e300"}, ("block_dims", "25 whole numbers")),
    ({"block_alphas": TWENTY_FIVE[:-1] + "-1"}, ("block_alphas", "25 alphas")),
    ({"block_alphas": TWENTY_FIVE[:-1] + "inf"}, ("block_alphas", "25 alphas")),
    ({"network_reg_dims": ["to_k"]}, ("network_reg_dims", "pattern=number")),
    ({"network_reg_dims": ["(=4"]}, ("network_reg_dims", "no regular expression")),
    ({"network_reg_dims": ["(a+)+$=4"]}, ("network_reg_dims", "repeats a group")),
    ({"network_reg_dims": [f"attn{i}=4" for i in range(101)]}, ("network_reg_dims", "more than 100")),
    ({"network_reg_dims": ["a" * 201 + "=4"]}, ("network_reg_dims", "longer than 200")),
    ({"network_reg_dims": ["to_k=2.5"]}, ("network_reg_dims", "ranks of 0 to 1024")),
    ({"network_reg_dims": ["to_k=-1"]}, ("network_reg_dims", "ranks of 0 to 1024")),
]
POSSIBLE: list[dict[str, Any]] = [
    {"dora_wd": True, "wd_on_output": True, "rank_dropout": 0.1, "rank_dropout_scale": True},
    {"algo": "locon", "conv_dim": 4, "use_tucker": True, "dora_wd": True},
    {"algo": "locon", "preset": "full"},
    {"algo": "lokr", "factor": 4, "decompose_both": True, "use_tucker": True, "preset": "full"},
    {"algo": "dylora", "unit": 4, "network_dim": 16, "conv_dim": 8, "scale_weight_norms": 1.0},
    {"algo": "boft", "rescaled": True, "constraint": 0.1},
    {"network_train_text_encoder_only": True, "text_encoder_lr": 1e-4},
    {"network_train_unet_only": True, "text_encoder_lr": 0.0},
    {"block_dims": TWENTY_FIVE, "block_alphas": TWENTY_FIVE, "conv_block_dims": TWENTY_FIVE},
    {"network_alpha": 0.0, "network_reg_dims": [r"attn\d.*to_[kv]$=8", "re:.*resnets$=0"]},
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=lambda x: " ".join(x))
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with Refusal("LG-CFG-004", *words):
        api.make(api.TrainConfig, values)


@pytest.mark.parametrize(("values", "words"), BAD_VALUES, ids=lambda x: " ".join(x)[:60])
def test_values_out_of_range_are_refused_with_what_is_valid(
    values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with Refusal("LG-CFG-003", *words):
        api.make(api.TrainConfig, values)


@pytest.mark.parametrize("values", POSSIBLE, ids=lambda x: " ".join(x))
def test_what_belongs_together_is_taken(values: dict[str, Any]) -> None:
    settings_of(api.make(api.TrainConfig, values), SD1)


def test_every_network_of_the_setting_is_there() -> None:
    assert {SAME_AS.get(name, name) for name in ALGORITHMS} == set(METHODS) - {"norm"}
    assert settings_of(api.TrainConfig(), SD1).unfused == ""


def test_the_references_name_of_oft_is_read() -> None:
    assert api.make(api.TrainConfig, {"algo": "diag-oft"}).algo == "oft"


def test_a_presets_convolutions_take_the_other_layers_rank() -> None:
    """As LyCORIS does; without a preset they are not trained, as with kohya."""
    values = {"network_dim": 8, "network_alpha": 3.0}
    plain = settings_of(api.make(api.TrainConfig, values), SD1)
    full = settings_of(api.make(api.TrainConfig, {**values, "preset": "full"}), SD1)
    own = settings_of(api.make(api.TrainConfig, {**values, "preset": "full", "conv_dim": 2}), SD1)
    assert [(s.conv_dim, s.conv_alpha) for s in (plain, full, own)] == [(None, 1.0), (8, 3.0), (2, 1.0)]


def test_blocks_of_weight_zero_are_not_trained() -> None:
    values = {"down_lr_weight": "0,1,1,1,1,1,1,1,1,1,1,0", "block_dims": TWENTY_FIVE}
    settings = settings_of(api.make(api.TrainConfig, values), SD1)
    assert settings.still == {0, 11}
