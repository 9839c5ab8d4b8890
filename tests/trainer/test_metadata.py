"""What a LoRA file says of itself: all that others look for, and nothing of the machine it was made on."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from loragraft.trainer import api, metadata
from loragraft.trainer.adapters.files import tensor_hash
from loragraft.trainer.families import FAMILIES
from loragraft_tests.trainer import runs, tiny

WORKFLOW = json.dumps({"nodes": [{"id": 1, "type": "LoraGraftTrainLoRA"}], "extra": {"\u540d": "\U0001f600"}})

KOHYAS_KEYS = {
    "ss_base_model_version", "ss_batch_size_per_device", "ss_bucket_info", "ss_cache_latents", "ss_clip_skip",
    "ss_dataset_dirs", "ss_epoch", "ss_gradient_accumulation_steps", "ss_gradient_checkpointing",
    "ss_learning_rate", "ss_lr_scheduler", "ss_lr_warmup_steps", "ss_max_grad_norm", "ss_max_train_steps",
    "ss_min_snr_gamma", "ss_mixed_precision", "ss_network_alpha", "ss_network_dim", "ss_network_module",
    "ss_num_batches_per_epoch", "ss_num_epochs", "ss_num_reg_images", "ss_num_train_images", "ss_optimizer",
    "ss_output_name", "ss_resolution", "ss_seed", "ss_steps", "ss_tag_frequency", "ss_text_encoder_lr",
    "ss_total_batch_size", "ss_training_comment", "ss_unet_lr", "ss_v2", "sshs_model_hash",
}  # fmt: skip
MODELSPEC_KEYS = {
    "modelspec.architecture", "modelspec.encoder_layer", "modelspec.hash_sha256", "modelspec.implementation",
    "modelspec.prediction_type", "modelspec.resolution", "modelspec.sai_model_spec", "modelspec.title",
    "modelspec.trigger_phrase",
}  # fmt: skip


@pytest.fixture
def finished(base: api.Base, train_set: api.TrainSet, places: api.Places) -> api.Finished:
    """Return a run of three steps with most settings given."""
    events = runs.Training(base, train_set, places).start(
        workflow=WORKFLOW,
        max_train_steps=3,
        gradient_accumulation_steps=2,
        conv_dim=2,
        unet_lr=5e-4,
        clip_skip=2,
        min_snr_gamma=5.0,
        training_comment="a comment",
    )
    return runs.only(list(events), api.Finished)


def test_kohyas_and_modelspecs_keys_are_there_and_true(finished: api.Finished) -> None:
    found = api.lora_metadata(finished.lora_file)
    assert set(found) >= KOHYAS_KEYS | MODELSPEC_KEYS
    expected = {
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "ss_learning_rate": "0.001",
        "ss_unet_lr": "0.0005",
        "ss_text_encoder_lr": "0.001",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_num_train_images": "8",
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": "4",
        "ss_num_epochs": "2",
        "ss_epoch": "2",
        "ss_steps": "3",
        "ss_max_train_steps": "3",
        "ss_batch_size_per_device": "3",
        "ss_total_batch_size": "6",
        "ss_clip_skip": "2",
        "ss_min_snr_gamma": "5.0",
        "ss_seed": "42",
        "ss_resolution": "(32, 32)",
        "ss_mixed_precision": "no",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_training_comment": "a comment",
        "ss_output_name": "x",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "x",
        "modelspec.trigger_phrase": "zibu",
        "modelspec.resolution": "32x32",
        "modelspec.encoder_layer": "2",
        "modelspec.prediction_type": "epsilon",
    }
    assert {k: found[k] for k in expected} == expected
    assert json.loads(found["ss_network_args"]) == {"conv_alpha": 1.0, "conv_dim": 2}
    assert json.loads(found["ss_tag_frequency"]) == {
        "2_zibu": {"zibu": 4, "blue": 4, **{f"tag {i}": 1 for i in range(4)}}
    }
    assert json.loads(found["ss_dataset_dirs"]) == {"2_zibu": {"n_repeats": 2, "img_count": 4}}
    buckets = json.loads(found["ss_bucket_info"])["buckets"].values()
    assert sorted((*b["resolution"], b["count"]) for b in buckets) == [(24, 40, 2), (32, 32, 4), (40, 24, 2)]
    assert all(isinstance(v, str) for v in found.values())


# Family -> the module of plain LoRAs that the documents of sd-scripts, else of musubi-tuner, name for it.
LORA_MODULES = {
    **dict.fromkeys(("sd15", "sd2", "sdxl"), "networks.lora"),
    **dict.fromkeys(("sd3", "sd35_large", "sd35_medium"), "networks.lora_sd3"),
    **dict.fromkeys(("flux", "flux_schnell", "chroma"), "networks.lora_flux"),
    "lumina2": "networks.lora_lumina",
    "flux2": "networks.lora_flux_2",
    "qwen_image": "networks.lora_qwen_image",
    "z_image": "networks.lora_zimage",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_module_is_kohyas_for_base_and_algorithm(name: str, train_set: api.TrainSet) -> None:
    def module(**changes: Any) -> str:
        base: Any = SimpleNamespace(family=FAMILIES[name], weights_hash="0")
        counts = {"step": 1, "epoch": 1, "total_steps": 1, "num_epochs": 1, "batches_per_epoch": 1}
        config = runs.settings(**changes)
        told = metadata.build(base, train_set, config, run="0", precision="fp32", optimizer="", **counts)
        assert told["ss_v2"] == str(name == "sd2")
        return told["ss_network_module"]

    assert module() == LORA_MODULES[name]
    assert module(algo="locon", conv_dim=2) == LORA_MODULES[name]
    assert module(dora_wd=True) == module(algo="loha") == module(preset="everything") == "lycoris.kohya"
    assert module(algo="dylora") == "networks.dylora"


@pytest.mark.parametrize(
    ("told", "module"),
    [
        ({}, "networks.lora"),
        ({"ss_base_model_version": "sd_v1", "ss_network_module": "lycoris.kohya"}, "networks.lora"),
        ({"ss_base_model_version": "flux1", "ss_network_module": "lycoris.kohya"}, "networks.lora_flux"),
        ({"ss_base_model_version": "flux1", "ss_network_module": "networks.lora"}, "networks.lora_flux"),
        ({"ss_network_module": "networks.lora_anima"}, "networks.lora_anima"),
        ({"ss_network_module": "tool of others"}, "networks.lora"),
    ],
)
def test_a_plain_lora_made_of_another_has_its_bases_module(told: dict[str, str], module: str) -> None:
    assert metadata.lora_module(told) == module


def test_the_settings_and_the_workflow_can_be_taken_from_the_file(finished: api.Finished) -> None:
    found = api.lora_metadata(finished.lora_file)
    assert json.loads(found["workflow"]) == json.loads(WORKFLOW)
    stored = json.loads(found["loragraft_settings"])
    config = api.make(api.TrainConfig, stored["train"])
    assert (config.conv_dim, config.unet_lr, config.training_comment) == (2, 5e-4, "a comment")
    api.make(api.DatasetConfig, stored["dataset"])
    assert found["loragraft_run"][:8] == finished.run_folder.name[-8:]


def test_hashes_are_those_of_the_tensors(finished: api.Finished) -> None:
    found = api.lora_metadata(finished.lora_file)
    digest = tensor_hash(api.lora_tensors(finished.lora_file))
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.hash_sha256"] == f"0x{digest}"


def test_a_workflow_is_kept_only_where_it_is_wanted(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    training = runs.Training(base, train_set, places)
    for number, (given, options) in enumerate([(None, {}), (WORKFLOW, {"embed_workflow": False})]):
        events = list(training.start(workflow=given, max_train_steps=1, seed=number, **options))
        assert "workflow" not in api.lora_metadata(runs.only(events, api.Finished).lora_file)


def test_another_workflow_does_not_write_a_finished_file_again(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    training = runs.Training(base, train_set, places)
    first = runs.only(list(training.start(workflow=WORKFLOW)), api.Finished)
    before = first.lora_file.stat().st_mtime_ns
    again = runs.only(list(training.start(workflow='{"nodes": []}')), api.Finished)
    assert again.reused and again.lora_file.stat().st_mtime_ns == before


def test_checkpoints_say_their_own_step(base: api.Base, train_set: api.TrainSet, places: api.Places) -> None:
    finished = runs.Training(base, train_set, places).finish(max_train_steps=6, save_every_n_steps=2)
    said = [api.lora_metadata(file) for file in finished.checkpoints]
    assert [(m["ss_steps"], m["ss_epoch"]) for m in said] == [("2", "1"), ("4", "1"), ("6", "2")]
    assert len({m["sshs_model_hash"] for m in said}) == 3


# ---- nothing of the machine ----


def test_two_machines_make_the_same_file(
    tmp_path: Path, images: Path, checkpoint: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other folders, another time, another file name of the base: every byte is the same."""
    made = []
    for name in ("here", "there"):
        root = tmp_path / name
        data = shutil.copytree(images, root / "data", copy_function=shutil.copyfile)
        model = shutil.copy(checkpoint, root / f"{name}-model.safetensors")
        base = api.open_base(model, tokenizer=shutil.copytree(tokenizer, root / "tok"))
        places = api.Places(root / "runs", root / "loras", root / "cache")
        training = runs.Training(base, runs.train_set(data), places)
        options = {"sample_prompts": ["zibu"], "preview_image": True, "save_every_n_steps": 2}
        training.finish(max_train_steps=3, **options)
        folder = runs.run_folder(places)
        made.append(
            {**runs.tree(places.loras), **runs.tree(folder / "ckpt"), **runs.tree(folder / "samples")}
        )
        assert (folder / "run.toml").read_bytes() == (
            runs.run_folder(training.places) / "run.toml"
        ).read_bytes()
        later = time.time() + 1e6
        monkeypatch.setattr(time, "time", lambda later=later: later)
    assert made[0] == made[1]
    assert len(made[0]) >= 10


