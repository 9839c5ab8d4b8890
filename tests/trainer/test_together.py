"""Runs side by side: each has the gradients, losses, files and ends that it has alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api, loop
from loragraft.trainer.engine.steps import Fused
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

VARIED: list[dict[str, Any]] = [
    {"learning_rate": 1e-3},
    {"learning_rate": 3e-3, "network_dim": 6, "network_alpha": 6.0},
    {"learning_rate": 1e-3, "network_train_unet_only": False, "conv_dim": 2, "min_snr_gamma": 5.0},
]


def together(training: runs.Training, jobs: list[dict[str, Any]], **common: Any) -> Any:
    """Return the generator of (job, event); the jobs are named by their place."""
    pairs = [
        (training.train_set, runs.settings(**{"output_name": f"run{n}", **common, **job}))
        for n, job in enumerate(jobs)
    ]
    return api.train_together(training.base, pairs, places=training.places, device="cpu")


def alone(training: runs.Training, jobs: list[dict[str, Any]], **common: Any) -> list[api.Finished]:
    """Train the same jobs one after the other, elsewhere."""
    return [
        training.elsewhere(f"alone{n}").finish(**{"output_name": f"run{n}", **common, **job})
        for n, job in enumerate(jobs)
    ]


def finished(events: Any) -> dict[int, api.Finished]:
    return {n: event for n, event in events if isinstance(event, api.Finished)}


def weights(file: Path) -> torch.Tensor:
    """Return all trained tensors of a LoRA file in one vector."""
    tensors = api.lora_tensors(file)
    return torch.cat([tensors[k].float().flatten() for k in sorted(tensors) if not k.endswith("alpha")])


@pytest.mark.parametrize("engine", ["fused", pytest.param("eager", marks=pytest.mark.slow)])
def test_each_run_learns_what_it_learns_alone(training: runs.Training, engine: str) -> None:
    common = {"max_train_steps": 8, "engine": engine, "save_precision": "fp32"}
    many, single = finished(together(training, VARIED, **common)), alone(training, VARIED, **common)
    assert len({len(api.lora_tensors(f.lora_file)) for f in single}) > 1  # one has convolutions too
    for number, expected in enumerate(single):
        assert many[number].losses == pytest.approx(expected.losses, rel=1e-5)
        a, b = api.lora_tensors(many[number].lora_file), api.lora_tensors(expected.lora_file)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        difference = weights(many[number].lora_file) - weights(expected.lora_file)
        assert difference.norm() <= 1e-3 * weights(expected.lora_file).norm()
        assert many[number].trigger_words == expected.trigger_words
        assert many[number].run_folder.name == expected.run_folder.name


def test_the_gradients_of_a_step_are_those_of_the_run_alone(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []
    real = Fused.update

    def update(self: Fused, row: int, max_norm: float) -> torch.Tensor:
        values = [self.flat.gradient(p).flatten() for p in runs.trained(self.optimizers[row].optimizer)]
        seen.append((len(self.optimizers), row, torch.cat(values)))
        return real(self, row, max_norm)

    monkeypatch.setattr(Fused, "update", update)
    common = {"max_train_steps": 1, "engine": "fused", "gradient_accumulation_steps": 2}
    finished(together(training, VARIED, **common))
    alone(training, VARIED, **common)
    many = {row: grads for count, row, grads in seen if count == 3}
    single = [grads for count, _, grads in seen if count == 1]
    assert len(single) == len(many) == 3
    for row, grads in enumerate(single):
        assert (many[row] - grads).norm() <= 1e-5 * grads.norm()


def test_one_pass_serves_all_runs_whose_batches_have_one_shape(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = Fused.backward

    def backward(self: Fused, micros: Any) -> Any:
        assert len({m.shape for m in micros}) == 1
        passes.append(len(micros))
        return real(self, micros)

    monkeypatch.setattr(Fused, "backward", backward)
    rates = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    finished(together(training, rates, max_train_steps=5))
    assert passes == [4] * 5
    passes.clear()
    other_seeds = [{"seed": seed} for seed in (1, 2, 3)]
    finished(together(training, other_seeds, max_train_steps=8))
    assert sum(passes) == 24 and max(passes) > 1


@pytest.mark.slow
def test_other_data_sets_and_batch_sizes_go_side_by_side(training: runs.Training, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "3_other", [(32, 32), (48, 16)])
    other = runs.train_set(tmp_path)
    pairs = [
        (training.train_set, runs.settings(output_name="a")),
        (other, runs.settings(output_name="b", train_batch_size=1, max_train_steps=6)),
        (other, runs.settings(output_name="c", clip_skip=2, max_train_steps=2)),
    ]
    events = api.train_together(training.base, pairs, places=training.places, device="cpu")
    many = finished(events)
    for number, (train_set, config) in enumerate(pairs):
        places = training.elsewhere(f"alone{number}").places
        *_, last = api.train(training.base, train_set, config, places=places, device="cpu")
        assert isinstance(last, api.Finished)
        assert many[number].losses == pytest.approx(last.losses, rel=1e-5)


def test_a_run_that_fails_ends_alone(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.train_step

    def step(run: Any) -> Any:
        result = yield from real(run)
        if run.step == 2 and run.config.output_name == "run1":
            with torch.no_grad():
                run.parameters[-1].fill_(float("nan"))
        return result

    monkeypatch.setattr(loop, "train_step", step)
    events = list(together(training, VARIED, max_train_steps=5, engine="fused"))
    (failed,) = [(n, e.error) for n, e in events if isinstance(e, api.Failed)]
    assert failed[0] == 1 and failed[1].code == "LG-RUN-004"
    assert set(finished(iter(events))) == {0, 2}
    expected = training.elsewhere("alone").finish(
        output_name="run0", max_train_steps=5, engine="fused", **VARIED[0]
    )
    assert finished(iter(events))[0].losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.slow
def test_a_stop_saves_all_runs_and_the_same_jobs_continue(training: runs.Training) -> None:
    common = {"max_train_steps": 6, "engine": "fused"}
    straight = finished(together(training.elsewhere("straight"), VARIED, **common))
    with closing(together(training, VARIED, **common)) as events:
        for _, event in events:
            if isinstance(event, api.Step) and event.step == 3:
                break
    steps = {f.name.split("-")[0]: runs.newest(f).name for f in training.places.runs.iterdir()}
    assert set(steps.values()) == {"step-000003"}
    continued = finished(together(training, VARIED, **common))
    for number, expected in straight.items():
        assert continued[number].lora_file.read_bytes() == expected.lora_file.read_bytes()
    again = finished(together(training, VARIED, **common))
    assert all(again[n].reused for n in straight)


def test_a_run_begun_alone_goes_on_beside_others(training: runs.Training) -> None:
    common = {"max_train_steps": 6, "engine": "fused"}
    training.stop_after(2, output_name="run0", **common, **VARIED[0])
    many = finished(together(training, VARIED, **common))
    expected = alone(training, VARIED[:1], **common)[0]
    assert many[0].losses == pytest.approx(expected.losses, rel=1e-5)
    assert training.finish(output_name="run0", **common, **VARIED[0]).reused


def test_samples_and_validation_see_the_run_they_belong_to(training: runs.Training) -> None:
    jobs = [{"learning_rate": 1e-6}, {"learning_rate": 1e-1}]
    common = {"max_train_steps": 3, "sample_prompts": ("zibu",), "engine": "fused"}
    drawn = {
        (n, e.step): e.image.tobytes()
        for n, e in together(training, jobs, **common)
        if isinstance(e, api.Sampled)
    }
    for number, job in enumerate(jobs):
        events = training.elsewhere(f"alone{number}").events(output_name=f"run{number}", **common, **job)
        (sample,) = runs.of(events, api.Sampled)
        theirs = torch.frombuffer(bytearray(drawn[number, 3]), dtype=torch.uint8).float()
        ours = torch.frombuffer(bytearray(sample.image.tobytes()), dtype=torch.uint8).float()
        assert (theirs - ours).abs().max() <= 1
    assert drawn[0, 3] != drawn[1, 3]


@pytest.mark.parametrize(
    ("second", "code", "named"),
    [
        ({"mixed_precision": "bf16"}, "LG-RUN-010", "mixed_precision"),
        ({"engine": "eager"}, "LG-RUN-010", "engine"),
        ({"output_name": "run0"}, "LG-RUN-011", "run0"),
    ],
)
def test_what_cannot_go_side_by_side_is_refused(
    training: runs.Training, second: dict[str, Any], code: str, named: str
) -> None:
    with Refusal(code, named):
        list(together(training, [{}, second]))


@pytest.mark.parametrize(("first", "second"), [("eager", "fused"), ("fused", "eager")])
def test_a_run_continues_on_another_engine(training: runs.Training, first: str, second: str) -> None:
    expected = training.elsewhere("straight").finish(max_train_steps=8, engine="eager")
    training.stop_after(4, max_train_steps=8, engine=first)
    continued = training.finish(max_train_steps=8, engine=second)
    assert continued.losses == pytest.approx(expected.losses, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"conv_dim": 3, "conv_alpha": 1.0}, marks=pytest.mark.slow),
        pytest.param(
            {"network_train_unet_only": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
        {"clip_skip": 2, "optimizer_args": ("weight_decay=0.1",)},
    ],
    ids=["text encoder and U-Net", "convolutions", "U-Net, accumulated", "clip skip"],
)
def test_fifty_fused_steps_are_fifty_eager_ones(training: runs.Training, settings: dict[str, Any]) -> None:
    common = {"max_train_steps": 50, "train_batch_size": 1, **settings}
    eager = training.elsewhere("eager").finish(engine="eager", **common)
    fused = training.elsewhere("fused").finish(engine="fused", **common)
    assert fused.losses == pytest.approx(eager.losses, rel=1e-4)
    assert eager.losses[-1] != eager.losses[0]
