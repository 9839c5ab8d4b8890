"""Which run is which: found again, continued, told apart, and published under its own name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft.trainer import api, metadata
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

# ---- the same run, another run ----


def test_a_finished_run_is_returned_at_once(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training.finish()
    before = runs.tree(training.places.runs), runs.tree(training.places.loras)
    monkeypatch.setattr(api.Base, "load", lambda self: pytest.fail("modules were loaded"))
    (event,) = training.events()
    assert isinstance(event, api.Finished)
    assert event == dataclasses.replace(first, reused=True)
    assert (runs.tree(training.places.runs), runs.tree(training.places.loras)) == before


def test_a_finished_run_whose_file_is_gone_writes_it_again(training: runs.Training) -> None:
    first = training.finish(preview_image=True)
    files = runs.tree(training.places.loras)
    shutil.rmtree(training.places.loras)
    again = training.finish(preview_image=True)
    assert again == dataclasses.replace(first, reused=True)
    assert runs.tree(training.places.loras) == files


def test_what_is_only_said_of_a_finished_run_can_be_changed_without_training(training: runs.Training) -> None:
    first = training.finish()
    again = training.finish(metadata_title="Zibu", metadata_trigger_phrase="zi bu", training_comment="new")
    assert again.reused and again.lora_file == first.lora_file
    metadata = api.lora_metadata(again.lora_file)
    assert metadata["modelspec.title"] == "Zibu"
    assert metadata["modelspec.trigger_phrase"] == again.trigger_words == "zi bu"
    assert metadata["ss_training_comment"] == "new"
    assert (training.places.loras / "x.txt").read_text("utf-8") == "zi bu\n"
    other = training.elsewhere("other").finish(
        metadata_title="Zibu", metadata_trigger_phrase="zi bu", training_comment="new"
    )
    assert other.lora_file.read_bytes() == again.lora_file.read_bytes()


@pytest.mark.parametrize("change", ["seed", "caption", "image", "repeats", "bucket", "new image", "concept"])
def test_whatever_enters_the_tensors_makes_another_run(
    training: runs.Training, images: Path, tmp_path: Path, change: str
) -> None:
    first = training.finish(max_train_steps=1)
    folder = shutil.copytree(images, tmp_path / "copy") / "2_zibu"
    settings: dict[str, Any] = {}
    if change == "caption":
        (folder / "image0.txt").write_text("zibu, another", encoding="utf-8")
    elif change == "image":
        tiny.write_images(folder, [(32, 32)], seed=5)
        (folder / "image0.txt").write_bytes((images / "2_zibu" / "image0.txt").read_bytes())
    elif change == "repeats":
        folder.rename(folder.with_name("3_zibu"))
    elif change == "concept":
        folder.rename(folder.with_name("2_zubi"))
    elif change == "bucket":
        settings = {"bucket_reso_steps": 16}
    elif change == "new image":
        Image.new("RGB", (32, 32)).save(folder / "new.png")
    seed = 1 if change == "seed" else 42
    other = dataclasses.replace(training, train_set=runs.train_set(tmp_path / "copy", **settings))
    second = other.finish(max_train_steps=1, seed=seed)
    assert not second.reused
    assert second.run_folder != first.run_folder
    assert second.lora_file.name == "x_2.safetensors"


def test_the_same_images_elsewhere_are_the_same_run(
    training: runs.Training, images: Path, tmp_path: Path
) -> None:
    training.finish(max_train_steps=1)
    moved = runs.train_set(shutil.copytree(images, tmp_path / "moved"))
    assert dataclasses.replace(training, train_set=moved).finish(max_train_steps=1).reused


def test_starting_afresh_trains_again_and_keeps_the_old_checkpoints(training: runs.Training) -> None:
    first = training.finish()
    checkpoints = runs.tree(first.run_folder / "ckpt")
    bytes_before = first.lora_file.read_bytes()
    events = list(training.start(fresh=True))
    again = runs.only(events, api.Finished)
    assert not again.reused and len(runs.losses(events)) == 4
    assert again.lora_file == first.lora_file, "its own file is written anew, not numbered"
    assert again.lora_file.read_bytes() == bytes_before
    assert runs.tree(first.run_folder / "ckpt-old") == checkpoints
    log = (first.run_folder / "log.jsonl").read_text("utf-8").splitlines()
    assert len(log) == 4


# ---- more and fewer steps ----


def test_more_steps_continue_where_the_schedule_allows_it(training: runs.Training) -> None:
    straight = training.elsewhere("straight").finish(lr_scheduler="constant", max_train_steps=7)
    training.finish(lr_scheduler="constant", max_train_steps=3)
    events = training.events(lr_scheduler="constant", max_train_steps=7)
    assert runs.only(events, api.Planned).first_step == 3
    longer = runs.only(events, api.Finished)
    assert longer.lora_file.name == "x.safetensors"
    assert longer.lora_file.read_bytes() == straight.lora_file.read_bytes()
    assert longer.losses == straight.losses


@pytest.mark.slow
def test_fewer_steps_than_were_trained_give_the_lora_of_that_step(training: runs.Training) -> None:
    options = {"lr_scheduler": "constant", "save_every_n_steps": 2}
    shorter = training.elsewhere("shorter").finish(max_train_steps=4, **options)
    training.finish(max_train_steps=8, **options)
    again = training.finish(max_train_steps=4, **options)
    assert again.step == 4
    assert again.lora_file.read_bytes() == shorter.lora_file.read_bytes()
    assert again.losses == shorter.losses
    assert [c.parent.name for c in again.checkpoints] == ["step-000002", "step-000004"]
    assert again.reused, "the LoRA of step 4 was there"
    odd = training.elsewhere("odd").finish(max_train_steps=3, **options)
    trained = training.finish(max_train_steps=3, **options)
    assert trained.step == 3
    assert trained.lora_file.read_bytes() == odd.lora_file.read_bytes()
    longest = training.finish(max_train_steps=8, **options)
    assert longest.step == 8 and longest.reused
    assert api.lora_metadata(longest.lora_file)["ss_steps"] == "8"


def test_another_number_of_steps_is_another_run_where_the_schedule_depends_on_it(
    training: runs.Training,
) -> None:
    first = training.finish(lr_scheduler="cosine", max_train_steps=2)
    second = training.finish(lr_scheduler="cosine", max_train_steps=3)
    assert second.run_folder != first.run_folder
    assert second.lora_file.name == "x_2.safetensors"


# ---- names ----


def test_a_name_of_another_run_is_numbered_and_found_again(training: runs.Training) -> None:
    files = [training.finish(seed=seed, max_train_steps=1).lora_file for seed in (1, 2, 3)]
    assert [f.name for f in files] == ["x.safetensors", "x_2.safetensors", "x_3.safetensors"]
    contents = [f.read_bytes() for f in files]
    assert len(set(contents)) == 3
    for seed, file in zip((1, 2, 3), files, strict=True):
        again = training.finish(seed=seed, max_train_steps=1)
        assert again.reused and again.lora_file == file
    assert [f.read_bytes() for f in files] == contents


def test_a_name_of_another_run_can_be_refused(training: runs.Training) -> None:
    training.finish(seed=1, max_train_steps=1)
    before = runs.tree(training.places.runs.parent)
    with Refusal("LG-SAVE-005", "'x'", "output_name"):
        training.events(seed=2, max_train_steps=1, name_taken="refuse")
    assert runs.tree(training.places.runs.parent) == before
    assert training.finish(seed=1, max_train_steps=1, name_taken="refuse").reused


@pytest.mark.parametrize("content", [b"", b"no LoRA at all", None])
def test_a_strangers_file_is_never_overwritten(training: runs.Training, content: bytes | None) -> None:
    from safetensors.torch import save_file

    training.places.loras.mkdir(parents=True)
    strange = training.places.loras / "x.safetensors"
    if content is None:
        save_file({"a": torch.ones(1)}, strange)
    else:
        strange.write_bytes(content)
    before = strange.read_bytes()
    assert training.finish(max_train_steps=1).lora_file.name == "x_2.safetensors"
    assert strange.read_bytes() == before


def test_a_name_taken_while_the_run_was_going_is_not_overwritten(training: runs.Training) -> None:
    events = training.start(max_train_steps=1)
    assert isinstance(next(events), api.Planned)
    other = training.finish(seed=9, max_train_steps=1)
    theirs = other.lora_file.read_bytes()
    ours = runs.only(list(events), api.Finished)
    assert other.lora_file.name == "x.safetensors"
    assert ours.lora_file.name == "x_2.safetensors"
    assert other.lora_file.read_bytes() == theirs


def test_notes_of_the_users_beside_the_file_are_not_overwritten(training: runs.Training) -> None:
    training.places.loras.mkdir(parents=True)
    for name in ("x.txt", "x.preview.png"):
        (training.places.loras / name).write_text("mine", encoding="utf-8")
        finished = training.finish(max_train_steps=1, preview_image=True)
        assert finished.lora_file.name == "x_2.safetensors"
        assert (training.places.loras / name).read_text("utf-8") == "mine"
        shutil.rmtree(training.places.loras)
        training.places.loras.mkdir()


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "..", "../x", "con", "a\nb", "x" * 121, ".x", "x ", "a:b"]
)
def test_a_name_that_is_no_file_name_writes_nothing(training: runs.Training, name: str) -> None:
    with Refusal("LG-PATH-001", "output_name"):
        training.events(output_name=name)
    assert not training.places.runs.exists() and not training.places.loras.exists()


def test_a_setting_at_its_default_is_no_part_of_a_run(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a setting which comes with a new version leaves runs that were begun before it as they are."""
    config = runs.settings()
    known = metadata.run_hash(training.base, training.train_set, config, None, "fp32")
    plain = metadata.as_dict
    monkeypatch.setattr(metadata, "as_dict", lambda config: {**plain(config), "brand_new": 0})
    assert metadata.run_hash(training.base, training.train_set, config, None, "fp32") == known
    monkeypatch.undo()
    other = runs.settings(noise_offset=0.1)
    assert metadata.run_hash(training.base, training.train_set, other, None, "fp32") != known
