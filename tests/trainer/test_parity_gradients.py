"""Losses, gradients and training curves are the reference trainer's, to the last digits of float64.

The stored numbers are those of kohya's own network modules, text encoding, noise and loss, see `parity`. Here
the same base runs through what a run is made of: settings, families, adapters, engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.checkpoint import RunFolder
from loragraft.trainer.data.batches import Batch
from loragraft.trainer.engine.precision import Precision
from loragraft.trainer.engine.steps import Fused, Micro
from loragraft.trainer.inputs import Fed, Inputs
from loragraft.trainer.opened import open_runs
from loragraft.trainer.plan import plan_run
from loragraft.trainer.run import Job, Run
from loragraft_tests.trainer import parity, runs
from loragraft_tests.trainer.parity import CURVES, GRADIENTS, Case

STEPS = 20
UNFUSED = ("network_dropout", "rank_dropout", "module_dropout")  # these need plain modules
FUSED = [name for name in GRADIENTS if not set(UNFUSED) & set(Case(name).stored["settings"])]
REPEATED = {  # slow: other cases have the same settings, one by one or with other values
    *("lora_unet_only", "lora_alpha_8", "locon", "clip_skip_2", "two_chunks", "debiased_min_snr", "v"),
    *("huber_constant", "smooth_l1_exponential", "smooth_l1_constant", "noise_offset", "multires_short"),
    *("ip_noise", "weighted_captions", "network_dropout", "module_dropout", "rank_dropout"),
}


def table(names: list[str], engine: str, quick: set[str]) -> list[Any]:
    """Return a parametrized test's cases; those that are not ``quick`` are slow."""
    marks = [() if name in quick else pytest.mark.slow for name in names]
    return [pytest.param(name, engine, marks=mark) for name, mark in zip(names, marks, strict=True)]


# Quick with the engine that runs take by themselves and in float64: there, nothing hides in rounding.
IN_FLOAT64 = table(GRADIENTS, "auto", set(GRADIENTS) - REPEATED) + table(FUSED, "eager", set())
IN_FLOAT32 = table(GRADIENTS, "auto", {"lora", "all_together"}) + table(FUSED, "eager", set())
TRAINED = table(CURVES, "auto", {"curve_lora"}) + table(["curve_nesterov"], "eager", set())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> api.Base:
    """Return the base with weights by formula."""
    path = parity.write_base(tmp_path_factory.mktemp("formula") / "base.safetensors")
    return parity.ready(api.open_base(path, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def double(single: api.Base) -> api.Base:
    """Return the same base, whose schedule and timesteps are made in float64."""
    return parity.ready(dataclasses.replace(single, family=parity.EXACT))


@pytest.fixture
def exact(double: api.Base) -> Iterator[api.Base]:
    """Compute in float64; returns the base that does."""
    with parity.in_float64():
        yield double


def opened(base: api.Base, train_set: api.TrainSet, folder: Path, case: Case, engine: str) -> Run:
    """Open a case's run, its adapter filled by formula."""
    config = runs.settings(**case.settings(engine=engine))
    where = Precision("fp32", torch.device("cpu"))
    job = Job(base, train_set, config, plan_run(train_set, config), where, "x", "", RunFolder(folder / "run"))
    (run,) = open_runs([job], folder / "cache", {})
    state = run.adapter.state_dict()
    run.adapter.load_state_dict({k: parity.adapter_weight(k, tuple(v.shape)) for k, v in state.items()})
    run.engine.reload(0)
    return run


def named(run: Run) -> dict[str, nn.Parameter]:
    """Return the trained tensors by their names in a LoRA file, in order."""
    found = {f"{m.target.key}.{name}": p for m in run.adapter.modules for name, p in m.tensors.items()}
    return dict(sorted(found.items()))


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Return the gradients that the engine holds; tensors that none has come to are left out."""
    if not isinstance(run.engine, Fused):
        return {k: p.grad for k, p in named(run).items() if p.grad is not None}
    flat = run.engine.flat
    reached = {id(p) for _, slot in flat.reached for p in flat.slots[slot].params}
    return {k: flat.gradient(p) for k, p in named(run).items() if id(p) in reached}


@pytest.mark.parametrize(("name", "engine"), IN_FLOAT64)
def test_gradients_in_float64(
    name: str, engine: str, exact: api.Base, train_set: api.TrainSet, tmp_path: Path
) -> None:
    case = Case(name)
    run = opened(exact, train_set, tmp_path, case, engine)
    with parity.reference_dropouts():
        (loss,) = run.engine.backward([Micro(0, case.fed(run.inputs), 1)])
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(case.stored["loss"], rel=1e-10)
    error, tensor = parity.worst(gradients(run), name)
    assert error < 1e-8, tensor


@pytest.mark.parametrize(("name", "engine"), IN_FLOAT32)
def test_gradients_in_float32(
    name: str, engine: str, single: api.Base, train_set: api.TrainSet, tmp_path: Path
) -> None:
    case = Case(name)
    run = opened(single, train_set, tmp_path, case, engine)
    with parity.reference_dropouts():
        (loss,) = run.engine.backward([Micro(0, case.fed(run.inputs), 1)])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case.stored["loss"], rel=1e-5)
    error, tensor = parity.worst(gradients(run), name)
    assert error < 1e-4, tensor


def train(
    base: api.Base, data: api.TrainSet, folder: Path, case: Case, engine: str, patch: pytest.MonkeyPatch
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train twenty steps from the formula's adapter; return the losses and how far each tensor went."""
    start = opened(base, data, folder, case, "eager").adapter.saved()
    save_file({k: v.to(torch.float32) for k, v in start.items()}, folder / "start.safetensors")

    def draw(inputs: Inputs, step: int, first_sample: int, batch: Batch) -> Fed:
        timesteps = (parity.fractions(f"t/{step}", (2,)) * 1000).long().tolist()
        return Fed.of(case.fed(inputs, f"{step}/", timesteps))

    patch.setattr(Inputs, "draw", draw)
    settings = case.settings(
        engine=engine,
        learning_rate=case.stored["lr"],
        lr_scheduler="constant",
        max_train_steps=STEPS,
        network_weights=str(folder / "start.safetensors"),
        save_precision="fp32",
    )
    training = runs.Training(base, data, api.Places(folder / "runs", folder / "loras", folder / "cache"))
    events = training.events(**{"optimizer_type": "torch.optim.SGD", **settings})
    end = load_file(runs.only(events, api.Finished).lora_file)
    return runs.losses(events), {k: end[k].double() - start[k] for k in sorted(end) if "alpha" not in k}


@pytest.mark.parametrize(("name", "engine"), TRAINED)
def test_curves(
    name: str,
    engine: str,
    single: api.Base,
    train_set: api.TrainSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(name)
    losses, moved = train(single, train_set, tmp_path, case, engine, monkeypatch)
    assert losses == pytest.approx(case.stored["losses"], rel=1e-4)
    error, tensor = parity.worst(moved, name, smallest=0.01)
    assert error < 1e-3, tensor
