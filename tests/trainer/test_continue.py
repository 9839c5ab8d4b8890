"""A run goes on with a new number of steps: from a run of equal settings, or from one that is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.checkpoint import INFO, LORA, STATE, _write_manifest
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

SHORT = {"lr_scheduler": "cosine", "max_train_steps": 4, "save_every_n_steps": 2}
LONG = {**SHORT, "max_train_steps": 7}


def rates(events: list[api.Event]) -> list[float]:
    return [e.learning_rates["denoiser"] for e in runs.of(events, api.Step)]


def test_it_goes_on_where_the_shorter_one_ended(training: runs.Training) -> None:
    """Weights, optimizer, data and losses are the first run's; the schedule counts with the new number."""
    straight = training.elsewhere("straight").events(**LONG)
    first = training.events(**SHORT)
    before = runs.tree(runs.only(first, api.Finished).run_folder / "ckpt")
    events = training.events(**LONG, resume="auto")
    planned, finished = runs.only(events, api.Planned), runs.only(events, api.Finished)
    assert planned.first_step == 4
    assert any("continues run" in line and "step 4" in line for line in planned.lines)
    assert rates(events) == rates(straight)[4:], "the longer schedule, from its fifth step on"
    assert list(finished.losses[:4]) == pytest.approx(runs.losses(first), rel=1e-7)
    assert runs.losses(events)[0] != runs.losses(straight)[4], "on other weights than a straight run's"
    assert finished.run_folder != runs.only(first, api.Finished).run_folder
    assert runs.tree(runs.only(first, api.Finished).run_folder / "ckpt") == before
    metadata = api.lora_metadata(finished.lora_file)
    assert metadata["loragraft_continues"].endswith("from step 4")
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "7"
    assert {p.name for p in training.places.loras.glob("*.safetensors")} == {
        "x.safetensors",
        "x_2.safetensors",
    }


def test_asked_again_it_is_found_again_and_a_stop_changes_nothing(training: runs.Training) -> None:
    training.finish(**SHORT)
    straight = training.elsewhere("straight")
    shutil.copytree(training.places.runs, straight.places.runs)
    shutil.copytree(training.places.loras, straight.places.loras)
    expected = straight.finish(**LONG, resume="auto")
    for step in (5, 6):
        training.stop_after(step, **LONG, resume="auto")
    finished = training.finish(**LONG, resume="auto")
    assert finished.lora_file.read_bytes() == expected.lora_file.read_bytes()
    assert finished.losses == expected.losses
    again = training.finish(**LONG, resume="auto")
    assert again.reused and again.run_folder == finished.run_folder
    shutil.rmtree(next(f for f in training.places.runs.iterdir() if f != finished.run_folder))
    assert training.finish(**LONG, resume="auto").reused, "also where the first one was deleted"
    longer = training.events(**{**LONG, "max_train_steps": 9}, resume="auto")
    assert runs.only(longer, api.Planned).first_step == 7, "and it can itself go on"


@pytest.mark.slow
def test_it_takes_the_longest_one_that_is_shorter(training: runs.Training) -> None:
    for steps in (2, 5, 9):
        training.finish(**{**SHORT, "max_train_steps": steps})
    events = training.events(**LONG, resume="auto")
    assert runs.only(events, api.Planned).first_step == 5


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"seed": 1}, {"network_dim": 2}, {"learning_rate": 1e-4}])
def test_runs_of_other_settings_are_left(training: runs.Training, other: dict[str, Any]) -> None:
    training.finish(**{**SHORT, **other})
    events = training.events(**LONG, resume="auto")
    planned = runs.only(events, api.Planned)
    assert planned.first_step == 0
    assert any("no earlier run" in line for line in planned.lines)


@pytest.mark.slow
def test_without_being_asked_it_starts_afresh_and_says_that_it_could(training: runs.Training) -> None:
    straight = training.elsewhere("straight").finish(**LONG)
    training.finish(**SHORT)
    events = training.events(**LONG)
    planned, finished = runs.only(events, api.Planned), runs.only(events, api.Finished)
    assert planned.first_step == 0
    (hint,) = [line for line in planned.lines if "resume: auto" in line]
    assert "4 steps" in hint
    ours, theirs = api.lora_tensors(finished.lora_file), api.lora_tensors(straight.lora_file)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_schedule_that_does_not_ask_for_the_end_goes_on_by_itself(training: runs.Training) -> None:
    training.finish(lr_scheduler="constant", max_train_steps=3)
    events = training.events(lr_scheduler="constant", max_train_steps=5, resume="auto")
    assert runs.only(events, api.Planned).first_step == 3
    assert len(list(training.places.runs.iterdir())) == 1


def test_a_run_or_one_save_of_it_can_be_named(training: runs.Training) -> None:
    """Other settings may differ as long as the tensors and the batches fit."""
    folder = training.finish(**SHORT).run_folder
    events = training.events(**LONG, learning_rate=1e-4, resume=folder.name)
    assert runs.only(events, api.Planned).first_step == 4
    assert rates(events)[0] < 1e-4
    at_two = training.events(**LONG, output_name="y", resume=f"{folder.name}/ckpt/step-000002")
    assert runs.only(at_two, api.Planned).first_step == 2
    other = runs.only(at_two, api.Finished).run_folder
    assert other != runs.only(events, api.Finished).run_folder


