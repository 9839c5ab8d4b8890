"""Learning settings that cannot be together are refused before anything is opened, each with a remedy."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

PRODIGY = {"optimizer_type": "Prodigy", "learning_rate": 1.0}
ADAFACTOR = {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor", "learning_rate": 1e-4}
INSIDE = {"fused_backward_pass": True, "max_grad_norm": 0.0}
CLASS = {"lr_scheduler_type": "OneCycleLR"}

# Settings -> what the refusal must mention: both settings or values, and the nearest one that is possible.
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # the schedule does not read it
    ({"lr_scheduler": "constant", "lr_warmup_steps": 2}, ("lr_warmup_steps", "constant_with_warmup")),
    ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, ("num_cycles", "cosine_with_restarts")),
    ({"lr_scheduler": "cosine", "lr_scheduler_power": 2.0}, ("lr_scheduler_power", "polynomial")),
    ({"lr_scheduler": "linear", "lr_decay_steps": 2}, ("lr_decay_steps", "warmup_stable_decay")),
    ({"lr_scheduler": "cosine", "lr_scheduler_min_lr_ratio": 0.1}, ("min_lr_ratio", "cosine_with_min_lr")),
    ({"lr_scheduler": "cosine", "lr_scheduler_timescale": 9}, ("timescale", "inverse_sqrt")),
    ({**CLASS, "lr_warmup_steps": 2}, ("OneCycleLR", "lr_warmup_steps", "lr_scheduler_args")),
    ({**CLASS, "lr_scheduler_power": 2.0}, ("OneCycleLR", "lr_scheduler_power")),
    ({**CLASS, "lr_scheduler": "linear"}, ("lr_scheduler_type", "linear")),
    # the schedule needs it
    ({"lr_scheduler": "cosine_with_min_lr"}, ("lr_scheduler_min_lr_ratio", "0.1")),
    ({"lr_scheduler": "warmup_stable_decay"}, ("lr_decay_steps", "0.2")),
    ({"lr_scheduler": "piecewise_constant"}, ("step_rules",)),
    # lengths
    ({"lr_scheduler": "linear", "lr_warmup_steps": 5}, ("5 steps", "has 4", "0.05")),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 3},
        ("5 steps", "0.2"),
    ),
    # one thing said twice
    (
        {
            "lr_scheduler": "cosine_with_min_lr",
            "lr_scheduler_min_lr_ratio": 0.1,
            "lr_scheduler_args": ["min_lr=1e-5"],
        },
        ("min_lr", "keep one"),
    ),
    (
        {
            "lr_scheduler": "cosine_with_warm_restarts",
            "lr_warmup_steps": 1,
            "lr_scheduler_args": ["warmup_steps=1"],
        },
        ("lr_warmup_steps", "warmup_steps"),
    ),
    (
        {
            "lr_scheduler": "cosine_with_warm_restarts",
            "lr_scheduler_num_cycles": 2,
            "lr_scheduler_args": ["T_0=2"],
        },
        ("lr_scheduler_num_cycles", "T_0"),
    ),
    # optimizers that find the rate themselves
    ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, ("Prodigy", "0.0001", "learning_rate to 1")),
    ({**PRODIGY, "unet_lr": 0.5}, ("several learning rates: 0.5, 1", "learning_rate to 1")),
    ({**PRODIGY, "train_embeddings": ["zibu"], "embedding_lr": 0.5}, ("1, 1, 0.5", "embedding_lr")),
    ({**PRODIGY, "down_lr_weight": "sine"}, ("down_lr_weight", "AdamW")),
    ({**PRODIGY, "loraplus_lr_ratio": 4.0}, ("loraplus_lr_ratio",)),
    ({**PRODIGY, "network_reg_lrs": ["a=1"]}, ("network_reg_lrs",)),
    ({"optimizer_type": "dadaptation.DAdaptAdam", "learning_rate": 0.01}, ("0.01",)),
    # Adafactor's own steps
    ({**ADAFACTOR, "lr_scheduler": "cosine"}, ("cosine", "adafactor", "relative_step=False")),
    ({**ADAFACTOR, "learning_rate": 1e-3}, ("learning_rate", "relative_step=False")),
    ({**ADAFACTOR, "unet_lr": 1e-3}, ("unet_lr", "relative_step=False")),
    ({**ADAFACTOR, "mid_lr_weight": "2"}, ("mid_lr_weight",)),
    ({**ADAFACTOR, "scale_lr": True}, ("scale_lr",)),
    ({**ADAFACTOR, "optimizer_args": ["relative_step=False"]}, ("constant_with_warmup",)),
    ({"lr_scheduler": "adafactor"}, ("AdamW", "Adafactor")),
    # schedule-free
    ({"optimizer_type": "AdamWScheduleFree"}, ("cosine", "constant")),
    # steps within the backward pass
    ({"fused_backward_pass": True}, ("max_grad_norm",)),
    ({**INSIDE, "gradient_accumulation_steps": 2}, ("gradient_accumulation_steps",)),
    ({**INSIDE, **PRODIGY}, ("Prodigy", "AdamW")),
    ({**INSIDE, "engine": "fused"}, ("engine", "eager")),
    ({**INSIDE, "mixed_precision": "fp16"}, ("fp16", "bf16")),
    # what has no effect
    ({"block_lr_zero_threshold": 0.1}, ("block_lr_zero_threshold", "down_lr_weight")),
    ({"up_lr_weight": "sine", "unet_lr": 0.0}, ("up_lr_weight", "unet_lr")),
    ({"loraplus_unet_lr_ratio": 2.0, "unet_lr": 0.0}, ("loraplus_unet_lr_ratio",)),
    ({"loraplus_text_encoder_lr_ratio": 2.0, "network_train_unet_only": True}, ("text_encoder",)),
    ({"loraplus_lr_ratio": 2.0, "algo": "lokr"}, ("lokr", "algo to lora")),
    ({"learning_rate": 0.0}, ("learning rate",)),
]


@pytest.mark.parametrize(("changes", "mentions"), CONTRADICTIONS, ids=[str(c) for c, _ in CONTRADICTIONS])
def test_contradictions_are_refused(changes: dict[str, Any], mentions: tuple[str, ...]) -> None:
    with Refusal("LG-CFG-004", *mentions):
        runs.settings(**changes)


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"lr_scheduler_num_cycles": 0}, "1 to 1000"),
        ({"lr_scheduler": "adafactor:0.001"}, "adafactor"),
        ({"lr_scheduler": "cosine_with_restart"}, "cosine_with_restarts"),
        ({"lr_scheduler_type": "os.system"}, "torch.optim.lr_scheduler"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler."}, "torch.optim.lr_scheduler"),
        ({"optimizer_type": "Prodigi"}, "Prodigy"),
        ({"loraplus_lr_ratio": 0.0}, "0.001"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], mention: str) -> None:
    with Refusal("LG-CFG-003", mention):
        runs.settings(**changes)


@pytest.mark.parametrize("args", [["T_0"], ["T_0=x"], ["T_0=1", "T_0=2"], ["step_rules"]])
def test_schedule_options_that_are_no_literals_are_refused(args: list[str]) -> None:
    with Refusal("LG-CFG-002", "lr_scheduler_args"):
        runs.settings(lr_scheduler="cosine_with_warm_restarts", lr_scheduler_args=args)


@pytest.mark.parametrize(
    "changes",
    [
        PRODIGY,
        {**PRODIGY, "text_encoder_lr": 0.0},
        {**PRODIGY, "unet_lr": 0.5, "text_encoder_lr": 0.5},
        ADAFACTOR,
        {**ADAFACTOR, "text_encoder_lr": 0.0},
        {**ADAFACTOR, "lr_scheduler": "constant_with_warmup", "optimizer_args": ["relative_step=False"]},
        {"optimizer_type": "adamw8BIT"},
        {"optimizer_type": "SGDScheduleFree", "lr_scheduler": "constant", "learning_rate": 1.0},
        INSIDE,
        {**CLASS, "lr_scheduler_args": ["pct_start=0.1"]},
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 0.1, "lr_decay_steps": 0.2},
        {"lr_scheduler": "linear", "lr_warmup_steps": 100, "max_train_epochs": 100},
        {"loraplus_lr_ratio": 16.0, "network_reg_lrs": ["to_q$=1e-5"], "down_lr_weight": "sine-.5"},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(changes: dict[str, Any]) -> None:
    runs.settings(**changes)
