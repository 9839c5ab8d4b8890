"""Networks in configs of kohya's trainer: network_module and its network_args."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loragraft.trainer.imports import kohya_network
from loragraft.trainer.imports.kohya_blocks import DIMS, INDICES
from loragraft_tests.trainer.kohya_configs import FIELDS, refusal, settings


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        ("networks.lora", [], {"algo": "lora", "conv_dim": None}),
        ("networks.lora", ["conv_dim=8"], {"conv_dim": 8, "conv_alpha": 1.0}),
        ("networks.lora", ["conv_dim=8", "conv_alpha=4"], {"conv_dim": 8, "conv_alpha": 4.0}),
        ("networks.lora", ["dropout=0.1", "rank_dropout=0.2"], {"network_dropout": 0.1, "rank_dropout": 0.2}),
        ("networks.lora", ["loraplus_lr_ratio=16"], {"loraplus_lr_ratio": 16.0}),
        (
            "networks.lora",
            [
                "down_lr_weight=sine+.5",
                "mid_lr_weight=2",
                "up_lr_weight=cosine+1",
                "block_lr_zero_threshold=0.1",
            ],
            {"down_lr_weight": "sine+.5", "mid_lr_weight": "2", "block_lr_zero_threshold": 0.1},
        ),
        ("networks.dylora", ["unit=2"], {"algo": "dylora", "unit": 2}),
        ("lycoris.kohya", [], {"algo": "locon", "preset": "full"}),
        ("lycoris.kohya", ["algo=LoHa", "conv_dim=4", "conv_alpha=1"], {"algo": "loha", "conv_dim": 4}),
        ("lycoris.kohya", ["algo=lokr", "factor=4", "use_cp=True"], {"factor": 4, "use_tucker": True}),
        ("lycoris.kohya", ["algo=diag-oft", "constraint=0.001"], {"algo": "oft", "constraint": 0.001}),
        ("lycoris.kohya", ["preset=attn-mlp", "train_norm=True"], {"preset": "attn-mlp", "train_norm": True}),
        ("lycoris.kohya", ["algo=dylora"], {"algo": "dylora", "unit": 4}),
        ("lycoris.kohya", ["dora_wd=True"], {"dora_wd": True, "wd_on_output": True}),
        ("lycoris.kohya", ["algo=lokr", "conv_dim=10000"], {"full_matrix": True, "conv_dim": 1024}),
        ("locon.locon_kohya", [], {"algo": "locon", "conv_dim": 8, "conv_alpha": 4.0}),
    ],
)
def test_network_args(module: str, args: list[str], expected: dict[str, Any]) -> None:
    text = (
        f'network_module = "{module}"\nnetwork_args = {json.dumps(args)}\nnetwork_dim = 8\nnetwork_alpha = 4'
    )
    _, train = settings(text)
    assert {name: getattr(train, name) for name in expected} == expected


def test_every_key_of_network_args_is_a_setting() -> None:
    for keys in kohya_network.KEYS.values():
        chosen = {"train_blocks", "train_t5xxl"}.union(*DIMS.values(), *INDICES.values())
        assert {key.setting for key in keys.values()} <= {*FIELDS, *chosen}


def test_a_key_of_another_module_is_refused_by_name() -> None:
    error = refusal('network_args = ["algo=loha"]')
    assert error.code == "LG-IMP-002" and "lycoris.kohya" in error.fix
    error = refusal('network_module = "lycoris.kohya"\nnetwork_args = ["down_lr_weight=sine"]')
    assert error.code == "LG-IMP-002" and "networks.lora" in error.fix


def test_conv_alphas_of_the_guide_is_no_key() -> None:
    error = refusal('network_args = ["conv_dim=16", "conv_alphas=1"]')
    assert error.code == "LG-CFG-001" and error.fix == "did you mean 'conv_alpha'?"
