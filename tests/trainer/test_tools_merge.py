"""LoRAs merged into one, against the reference's own results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.tools import merge
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import as_file, change, error, golden_tensors


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    """Return the reference's tensors by what they are of."""
    return golden_tensors()


def test_adding_factors_equals_the_reference(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_b"])]
    new = merge.merge_loras(files, [0.7, -0.4], api.MergeSettings("add")).tensors()
    assert set(new) == set(golden["added"])
    for name, tensor in golden["added"].items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-6, atol=1e-7)


def test_concat_is_exact_and_has_the_references_ranks(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_c"])]
    new = merge.merge_loras(files, [0.7, -0.4], api.MergeSettings("concat"))
    theirs = as_file(golden["concat"])
    for name, module in new.modules.items():
        wanted = 0.7 * change(files[0].modules[name]) - 0.4 * change(files[1].modules[name])
        assert error(change(module), wanted) < 1e-6
        assert module.rank == theirs.modules[name].rank == 10


def test_svd_is_not_worse_than_the_reference(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_c"])]
    exact = merge.merge_loras(files, [0.7, 0.4], api.MergeSettings("concat"))
    new = merge.merge_loras(files, [0.7, 0.4], api.MergeSettings("svd", 5, 5))
    theirs = as_file(golden["svd"])
    for name, module in new.modules.items():
        wanted = change(exact.modules[name])
        mine, reference = (error(change(m), wanted) for m in (module, theirs.modules[name]))
        assert module.rank == theirs.modules[name].rank == 5
        assert mine <= reference + 1e-6
        # the reference cuts large values off as well, which the result is better without


def test_the_merged_file_tells_its_sources(golden: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "c.safetensors"]
    for path, name in zip(paths, ("lora_a", "lora_c"), strict=True):
        save_file(golden[name], path, {"ss_v2": "False", "ss_base_model_version": "sd_v1"})
    target = tmp_path / "m.safetensors"
    api.merge_lora(paths, [1, 0.5], api.Output(target), api.MergeSettings())
    told = read_metadata(target)
    assert told["ss_network_dim"] == "10" and told["ss_base_model_version"] == "sd_v1"
    assert told["ss_network_module"] == "networks.lora"
    assert json.loads(told["loragraft_merged"])["ratios"] == [1, 0.5]
    assert told["modelspec.merged_from"] == "a, c"


def test_loras_that_do_not_belong_together(golden: dict[str, Any]) -> None:
    a, c = as_file(golden["lora_a"]), as_file(golden["lora_c"])
    with Refusal("LG-TOOL-009", "different ranks"):
        merge.merge_loras([a, c], [1, 1], api.MergeSettings("add"))
    with Refusal("LG-TOOL-009", "sd_v2"):
        merge.merge_loras(
            [
                as_file(golden["lora_a"], ss_base_model_version="sd_v1"),
                as_file(golden["lora_b"], ss_base_model_version="sd_v2"),
            ],
            [1, 1],
            api.MergeSettings(),
        )
    other = {
        k: torch.ones(7, 9) if k.endswith("fc1.lora_down.weight") else v for k, v in golden["lora_a"].items()
    }
    other = {k: torch.ones(40, 7) if k.endswith("fc1.lora_up.weight") else v for k, v in other.items()}
    with Refusal("LG-TOOL-009", "fc1"):
        merge.merge_loras([a, as_file(other)], [1, 1], api.MergeSettings())


@pytest.mark.parametrize(
    ("ratios", "settings", "why"),
    [
        ([1], api.MergeSettings(), "2 LoRAs and 1 ratios"),
        ([1, float("nan")], api.MergeSettings(), "no number"),
        ([1, 1], api.MergeSettings("sum"), "none of"),
        ([1, 1], api.MergeSettings("svd"), "needs a rank"),
        ([1, 1], api.MergeSettings("concat", 4), "takes no rank"),
    ],
)
def test_impossible_ways_to_merge(
    golden: dict[str, Any], ratios: list[float], settings: api.MergeSettings, why: str
) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_b"])]
    with Refusal("LG-TOOL-005", why):
        merge.merge_loras(files, ratios, settings)
