"""LoRA files: what is none, and what a check says of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.tools import lora_file, places, resize, stream
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import change, tiny_lora

# ---- what is no LoRA ----


def test_files_that_are_no_loras(tmp_path: Path) -> None:
    with Refusal("LG-TOOL-001", "first_stage"):
        lora_file.parse({"first_stage_model.x": torch.ones(2, 2)})
    with Refusal("LG-TOOL-001", "no tensors"):
        lora_file.parse({})
    with Refusal("LG-TOOL-002", "lora_unet_a"):
        lora_file.parse({"lora_unet_a.lora_down.weight": torch.ones(2, 3)})
    with Refusal("LG-TOOL-002", "lora_unet_a"):
        lora_file.parse(
            {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 4)}
        )
    dora = {
        "lora_unet_a.lora_down.weight": torch.ones(2, 3),
        "lora_unet_a.lora_up.weight": torch.ones(4, 2),
        "lora_unet_a.dora_scale": torch.ones(4, 1),
    }
    with Refusal("LG-TOOL-003", "DoRA"):
        resize.resize(lora_file.parse(dora), api.ResizeSettings(1))


def test_alphas_that_diffusers_declares_count() -> None:
    tensors = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 3),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(4, 2),
    }
    told = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 6}}
    (module,) = lora_file.parse(tensors, {"lora_adapter_metadata": json.dumps(told)}).modules.values()
    assert module.scale == 3
    (module,) = lora_file.parse(tensors, {"lora_adapter_metadata": "{"}).modules.values()
    assert module.scale == 1


# ---- check ----


def test_what_a_check_says(base: api.Base, tmp_path: Path) -> None:
    path = tiny_lora(base, tmp_path)
    found = api.check_lora(path)
    assert found.good and found.zero == () and found.expected_zero == 0
    first = found.rows[0]
    tensor = load_file(path)[first.key]
    assert first.mean == pytest.approx(float(tensor.abs().mean()))
    assert first.minimum == float(tensor.abs().min()) and first.norm == pytest.approx(float(tensor.norm()))
    file = lora_file.read_lora(path)
    for name, norm in found.changes.items():
        assert norm == pytest.approx(float(change(file.modules[name]).norm()), rel=1e-4)

    tensors = load_file(path)
    last = [k for k in tensors if "encoder_layers_1_" in k and k.endswith("lora_up.weight")]
    untouched = {k: torch.zeros_like(v) if k in last else v for k, v in tensors.items()}
    save_file(untouched, path)
    assert len(last) == 6
    found = api.check_lora(path, clip_skip=2)
    assert found.good and found.zero == tuple(last) and "clip_skip 2" in found.remarks[1]
    assert not api.check_lora(path, clip_skip=1).good
    assert api.check_lora(path).expected_zero is None

    save_file({k: v * float("nan") if k == last[0] else v for k, v in tensors.items()}, path)
    found = api.check_lora(path, clip_skip=1)
    assert not found.good and found.not_finite == (last[0],)
    save_file({k: v * (0 if "lora_up" in k else 1) for k, v in tensors.items()}, path)
    assert "never trained" in api.check_lora(path, clip_skip=1).remarks[1]


def test_a_tiny_checkpoint_is_told_from_others(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "x.safetensors")
    keys = stream.open_weights(path)
    shapes = {key: tuple(keys[key].shape) for key in keys}
    plain = places.trained_in(keys, shapes, convolutions=False)
    more = places.trained_in(keys, shapes, convolutions=True)
    assert set(plain) < set(more)
    assert not any("_resnets_" in name or "samplers" in name for name in plain)