def test_no_file_of_the_product_names_a_path_a_user_or_a_host(
    finished: api.Finished, places: api.Places, images: Path, checkpoint: Path
) -> None:
    text = json.dumps(api.lora_metadata(finished.lora_file), ensure_ascii=False)
    private = [str(places.runs.parent), str(images), str(images.parent), checkpoint.stem, str(Path.home())]
    private += [socket.gethostname(), f"/{getpass.getuser()}/", time.strftime("%Y-%m-%d")]
    assert not [p for p in private if p and p in text]
    data = finished.lora_file.read_bytes()
    assert not [p for p in private[:3] if p.encode() in data]


def test_picture_and_caption_names_stay_out_of_the_file(
    base: api.Base, places: api.Places, tmp_path: Path
) -> None:
    """Only what is learnt is told: captions' tags and folder names, as the reference does; no file names."""
    folder = tiny.write_images(tmp_path / "1_zibu", [(32, 32)])
    (folder / "image0.png").rename(folder / "Holiday of Mrs X.png")
    (folder / "image0.txt").rename(folder / "Holiday of Mrs X.txt")
    finished = runs.Training(base, runs.train_set(tmp_path), places).finish(max_train_steps=1)
    assert b"Holiday" not in finished.lora_file.read_bytes()


def test_odd_texts_reach_the_file_unchanged(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    odd: dict[str, Any] = {
        "metadata_title": 'a "title" \\ \u540d \U0001f600',
        "metadata_trigger_phrase": "zi\u200dbu, \u0437",
        "training_comment": "two\nlines\t\x00",
    }
    finished = runs.Training(base, train_set, places).finish(max_train_steps=1, **odd)
    found = api.lora_metadata(finished.lora_file)
    assert found["modelspec.title"] == odd["metadata_title"]
    assert found["modelspec.trigger_phrase"] == odd["metadata_trigger_phrase"]
    assert found["ss_training_comment"] == odd["training_comment"]
    assert (places.loras / "x.txt").read_text("utf-8") == odd["metadata_trigger_phrase"] + "\n"


def test_a_folder_of_no_concept_makes_no_words(base: api.Base, places: api.Places, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "plain", [(32, 32)])
    finished = runs.Training(base, runs.train_set(tmp_path / "plain"), places).finish(max_train_steps=1)
    assert finished.trigger_words == ""
    assert not (places.loras / "x.txt").exists()
    assert api.lora_metadata(finished.lora_file)["modelspec.trigger_phrase"] == ""


def test_the_preview_is_what_the_lora_draws(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    finished = runs.Training(base, train_set, places).finish(max_train_steps=1, preview_image=True)
    picture = Image.open(places.loras / "x.preview.png")
    assert picture.size == (32, 32)
    shown = (finished.run_folder / "samples" / "preview.png").read_bytes()
    assert (places.loras / "x.preview.png").read_bytes() == shown


def test_class_words_that_no_caption_holds_are_no_trigger_words(tmp_path: Path) -> None:
    folder = tiny.write_images(tmp_path / "4_Zi bu", [(32, 32)])
    (folder / "image0.txt").write_text("a red circle", encoding="utf-8")
    assert metadata.trigger_words(runs.train_set(tmp_path), runs.settings()) == ""
    led = runs.train_set(tmp_path, caption_prefix="zi bu, ")
    assert metadata.trigger_words(led, runs.settings()) == "Zi bu"
    (folder / "image0.txt").unlink()
    assert metadata.trigger_words(runs.train_set(tmp_path), runs.settings()) == "Zi bu"
