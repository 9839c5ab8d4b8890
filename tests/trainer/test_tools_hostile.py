"""LoRA files that were cut, edited by hand or made to do harm: every job refuses them by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.attach import ranks_in
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer.data_folders import Refusal

WHOLE = {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "alpha": ()}


@pytest.mark.parametrize(
    "shapes",
    [
        {"lora_down.weight": (0, 8), "lora_up.weight": (8, 0)},
        {"lora_up.weight": (0, 4)},
        {"alpha": (3,)},
        {"lora_mid.weight": (4, 4)},
        {"hada_w1_a": (8, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("job", ["check", "resize", "merge", "convert"])
def test_files_made_to_break_a_job(shapes: dict[str, tuple[int, ...]], job: str, tmp_path: Path) -> None:
    file, out = tmp_path / "odd.safetensors", api.Output(tmp_path / "new.safetensors")
    tensors = {f"lora_unet_mid_block_x.{name}": torch.ones(s) for name, s in (WHOLE | shapes).items()}
    save_file(tensors, file)
    jobs: dict[str, Callable[[], object]] = {
        "check": lambda: api.check_lora(file),
        "resize": lambda: api.resize_lora(file, out, api.ResizeSettings(2)),
        "merge": lambda: api.merge_lora([file, file], [1.0, 1.0], out, api.MergeSettings("svd", 2)),
        "convert": lambda: api.convert_lora(file, out, "comfyui"),
    }
    with pytest.raises(LoraGraftError) as caught:
        jobs[job]()
    assert caught.value.code in ("LG-TOOL-001", "LG-TOOL-002")
    assert not out.path.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down.weight": torch.full((4, 8), math.nan), "lora_up.weight": torch.ones(8, 4)},
        {
            "lora_down.weight": torch.ones(4, 8),
            "lora_up.weight": torch.ones(8, 4),
            "alpha": torch.tensor(math.nan),
        },
        {"hada_w1_a": torch.ones(8, 4)},
        {"lokr_w1": torch.ones(2, 2)},
        {"diff": torch.ones(8)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_values_and_shapes_that_nothing_can_take_apart(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file, out = tmp_path / "odd.safetensors", api.Output(tmp_path / "new.safetensors")
    save_file({f"lora_unet_mid_block_x.{name}": tensor for name, tensor in tensors.items()}, file)
    for job in (
        lambda: api.resize_lora(file, out, api.ResizeSettings(2)),
        lambda: api.merge_lora([file, file], [1.0, 1.0], out, api.MergeSettings("svd", 2)),
    ):
        with Refusal("LG-TOOL-002"):
            job()


def test_alphas_that_have_no_ratio(tmp_path: Path) -> None:
    file, out = tmp_path / "odd.safetensors", api.Output(tmp_path / "new.safetensors")
    whole = {f"lora_unet_mid_block_x.{name}": torch.zeros(s) for name, s in WHOLE.items()}
    save_file(whole, file)
    with Refusal("LG-TOOL-009", "alpha"):
        api.merge_lora([file, file], [1.0, 1.0], out, api.MergeSettings("add"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"alpha": torch.ones(3)},
        {"hada_w1_a": torch.ones(8, 4)},
        {"lora_up.weight": torch.ones(()), "lora_down.weight": torch.ones(())},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_ranks_are_not_taken_from_such_a_file(tensors: dict[str, torch.Tensor]) -> None:
    with Refusal("LG-SAVE-006", "lora_unet_x"):
        ranks_in({f"lora_unet_x.{name}": tensor for name, tensor in tensors.items()})
