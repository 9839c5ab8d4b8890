"""Saves on the way: when, under which names, how many stay, and what is drawn beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer import api, milestones
from loragraft.trainer.plan import Plan, save_every_epochs
from loragraft.trainer.saving import Kept, names_of
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

PLAN = Plan(4, 1, 24)  # six epochs of four steps


def saved(events: list[api.Event]) -> list[int]:
    return [e.step for e in runs.of(events, api.Saved)]


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "ckpt").iterdir())


# ---- when, and under which names ----


@pytest.mark.parametrize(
    ("epochs", "ratio", "expected"), [(10, 3, 3), (10, 10, 1), (10, 20, 1), (6, 1, 6), (7, 2, 3)]
)
def test_a_ratio_is_the_references(epochs: int, ratio: int, expected: int) -> None:
    """Its trainer saves every floor(epochs / n) epochs, at least every one."""
    config = runs.settings(save_n_epoch_ratio=ratio)
    assert save_every_epochs(config, Plan(4, 1, 4 * epochs)) == expected


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({"save_every_n_epochs": 2}, 8, ["x-000002"]),
        ({"save_every_n_epochs": 2}, 16, ["x-000004"]),
        ({"save_every_n_epochs": 2}, 24, []),  # the last one has no number
        ({"save_every_n_epochs": 2}, 9, []),
        ({"save_every_n_steps": 5}, 5, ["x-step00000005"]),
        ({"save_every_n_steps": 4, "save_every_n_epochs": 1}, 4, ["x-000001", "x-step00000004"]),
        ({"save_n_epoch_ratio": 3}, 8, ["x-000002"]),
    ],
)
def test_names_are_the_references(options: dict[str, Any], step: int, expected: list[str]) -> None:
    config = runs.settings(publish_checkpoints=True, **options)
    assert names_of("x", step, config, PLAN) == expected
    assert names_of("x", step, runs.settings(**options), PLAN) == []


def test_saves_lie_in_the_loras_folder_where_that_is_asked_for(training: runs.Training) -> None:
    options = {"max_train_steps": 12, "save_every_n_epochs": 1, "save_every_n_steps": 5}
    events = training.events(**options, publish_checkpoints=True)
    assert saved(events) == [4, 5, 8, 10, 12]
    names = sorted(p.name for p in training.places.loras.glob("*.safetensors"))
    assert names == [
        "x-000001.safetensors",
        "x-000002.safetensors",
        "x-step00000005.safetensors",
        "x-step00000010.safetensors",
        "x.safetensors",
    ]
    folder = runs.run_folder(training.places)
    for name, step in (("x-000002", 8), ("x-step00000010", 10)):
        file = training.places.loras / f"{name}.safetensors"
        kept = folder / "ckpt" / f"step-{step:06d}" / "lora.safetensors"
        assert file.read_bytes() == kept.read_bytes()
        assert api.lora_metadata(file)["ss_steps"] == str(step)
    plain = training.elsewhere("plain").finish(**options)
    assert [p.name for p in plain.lora_file.parent.glob("*.safetensors")] == ["x.safetensors"]


def test_a_strangers_file_is_left_and_the_save_numbered(training: runs.Training) -> None:
    training.places.loras.mkdir(parents=True)
    theirs = training.places.loras / "x-000001.safetensors"
    theirs.write_bytes(b"mine")
    options = {"max_train_steps": 12, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    training.finish(**options, publish_checkpoints=True)
    assert theirs.read_bytes() == b"mine", "neither written over nor thinned out"
    names = sorted(p.name for p in training.places.loras.glob("*-*.safetensors"))
    assert names == ["x-000001.safetensors", "x-000002.safetensors"]


@pytest.mark.slow
def test_a_stopped_run_publishes_what_it_missed(training: runs.Training) -> None:
    options = {"max_train_steps": 12, "save_every_n_epochs": 1, "publish_checkpoints": True}
    straight = training.elsewhere("straight")
    straight.finish(**options)
    for step in (4, 8, 9):  # at the step of a save, before it is made
        training.stop_after(step, **options)
    training.finish(**options)
    assert runs.tree(training.places.loras) == runs.tree(straight.places.loras)


# ---- how many stay ----


def reference_epochs(every: int, last: int, epochs: int) -> list[int]:
    """What the reference trainer leaves: at each save it deletes the one every x last epochs before."""
    there: set[int] = set()
    for epoch in range(1, epochs):
        if epoch % every == 0:
            there.add(epoch)
            there.discard(epoch - every * last)
    return sorted(there)


def reference_steps(every: int, last: int, steps: int) -> list[int]:
    """The same for steps: the newest multiple of ``every`` that is more than ``last`` steps back."""
    there: set[int] = set()
    for step in range(every, steps + 1, every):
        there.add(step)
        back = step - last - 1
        there.discard(back - back % every)
    return sorted(there)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_last_epochs_that_stay_are_the_references(every: int, last: int) -> None:
    config = runs.settings(save_every_n_epochs=every, save_last_n_epochs=last)
    plan, epochs = Plan(4, 1, 4 * 13), 13
    rule = Kept(config, plan)
    ours = [e for e in range(every, epochs, every) if rule.by_rule(4 * e, plan.total_steps)]
    assert ours == reference_epochs(every, last, epochs)


@pytest.mark.parametrize(
    ("every", "last"), [(10, 30), (10, 25), (10, 10), (10, 5), (7, 20), (1, 3), (5, 100)]
)
def test_the_last_steps_that_stay_are_the_references(every: int, last: int) -> None:
    config = runs.settings(save_every_n_steps=every, save_last_n_steps=last)
    rule = Kept(config, Plan(4, 1, 1000))
    for now in range(every, 120, every):
        ours = [s for s in range(every, now + 1, every) if rule.by_rule(s, now)]
        assert ours == reference_steps(every, last, now)


def test_old_saves_go_from_both_folders(training: runs.Training) -> None:
    options = {"max_train_steps": 21, "save_every_n_epochs": 1, "save_last_n_epochs": 2}
    events = training.events(**options, publish_checkpoints=True)
    folder = runs.run_folder(training.places)
    assert saved(events) == [4, 8, 12, 16, 20, 21]
    assert steps_in(folder) == [16, 20, 21]
    names = sorted(p.name for p in training.places.loras.glob("*.safetensors"))
    assert names == ["x-000004.safetensors", "x-000005.safetensors", "x.safetensors"]
    assert [c.parent.name for c in runs.only(events, api.Finished).checkpoints] == [
        "step-000016",
        "step-000020",
        "step-000021",
    ]
    assert "the save of step 4 was dropped" in (folder / "log.log").read_text("utf-8")


@pytest.mark.slow
def test_the_best_save_stays(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    from loragraft.trainer.trends import Measure

    def measure(run: Any, saved: bool) -> Any:
        run.measures.append(Measure(run.step, abs(run.step - 4.5), 1.0, saved))
        return iter(())

    monkeypatch.setattr(milestones, "validate", measure)
    options = {"max_train_steps": 20, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    finished = training.finish(**options, publish_checkpoints=True)
    assert steps_in(finished.run_folder) == [4, 16, 20], "the best, the last numbered one, the end"
    assert finished.best_step == 4
    names = sorted(p.name for p in training.places.loras.glob("*-*.safetensors"))
    assert "x-000001.safetensors" in names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [5, 6], marks=pytest.mark.slow),
        ({"save_last_n_steps_state": 3}, [2, 3, 4, 5, 6]),
        pytest.param({"save_last_n_steps_state": 1}, [4, 5, 6], marks=pytest.mark.slow),
        ({"save_every_n_steps": 3, "save_every_n_epochs": 1, "save_last_n_epochs_state": 1}, [4, 6]),
    ],
)
def test_training_states_that_stay(
    training: runs.Training, options: dict[str, Any], expected: list[int]
) -> None:
    finished = training.finish(**{"max_train_steps": 6, "save_every_n_steps": 1, **options})
    found = sorted(int(p.parent.name[5:]) for p in finished.run_folder.rglob("train_state.safetensors"))
    assert found == expected


@pytest.mark.slow
def test_thinning_changes_no_product(training: runs.Training) -> None:
    options = {"max_train_steps": 10, "save_every_n_steps": 2}
    plain = training.elsewhere("plain").finish(**options)
    for step in (3, 6):
        training.stop_after(step, **options, save_last_n_steps=2)
    thin = training.finish(**options, save_last_n_steps=2)
    assert thin.lora_file.read_bytes() != b""
    ours, theirs = (api.lora_tensors(f.lora_file) for f in (thin, plain))
    assert all((value == theirs[key]).all() for key, value in ours.items())


# ---- samples ----


def test_prompts_have_a_size_a_seed_and_words_of_their_own(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loragraft.trainer import samples

    real, asked = samples.sample, []

    def sample(family: Any, parts: Any, prompts: list[str], **options: Any) -> Any:
        guided = options["guided"]
        asked.append({"prompts": prompts, "cfg": guided.cfg, "negative": guided.negative, **options})
        return real(family, parts, prompts, **options)

    monkeypatch.setattr(samples, "sample", sample)
    prompts = ["zibu", "blue zibu --w 64 --h 96 --d 7 --s 3 --l 2.5 --n ugly"]
    events = training.events(max_train_steps=1, sample_prompts=prompts, sample_steps=1, sample_cfg=4.0)
    plain, own = asked
    assert (plain["prompts"], plain["size"], plain["seeds"]) == (["zibu"], (32, 32), [42])
    assert (plain["steps"], plain["cfg"], plain["negative"]) == (1, 4.0, "")
    assert (own["prompts"], own["size"], own["seeds"]) == (["blue zibu"], (96, 64), [7])
    assert (own["steps"], own["cfg"], own["negative"]) == (3, 2.5, "ugly")
    drawn = runs.of(events, api.Sampled)
    assert [(s.prompt, s.seed, s.image.size) for s in drawn] == [
        ("zibu", 42, (32, 32)),
        ("blue zibu", 7, (64, 96)),
    ]


@pytest.mark.slow
def test_samples_before_the_first_step_show_the_base(training: runs.Training) -> None:
    options = {"sample_prompts": ["zibu"], "sample_steps": 1, "max_train_steps": 2}
    events = training.events(**options, sample_at_first=True)
    kinds = [type(e).__name__ for e in events]
    assert kinds.index("Sampled") < kinds.index("Step")
    first = runs.of(events, api.Sampled)[0]
    assert first.step == 0 and first.path.name == "step-000000-00.png"
    untouched = training.elsewhere("other").events(**options, sample_at_first=True, seed=43)
    other = runs.of(untouched, api.Sampled)[0].image
    assert not np.array_equal(np.asarray(other), np.asarray(first.image)), "another seed draws another image"
    same = training.elsewhere("rate").events(**options, sample_at_first=True, learning_rate=1e-2)
    image = runs.of(same, api.Sampled)[0].image
    assert np.array_equal(np.asarray(image), np.asarray(first.image)), "a new LoRA changes nothing yet"
    stopped = training.elsewhere("stopped")
    stopped.stop_after(1, **options, sample_at_first=True)
    rest = stopped.events(**options, sample_at_first=True)
    assert [s.step for s in runs.of(rest, api.Sampled)] == [2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sample_every_n_steps": 3, "sample_every_n_epochs": 1}, [3, 4, 6, 8]),
        *(
            pytest.param(options, expected, marks=pytest.mark.slow)
            for options, expected in (
                ({}, [8]),
                ({"save_every_n_steps": 3}, [3, 6, 8]),
                ({"sample_every_n_steps": 3}, [3, 6]),
                ({"sample_every_n_epochs": 1}, [4, 8]),
                ({"sample_every_n_epochs": 1, "save_every_n_steps": 3}, [4, 8]),
            )
        ),
    ],
)
def test_when_samples_are_drawn(
    training: runs.Training, options: dict[str, Any], expected: list[int]
) -> None:
    events = training.events(max_train_steps=8, sample_prompts=["zibu"], sample_steps=1, **options)
    assert [s.step for s in runs.of(events, api.Sampled)] == expected


def test_samples_that_a_stop_left_undrawn_are_those_of_a_straight_run(training: runs.Training) -> None:
    options = {
        "max_train_steps": 4,
        "sample_prompts": ["zibu", "blue"],
        "sample_steps": 1,
        "sample_every_n_steps": 1,
    }
    straight = training.elsewhere("straight").finish(**options)
    for step in (1, 2, 3):
        training.stop_after(step, **options)
    finished = training.finish(**options)
    assert runs.tree(finished.run_folder / "samples") == runs.tree(straight.run_folder / "samples")
    with Image.open(finished.run_folder / "samples" / "step-000002-01.png") as image:
        assert image.size == (32, 32)


@pytest.mark.slow
def test_drawing_changes_no_number(training: runs.Training) -> None:
    options = {"max_train_steps": 4, "save_every_n_steps": 2}
    plain = training.elsewhere("plain").finish(**options)
    drawn = training.finish(
        **options, sample_prompts=["a --d 3"], sample_steps=1, sample_at_first=True, sample_every_n_steps=1
    )
    assert drawn.losses == plain.losses


def test_a_stop_between_the_last_save_and_the_end_leaves_nothing_out(training: runs.Training) -> None:
    """The last step is on the disk, and yet the run is not at its end: its images are still to be drawn."""
    options = {"max_train_steps": 2, "sample_prompts": ["zibu"], "sample_steps": 1, "preview_image": True}
    straight = training.elsewhere("straight").finish(**options)
    events = training.start(**options)
    for event in events:
        if isinstance(event, api.Saved):
            events.close()
    finished = training.finish(**options)
    assert not finished.reused
    assert runs.tree(finished.lora_file.parent) == runs.tree(straight.lora_file.parent)
    assert runs.tree(finished.run_folder / "samples") == runs.tree(straight.run_folder / "samples")
    assert training.finish(**options).reused


# ---- what contradicts itself ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, "save_n_epoch_ratio"),
        ({"save_last_n_epochs": 1}, "save_every_n_epochs"),
        ({"save_last_n_steps": 1}, "save_every_n_steps"),
        ({"save_last_n_epochs_state": 1, "save_every_n_steps": 1}, "save_every_n_epochs"),
        ({"save_last_n_steps_state": 1, "save_every_n_epochs": 1}, "save_every_n_steps"),
        ({"publish_checkpoints": True}, "save_every_n_epochs"),
        ({"sample_at_first": True}, "sample_prompts"),
        ({"sample_every_n_steps": 1}, "sample_prompts"),
        ({"sample_every_n_epochs": 1}, "sample_prompts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with Refusal("LG-CFG-004", said):
        runs.settings(**options)


def test_tensorboard_is_refused_where_it_is_missing_and_left_out_where_that_is_asked(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from loragraft.trainer import runlog

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Refusal("LG-RUN-013", "tensorboard"):
        training.events(log_with="tensorboard")
    assert not training.places.runs.exists()
    asked: list[Path] = []
    monkeypatch.setattr(runlog, "_tensorboard", lambda folder, first: asked.append(folder))
    training.finish(max_train_steps=1, log_with="none")
    assert not asked
    training.finish(max_train_steps=1, seed=5)
    assert len(asked) == 1


def test_the_settings_file_of_a_run_holds_the_prompts_as_they_were_written(training: runs.Training) -> None:
    finished = training.finish(max_train_steps=1, sample_prompts=["a --d 3 --n b"], sample_steps=1)
    assert json.dumps("a --d 3 --n b") in (finished.run_folder / "run.toml").read_text("utf-8")
