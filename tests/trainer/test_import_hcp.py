"""HCP-Diffusion's training files: base files, changes on the command line, groups of layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports.hcp_layers import TEXT_ENCODER, UNET, pattern_of
from loragraft.trainer.patterns import rules

BASES = "_base_: [cfgs/train/train_base.yaml, cfgs/train/tuning_base.yaml]\n"
LORA = (
    BASES
    + """
lora_unet:
  - lr: 1e-4
    rank: 8
    layers: ['re:.*\\.attn.?$', 're:.*\\.ff$']
lora_text_encoder:
  - lr: 1e-5
    rank: 4
    layers: ['re:.*self_attn$', 're:.*mlp$']
tokenizer_pt: {train: null}
train:
  gradient_accumulation_steps: 1
  save_step: 100
  scheduler: {name: constant_with_warmup, num_warmup_steps: 50, num_training_steps: 600}
model: {pretrained_model_name_or_path: base.safetensors, tokenizer_repeats: 1}
"""
)
GUIDE = """
_base_:
  - cfgs/train/examples/fine-tuning.yaml
unet:
  - lr: 1e-6
    layers:
      - ''
train:
  train_epochs: 20
model:
  pretrained_model_name_or_path: 'runwayml/stable-diffusion-v1-5'
  tokenizer_repeats: 1
data:
  dataset1:
    batch_size: 4
    source:
      data_source1: {img_root: 'train_data/', caption_file: 'train_data/', word_names: {pt1: pt-cat1}}
    bucket: {target_area: '${hcp.eval:"512*768"}', num_bucket: 5}
