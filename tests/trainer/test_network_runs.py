"""Every network through whole runs: trained, stopped and continued bit for bit, saved, begun from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.attach import attach
from loragraft.trainer.adapters.configured import network_args, network_module
from loragraft.trainer.adapters.files import read_metadata
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

NETWORKS: dict[str, dict[str, Any]] = {
    "dropout": {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
    "locon": {"algo": "locon", "conv_dim": 2, "use_tucker": True},
    "dora": {"dora_wd": True},
    "loha": {"algo": "loha", "rank_dropout": 0.3, "rank_dropout_scale": True},
    "lokr": {"algo": "lokr", "factor": 4, "module_dropout": 0.3, "preset": "full"},
    "dylora": {"algo": "dylora", "unit": 2, "gradient_accumulation_steps": 2},
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "oft", "constraint": 0.001},
    "boft": {"algo": "boft", "rescaled": True, "preset": "unet-transformer-only"},
    "glora": {"algo": "glora", "scale_weight_norms": None, "preset": "attn-only"},
    "full": {"algo": "full", "preset": "attn-mlp"},
    "norms": {"train_norm": True, "scale_weight_norms": 0.02, "conv_dim": 2},
    "lengths": {"scale_weight_norms": 0.02, "learning_rate": 1e-2},
    "blocks": {"block_dims": ",".join(["2", "0"] * 12 + ["1"]), "network_reg_dims": ["attn2_to_k$=3"]},
}


QUICK = ("dropout", "dylora", "lengths")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_stopped_run_ends_in_the_same_bytes(training: runs.Training, name: str) -> None:
    changes = {"max_train_steps": 2, **NETWORKS[name]}
    whole = training.finish(**changes)
    again = training.elsewhere("again")
    again.stop_after(1, **changes)
    parts = again.finish(**changes)
    assert parts.lora_file.read_bytes() == whole.lora_file.read_bytes()
    assert parts.losses == whole.losses
    tensors = load_file(whole.lora_file)
    base = training.base.load()
    targets = training.base.family.targets(base, convolutions=True, preset="full", norms=True)
    attached = attach(base, tensors, targets)
    assert {k.partition(".")[0] for k in tensors} == {m.target.key for m in attached.modules}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algo": "loha"}, "loha has no fused form"),
        ({"dora_wd": True}, "dora_wd has no fused form"),
        ({"train_norm": True}, "train_norm has no fused form"),
        ({"rank_dropout": 0.1}, "dropout has no fused form"),
    ],
)
def test_what_has_no_fused_form_runs_as_plain_modules_and_says_so(
    training: runs.Training, changes: dict[str, Any], reason: str
) -> None:
    events = training.events(max_train_steps=1, **changes)
    (line,) = [line for line in runs.only(events, api.Planned).lines if " steps (" in line]
    assert line.startswith("eager steps") and line.endswith(f": {reason})")
    with Refusal("LG-RUN-008", reason):
        training.events(max_train_steps=1, engine="fused", output_name="fused", **changes)
    plain = runs.only(training.events(max_train_steps=1, output_name="plain"), api.Planned)
    assert any(line.startswith("fused steps") for line in plain.lines)


@pytest.mark.slow
def test_networks_train_side_by_side_as_alone(training: runs.Training) -> None:
    every = [
        {"algo": "loha", "output_name": "a", "module_dropout": 0.3},
        {"algo": "lokr", "output_name": "b"},
        {"output_name": "c", "rank_dropout": 0.3},
    ]
    alone = [training.finish(max_train_steps=2, **each) for each in every]
    beside = training.elsewhere("beside")
    jobs = [(beside.train_set, runs.settings(max_train_steps=2, **each)) for each in every]
    events = list(api.train_together(beside.base, jobs, places=beside.places, device="cpu"))
    finished = {number: event for number, event in events if isinstance(event, api.Finished)}
    for number, own in enumerate(alone):
        assert finished[number].lora_file.read_bytes() == own.lora_file.read_bytes()


def test_a_run_does_not_change_its_engine_for_another(training: runs.Training) -> None:
    every = [{"output_name": "a"}, {"output_name": "b", "algo": "loha"}]
    jobs = [(training.train_set, runs.settings(max_train_steps=1, **each)) for each in every]
    with Refusal("LG-RUN-010", "Runs 1 and 2", "loha has no fused form", "engine to eager"):
        list(api.train_together(training.base, jobs, places=training.places, device="cpu"))
    jobs = [(training.train_set, runs.settings(max_train_steps=1, engine="eager", **each)) for each in every]
    events = list(api.train_together(training.base, jobs, places=training.places, device="cpu"))
    assert sum(isinstance(event, api.Finished) for _, event in events) == 2


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_updates_stay_as_short_as_asked(training: runs.Training, engine: str) -> None:
    changes = {
        "scale_weight_norms": 0.02,
        "learning_rate": 1e-2,
        "max_train_steps": 3,
        "save_precision": "fp32",
    }
    tensors = load_file(training.finish(engine=engine, **changes).lora_file)
    lengths = []
    for key in {k.partition(".")[0] for k in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        scale = float(tensors[f"{key}.alpha"]) / down.shape[0]
        lengths.append((scale * up.flatten(1) @ down.flatten(1)).norm().item())
    assert max(lengths) == pytest.approx(0.02, rel=1e-4)
    without = training.elsewhere("without")
    long = load_file(without.finish(**{**changes, "scale_weight_norms": None}).lora_file)
    assert any(not torch.equal(tensors[k], v) for k, v in long.items())


# ---- beginning from a file ----


def test_a_run_begins_from_a_file(training: runs.Training, tmp_path: Path) -> None:
    first = training.finish(max_train_steps=2, output_name="first", save_precision="fp32")
    second = training.events(
        max_train_steps=1, output_name="second", network_weights=str(first.lora_file), learning_rate=1e-12,
        save_precision="fp32", optimizer_args=["weight_decay=0"],
    )  # fmt: skip
    lines = runs.only(second, api.Planned).lines
    assert "starts from first.safetensors: 88 modules" in lines or any(
        line.startswith("starts from first.safetensors") for line in lines
    )
    before, after = load_file(first.lora_file), load_file(runs.only(second, api.Finished).lora_file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    settings = json.loads(read_metadata(runs.only(second, api.Finished).lora_file)["loragraft_settings"])
    assert settings["train"]["network_weights"] == "first.safetensors", "no folder of this machine"


def test_the_run_depends_on_what_the_file_holds_and_not_on_where_it_lies(
    training: runs.Training, tmp_path: Path
) -> None:
    first = training.finish(max_train_steps=1, output_name="first")
    copy, changed = tmp_path / "copy.safetensors", tmp_path / "changed.safetensors"
    tensors = load_file(first.lora_file)
    save_file(tensors, copy)
    save_file({k: v + 1e-2 for k, v in tensors.items()}, changed)
    common = {"max_train_steps": 1, "output_name": "second"}
    done = training.finish(network_weights=str(first.lora_file), **common)
    assert training.finish(network_weights=str(copy), **common).reused
    with Refusal("LG-CFG-004", "alpha"):
        training.finish(network_weights=str(changed), **common)
    save_file({k: v if k.endswith("alpha") else v + 1e-2 for k, v in tensors.items()}, changed)
    assert not training.finish(network_weights=str(changed), **common).reused
    assert done.step == 1


def test_ranks_come_from_the_file_where_asked(training: runs.Training) -> None:
    first = training.finish(
        max_train_steps=1, output_name="first", network_dim=3, network_alpha=1.5, conv_dim=2
    )
    common = {"max_train_steps": 1, "network_weights": str(first.lora_file), "output_name": "second"}
    with Refusal("LG-CFG-004", "rank 3, alpha 1.5", "dim_from_weights"):
        training.finish(**common)
    second = training.finish(dim_from_weights=True, **common)
    before, after = load_file(first.lora_file), load_file(second.lora_file)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.endswith("alpha"))
    assert any(not torch.equal(v, after[k]) for k, v in before.items())


def test_a_file_that_is_missing_or_no_lora_is_refused(training: runs.Training, tmp_path: Path) -> None:
    with Refusal("LG-SAVE-004", "none.safetensors"):
        training.finish(network_weights=str(tmp_path / "none.safetensors"))
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(2, 2)}, other)
    with Refusal("LG-SAVE-006", "model.diffusion_model.out.2.weight"):
        training.finish(network_weights=str(other))


# ---- what is written ----


@pytest.mark.parametrize(
    ("changes", "module", "arguments"),
    [
        ({}, "networks.lora", {}),
        ({"conv_dim": 2}, "networks.lora", {"conv_dim": 2, "conv_alpha": 1.0}),
        ({"algo": "dylora", "unit": 2}, "networks.dylora", {"algo": "dylora", "unit": 2}),
        ({"dora_wd": True}, "lycoris.kohya", {"dora_wd": True}),
        (
            {"algo": "lokr", "preset": "full", "factor": 4},
            "lycoris.kohya",
            {"algo": "lokr", "preset": "full", "factor": 4, "conv_dim": 4, "conv_alpha": 2.0},
        ),
    ],
)
def test_metadata_names_the_network(changes: dict[str, Any], module: str, arguments: dict[str, Any]) -> None:
    config = runs.settings(**changes)
    assert network_module(config) == module
    assert network_args(config) == arguments


def test_the_file_names_its_network(training: runs.Training) -> None:
    finished = training.finish(max_train_steps=1, algo="lokr", rank_dropout=0.1)
    texts = read_metadata(finished.lora_file)
    assert texts["ss_network_module"] == "lycoris.kohya"
    assert json.loads(texts["ss_network_args"]) == {"algo": "lokr", "rank_dropout": 0.1}