@pytest.mark.slow
def test_its_measures_come_along_but_its_saves_are_not_the_best_here(
    training: runs.Training, tmp_path: Path
) -> None:
    tiny.write_images(tmp_path / "i" / "1_zibu", [(32, 32)] * 6)
    here = training.elsewhere("here", train_set=runs.train_set(tmp_path / "i", validation_split=0.34))
    first = here.finish(**SHORT)
    finished = here.finish(**LONG, resume="auto")
    assert finished.validations[:2] == first.validations
    assert finished.best_step in (6, 7)


@pytest.mark.parametrize(
    "text",
    ["../x", "/etc", "~", "C:\\x", "$HOME", "nothing-here", "a/../../b", "\\\\host\\share", "con", "x\ny"],
)
def test_no_path_leaves_the_runs_folder(training: runs.Training, text: str) -> None:
    training.places.runs.mkdir(parents=True)
    before = runs.tree(training.places.runs.parent)
    with pytest.raises(api.LoraGraftError) as caught:
        training.events(**LONG, resume=text)
    assert caught.value.code in ("LG-PATH-002", "LG-PATH-003")
    assert runs.tree(training.places.runs.parent) == before


def test_a_link_out_of_the_runs_folder_is_refused(training: runs.Training, tmp_path: Path) -> None:
    folder = training.elsewhere("outside").finish(**SHORT).run_folder
    training.places.runs.mkdir(parents=True)
    (training.places.runs / "link").symlink_to(folder, target_is_directory=True)
    with Refusal("LG-PATH-002", "link"):
        training.events(**LONG, resume="link")


def forged(folder: Path, change: Any) -> None:
    """Rewrite every state.json of a run and its manifest."""
    for checkpoint in (folder / "ckpt").iterdir():
        info = json.loads((checkpoint / INFO).read_text("utf-8"))
        change(info)
        (checkpoint / INFO).write_text(json.dumps(info), encoding="utf-8")
        _write_manifest(checkpoint, [n for n in (LORA, STATE, INFO) if (checkpoint / n).exists()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.update(base="0" * 64), "another base"),
        *(
            pytest.param(change, said, marks=pytest.mark.slow)
            for change, said in (
                (lambda info: info.update(plan=[5, 1, 4]), "other batches"),
                (lambda info: info.update(plan="x"), "other batches"),
                (lambda info: info.update(measures=[[1]]), "does not fit"),
                (lambda info: info.update(measures={"a": 1}), "does not fit"),
                (lambda info: info.update(rolled_back=7), "does not fit"),
            )
        ),
        (lambda info: info.pop("plan"), "other batches"),
        (lambda info: info.update(rolled_back=["x", "y"]), "does not fit"),
    ],
)
def test_a_state_of_any_content_is_refused(training: runs.Training, change: Any, said: str) -> None:
    folder = training.finish(**SHORT).run_folder
    forged(folder, change)
    with Refusal("LG-RUN-007", said):
        training.events(**LONG, resume=folder.name)


@pytest.mark.slow
def test_states_of_any_content_do_not_disturb_the_search(training: runs.Training) -> None:
    folder = training.finish(**SHORT).run_folder
    for name, content in (("a", "{"), ("b", "[]"), ("c", "[" * 100_000), ("d", '{"kin": 1}'), ("e", "")):
        odd = training.places.runs / name / "ckpt" / "step-000003"
        odd.mkdir(parents=True)
        (odd / STATE).write_bytes(b"")
        (odd / INFO).write_text(content, encoding="utf-8")
    (training.places.runs / "f" / "ckpt" / "step-x").mkdir(parents=True)
    copy = shutil.copytree(folder, training.places.runs / "copy")
    (copy / "ckpt" / "step-000004" / STATE).write_bytes(b"damaged")
    events = training.events(**LONG, resume="auto")
    assert runs.only(events, api.Planned).first_step == 4


@pytest.mark.slow
def test_a_damaged_or_finished_run_cannot_be_named(training: runs.Training) -> None:
    folder = training.finish(**SHORT).run_folder
    with Refusal("LG-CFG-004", "step 4", "max_train_steps"):
        training.events(**SHORT, seed=1, resume=folder.name)
    for state in folder.rglob(STATE):
        state.write_bytes(b"damaged")
    with Refusal("LG-RUN-007", "no whole checkpoint"):
        training.events(**LONG, resume=folder.name)


def test_a_network_of_another_shape_does_not_fit(training: runs.Training) -> None:
    folder = training.finish(**SHORT).run_folder
    with Refusal("LG-RUN-007", "does not fit"):
        training.events(**LONG, network_dim=2, resume=folder.name)
    assert not (training.places.loras / "x_2.safetensors").exists()


def test_it_goes_back_to_the_run_it_came_from(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A divergence before the first save of its own."""
    from loragraft.trainer import rollback

    training.finish(**SHORT)
    calls = iter(range(100))
    monkeypatch.setattr(rollback, "explodes", lambda losses: next(calls) == 1)
    events = training.events(**{**LONG, "save_every_n_steps": None}, resume="auto")
    assert [e.step for e in runs.of(events, api.Step)] == [5, 6, 5, 6, 7]