"""


def read(tmp_path: Path, text: str, *overrides: str) -> tuple[api.Imported, api.TrainConfig]:
    file = tmp_path / "cat.yaml"
    file.write_text(text, encoding="utf-8")
    imported = api.read_foreign(file, overrides=overrides)
    return imported, api.make_both(imported.settings, where="test")[1]


def refusal(tmp_path: Path, text: str, *overrides: str) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        read(tmp_path, text, *overrides)
    return caught.value


def test_a_lora_with_groups_for_both_parts(tmp_path: Path) -> None:
    imported, config = read(tmp_path, LORA)
    assert (config.unet_lr, config.text_encoder_lr, config.network_dim, config.network_alpha) == (
        1e-4,
        1e-5,
        8,
        1.0,
    )
    assert (config.lr_scheduler, config.lr_warmup_steps, config.max_train_steps) == (
        "constant_with_warmup",
        50,
        1000,
    )
    assert (config.save_every_n_steps, config.clip_skip, config.tokenizer_repeats) == (100, 1, 1)
    assert (config.mixed_precision, config.seed, config.scale_lr) == ("fp16", 114514, True)
    assert config.optimizer_args == ("weight_decay=0.001",) and config.gradient_checkpointing
    assert config.output_name == "cat" and imported.places["output_dir"] == "exps/"
    assert "dataset_config" not in imported.places
    assert any("scale_lr" in note for note in imported.notes)


def ranks(config: api.TrainConfig, *names: str) -> list[float | None]:
    found = rules(config.network_reg_dims)
    return [next((rule.value for rule in found if rule.fits(name)), None) for name in names]


def test_ranks_reach_the_layers_that_a_group_names_and_no_others(tmp_path: Path) -> None:
    _, config = read(tmp_path, LORA)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert ranks(
        config,
        f"{block}.attn1.to_q",
        f"{block}.attn2.to_out.0",
        f"{block}.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.0.mlp.fc1",
        "text_model.encoder.layers.0.layer_norm1",
    ) == [8, 8, 8, 0, 0, 4, 4, 0]


def test_the_guides_layers_have_rates_of_their_own(tmp_path: Path) -> None:
    text = BASES + (
        "lora_unet:\n"
        "  - {lr: 1e-6, layers: ['re:.*\\.to_k$', 're:.*\\.to_v$', 're:.*\\.ff$']}\n"
        "  - {lr: 1e-5, layers: ['re:.*resnets$']}\n"
        "train: {scheduler: {name: constant}}\n"
    )
    _, config = read(tmp_path, text)
    rates = rules(config.network_reg_lrs)
    names = ("up_blocks.1.attentions.0.to_k", "up_blocks.1.resnets.0.conv1")
    assert [next(rate.value for rate in rates if rate.fits(name)) for name in names] == [1e-6, 1e-5]
    assert (config.conv_dim, config.network_train_unet_only, config.unet_lr) == (1, True, 1e-6)


@pytest.mark.parametrize(
    ("layer", "area", "inside", "outside"),
    [
        ("", UNET, "mid_block.resnets.0.conv1", "text_model.encoder"),
        ("mid_block", UNET, "mid_block.attentions.0", "mid_blocks.0"),
        ("re:.*\\.to_k$", UNET, "up_blocks.1.x.to_k", "up_blocks.1.x.to_k2"),
        ("re:.*\\.attn.?$", UNET, "down_blocks.0.x.attn2.to_q", "down_blocks.0.attentions.0.proj_in"),
        ("re:.*resnets", UNET, "down_blocks.0.resnets.1.conv2", "text_model.resnets"),
        ("re:down_blocks\\.[01]", UNET, "down_blocks.1.a", "down_blocks.2.a"),
        ("re:.*mlp$", TEXT_ENCODER, "text_model.encoder.layers.3.mlp.fc2", "down_blocks.0.mlp"),
    ],
)
def test_patterns(layer: str, area: str, inside: str, outside: str) -> None:
    pattern = pattern_of(layer, area)
    assert pattern is not None and re.search(pattern, inside) and not re.search(pattern, outside)
    (rule,) = rules([f"{pattern}=1"])
    assert rule.fits(inside) and not rule.fits(outside)


def test_the_guides_fine_tuning_file_and_its_changes(tmp_path: Path) -> None:
    imported, config = read(tmp_path, GUIDE)
    assert (config.algo, config.unet_lr, config.network_train_unet_only) == ("full", 1e-6, True)
    assert (config.preset, config.save_as, config.train_batch_size) == ("everything", "checkpoint", 4)
    assert (config.max_train_epochs, config.tokenizer_repeats) == (20, 1)
    assert imported.places["dataset_config"] == str(tmp_path / "cat.yaml")
    _, changed = read(tmp_path, GUIDE, "train.train_epochs=10", "unet.0.lr=2e-6", "model.clip_skip=1")
    assert (changed.max_train_epochs, changed.unet_lr, changed.clip_skip) == (10, 2e-6, 2)


def test_a_step_with_class_images(tmp_path: Path) -> None:
    """One batch of each dataset is a step: two micro-batches, and their images count for scale_lr."""
    classes = "  dataset_class: {batch_size: 1, loss_weight: 0.5, source: {a: {img_root: class/}}}\n"
    imported, config = read(tmp_path, GUIDE + classes)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (4, 2)
    assert config.max_grad_norm == 0.5 and not config.scale_lr
    assert config.unet_lr == pytest.approx(5e-6), "the rate of the file times 4 + 1 images"
    assert any("multiplied by the 5 images of a step" in note for note in imported.notes)
    two = ["unet=[{lr: 1e-6, layers: ['']}, {lr: 2e-6, layers: ['re:.*attn1$']}]", "train.scale_lr=true"]
    _, config = read(tmp_path, GUIDE + classes, *two)
    assert sorted({float(e.rpartition("=")[2]) for e in config.network_reg_lrs}) == [5e-6, 1e-5]


def test_an_average_of_the_weights(tmp_path: Path) -> None:
    _, config = read(tmp_path, GUIDE, "model.ema_unet=0.999")
    assert config.ema_decay == 0.999, "the text encoder is not trained, and needs no decay"
    _, config = read(tmp_path, LORA, "model.ema_unet=0.99", "model.ema_text_encoder=0.99")
    assert config.ema_decay == 0.99


def test_a_base_file_that_lies_beside_is_read(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(LORA, encoding="utf-8")
    _, config = read(tmp_path, "_base_: [below.yaml]\ntrain: {train_steps: 70}\n")
    assert (config.max_train_steps, config.network_dim) == (70, 8)
    with pytest.raises(LoraGraftError, match="LG-DATA-084"):
        read(tmp_path, "_base_: [../below.yaml]\n")


@pytest.mark.parametrize(
    ("override", "settings"),
    [
        ("train.scheduler.name=one_cycle", {"lr_scheduler_type": "torch.optim.lr_scheduler.OneCycleLR"}),
        ("train.loss.criterion={_target_: hcpdiff.loss.MinSNRLoss, gamma: 2.0}", {"min_snr_gamma": 2.0}),
        ("train.optimizer={type: adamw_8bit, weight_decay: 0.1}", {"optimizer_args": ("weight_decay=0.1",)}),
        ("train.optimizer={_target_: lion_pytorch.Lion, _partial_: true}", {"optimizer_type": "Lion"}),
        ("train.scale_lr=false", {"scale_lr": False}),
        ("mixed_precision=null", {"mixed_precision": "fp32"}),
        ("model.gradient_checkpointing=false", {"gradient_checkpointing": False}),
    ],
)  # fmt: skip
def test_values(tmp_path: Path, override: str, settings: dict[str, Any]) -> None:
    _, config = read(tmp_path, LORA, "train.scheduler.num_training_steps=1000", override)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("override", "code", "named"),
    [
        ("train.scheduler.name=linear", "LG-IMP-002", "num_training_steps: 1000"),
        ("train.scheduler.name=wavy", "LG-IMP-002", "cosine"),
        ("train.train_step=10", "LG-CFG-001", "train_steps"),
        ("modle.clip_skip=1", "LG-CFG-001", "model"),
        ("model.ema_unet=0.99", "LG-IMP-002", "both the same number"),
        ("model.ema_unet=many", "LG-CFG-003", "ema_unet: 0.9999"),
        ("ckpt_type=torch", "LG-IMP-002", "safetensors"),
        ("plugin_unet={a: 1}", "LG-IMP-002", "remove it"),
        ("tokenizer_pt.train=[{name: pt1, lr: 1e-3}]", "LG-IMP-002", "train_embeddings"),
        ("train.cfg_scale=1.0-3.0", "LG-IMP-002", "DreamArtist"),
        ("train.resume={ckpt_path: {}}", "LG-IMP-002", "network_weights"),
        ("train.optimizer.type=sgd", "LG-IMP-002", "adamw"),
        ("train.loss.type=sample", "LG-IMP-002", "eps"),
        ("lora_unet.0.rank=0.1", "LG-IMP-002", "whole number"),
        ("lora_unet.0.rank=0", "LG-CFG-003", "rank"),
        ("lora_unet.0.lr=fast", "LG-CFG-003", "lr"),
        ("lora_unet.0.svd_init=true", "LG-IMP-002", "svd_init"),
        ("lora_unet.0.type=loha", "LG-IMP-002", "algo"),
        ("lora_unet.0.layers=[]", "LG-CFG-003", "layers"),
        ("lora_unet.0.layers=['cls(Linear):x']", "LG-IMP-002", "regular expression"),
        ("lora_unet.0.alpha=4", "LG-IMP-002", "same alpha"),
        ("lora_unet.0.wrong=4", "LG-CFG-001", "wrong"),
        ("unet=[{lr: 1e-6, layers: ['']}]", "LG-IMP-002", "remove unet"),
        ("train.train_steps=many", "LG-CFG-003", "train_steps"),
        ("train=3", "LG-CFG-003", "train"),
        ("no equals sign", "LG-DATA-084", "train.train_epochs=10"),
        ("lora_unet.9.lr=1", "LG-DATA-084", "lora_unet.9.lr"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, override: str, code: str, named: str) -> None:
    error = refusal(tmp_path, LORA, override)
    assert error.code == code and named in str(error)


def test_nothing_to_train_and_an_unknown_base_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, BASES).code == "LG-CFG-003"
    error = refusal(tmp_path, "_base_: [cfgs/train/examples/none.yaml]\n")
    assert error.code == "LG-IMP-001" and "none.yaml" in error.why


def test_every_shipped_example_that_is_known_builds_settings(tmp_path: Path) -> None:
    from loragraft.trainer.imports.hcp_table import SHIPPED

    for name in (name for name in SHIPPED if "examples" in name):
        _, config = read(tmp_path, f"_base_: [{name}]\n", "train.scheduler.num_training_steps=1000")
        assert config.unet_lr in (1e-4, 1e-6)


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraGraftError, match="LG-IMP-001"):
        api.read_foreign(tmp_path / "a.docx")
    (tmp_path / "b.toml").write_text("network_dim = 8\n", encoding="utf-8")
    assert api.read_foreign(tmp_path / "b").settings["network_dim"] == 8  # kohya's trainer adds .toml too
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(LoraGraftError, match="not UTF-8"):
        api.read_foreign(tmp_path / "c.toml")
