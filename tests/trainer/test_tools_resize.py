"""A LoRA of another rank, against the reference's own results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.tools import lora_file, resize
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import GOLDEN, change, error

CASES = json.loads((GOLDEN / "resize_lora.json").read_text("utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['dynamic_method'] or 'fixed'}-{c['new_rank']}")
def test_resizing_equals_the_reference(case: dict[str, Any]) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    method = case["dynamic_method"] or "fixed"
    new, report = resize.resize(
        file, api.ResizeSettings(case["new_rank"], None, method, case["dynamic_param"])
    )
    assert set(new.modules) == set(case["modules"])
    for name, wanted in case["modules"].items():
        module, old = new.modules[name], file.modules[name]
        assert (module.rank, module.alpha) == (wanted["rank"], wanted["alpha"]), name
        assert float(change(module).norm()) == pytest.approx(wanted["delta_frobenius"], rel=2e-6)
        assert error(change(module), change(old)) == pytest.approx(wanted["relative_error"], rel=1e-5)
    for told in report:
        assert told.error == pytest.approx(case["modules"][told.name]["relative_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "params", "ranks"),
    [
        ("sv_ratio", (2, 4, 8, 16), (2, 3, 4, 5)),
        ("sv_fro", (0.5, 0.8, 0.9, 0.95, 0.99), (2, 2, 3, 3, 4)),
        ("sv_cumulative", (0.5, 0.8, 0.9, 0.95, 0.99), (2, 4, 5, 6, 8)),
    ],
)
def test_the_rank_rule(method: str, params: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    values = torch.tensor([8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    assert tuple(resize.choose_rank(values, method, p, 100) for p in params) == ranks
    assert resize.choose_rank(values, method, params[-1], 3) == 3
    assert resize.choose_rank(values * 1e-8, method, params[0], 100) == 1


def test_a_resized_file_says_so_and_is_written_over_nothing(tmp_path: Path) -> None:
    source, target = GOLDEN / "resize_input.safetensors", tmp_path / "small.safetensors"
    output = api.Output(target, "fp16")
    written = api.resize_lora(source, output, api.ResizeSettings(4, 2))
    told = read_metadata(target)
    assert told["ss_training_comment"].startswith("dimension is resized from 24 to 4 (conv: 2); ")
    assert told["ss_network_dim"] == "Dynamic"
    assert "6 modules, ranks 2 to 4" in written.report
    tensors = load_file(target)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert tensors["lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight"].shape == (2, 32, 3, 3)
    with Refusal("LG-TOOL-004", "small.safetensors"):
        api.resize_lora(source, output, api.ResizeSettings(4))
    again = dataclasses.replace(output, overwrite=True)
    api.resize_lora(source, again, api.ResizeSettings(4, None, "sv_fro", 0.9))
    assert read_metadata(target)["ss_network_dim"] == "Dynamic"
    assert read_metadata(target)["sshs_model_hash"] != told["sshs_model_hash"]


def test_a_higher_rank_than_the_modules_own_keeps_it() -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    new, _ = resize.resize(file, api.ResizeSettings(64))
    for name, module in new.modules.items():
        assert module.rank == 24
        assert error(change(module), change(file.modules[name])) < 1e-6


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (api.ResizeSettings(0), "at least 1"),
        (api.ResizeSettings(4, 0), "at least 1"),
        (api.ResizeSettings(4, None, "sv", 1), "none of"),
        (api.ResizeSettings(4, None, "sv_fro"), "needs a number"),
        (api.ResizeSettings(4, None, "sv_fro", 1.5), "needs a number"),
        (api.ResizeSettings(4, None, "sv_ratio", 0.5), "above 1"),
        (api.ResizeSettings(4, None, "fixed", 0.5), "no parameter"),
    ],
)
def test_impossible_ways_to_resize(settings: api.ResizeSettings, why: str) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    with Refusal("LG-TOOL-005", why):
        resize.resize(file, settings)


def other_types() -> dict[str, torch.Tensor]:
    """Return a LoHa, a LoKr and a full module, each on a convolution or a linear layer."""
    rng = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    conv, linear = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in"
    return {
        f"{conv}.hada_w1_a": drawn(8, 2),
        f"{conv}.hada_w1_b": drawn(2, 4 * 9),
        f"{conv}.hada_w2_a": drawn(8, 2),
        f"{conv}.hada_w2_b": drawn(2, 4 * 9),
        f"{conv}.alpha": torch.tensor(1.0),
        f"{linear}.lokr_w1": drawn(2, 3),
        f"{linear}.lokr_w2_a": drawn(5, 2),
        f"{linear}.lokr_w2_b": drawn(2, 4),
        f"{linear}.alpha": torch.tensor(4.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.diff": drawn(6, 5),
    }


def test_other_types_are_resized_as_what_they_change() -> None:
    t = other_types()
    file = lora_file.parse(t)
    new, _ = resize.resize(file, api.ResizeSettings(8))
    conv, linear, full = file.modules
    kron = torch.kron(t[f"{linear}.lokr_w1"], t[f"{linear}.lokr_w2_a"] @ t[f"{linear}.lokr_w2_b"]) * 2
    hada = (t[f"{conv}.hada_w1_a"] @ t[f"{conv}.hada_w1_b"]) * (
        t[f"{conv}.hada_w2_a"] @ t[f"{conv}.hada_w2_b"]
    )
    assert new.modules[conv].shape() == (8, 4, 3, 3)
    for name, wanted in ((conv, hada / 2), (linear, kron), (full, t[f"{full}.diff"])):
        assert error(change(new.modules[name]), wanted) < 1e-5, name


@pytest.mark.parametrize("naming", api.NAMINGS)
def test_every_naming_is_resized(naming: str) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    from loragraft.trainer.tools.convert import convert_naming, to_common

    named = convert_naming(file, naming)
    new, _ = resize.resize(named, api.ResizeSettings(8))
    wanted, _ = resize.resize(file, api.ResizeSettings(8))
    for name, module in to_common(new).modules.items():
        assert error(change(module), change(wanted.modules[name])) < 1e-5
