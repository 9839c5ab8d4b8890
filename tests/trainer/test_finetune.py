"""Full fine-tuning and DreamBooth: what is trained, that it is fine-tuning, and the model it makes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loragraft.trainer import api, losses
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.train_set import Block, freeze_blocks
from loragraft.trainer.engine.steps import Micro
from loragraft.trainer.families.names.ldm_keys import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from loragraft.trainer.tools.bake import merge_into_checkpoint
from loragraft.trainer.tools.lora_file import read_lora
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

FULL: dict[str, Any] = {
    "algo": "full",
    "preset": "everything",
    "save_as": "checkpoint",
    "network_train_unet_only": True,
    "max_train_steps": 2,
    "save_precision": "fp32",
}


def test_everything_is_every_number_of_the_denoiser(training: runs.Training) -> None:
    planned = runs.only(training.events(**FULL), api.Planned)
    unet = training.base.load().denoiser
    assert planned.num_parameters == sum(p.numel() for p in unet.parameters())
    file = training.places.loras / "x.safetensors"
    kinds = {name.rpartition(".")[2] for name in load_file(file)}
    assert kinds == {"diff", "diff_b", "w_norm", "b_norm"}


def test_it_is_the_step_that_fine_tuning_takes(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on the difference from frozen weights is AdamW's on the weights themselves."""
    changes = {**FULL, "optimizer_args": ["weight_decay=0"], "max_train_steps": 1, "max_grad_norm": 0.0}
    changes |= {"learning_rate": 1e-3, "lr_scheduler": "constant"}
    finished = training.finish(**changes)
    plain = training.base.load()
    for module in (plain.denoiser, plain.vae, plain.text_encoder):
        module.float()
    trained = list(plain.denoiser.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0)

    def step(run: Any) -> None:
        losses.micro_losses(plain, run.inputs, [run.config], run.feed(0)[0].tensors).sum().backward()
        optimizer.step()

    runs.look_inside(training.elsewhere("other"), monkeypatch, step, **changes)
    assert finished.model_file is not None
    weights = load_file(finished.model_file)
    states = {"denoiser": plain.denoiser.state_dict(), **without_denoiser(training.base)}
    wanted = training.base.family.join(states)
    moved = {name: tensor for name, tensor in wanted.items() if name.startswith(UNET_PREFIX)}
    before = training.base.family.join(training.base.state_dicts)
    assert len(moved) == len(list(plain.denoiser.parameters()))
    agree = total = 0
    for name, tensor in moved.items():
        ours, theirs = weights[name] - before[name].float(), tensor - before[name].float()
        clear = theirs.abs() > 0.9e-3  # where the first gradient is not rounding alone
        agree += int(((ours - theirs).abs()[clear] < 1e-5).sum())
        total += int(clear.sum())
    assert total > 0.9 * sum(t.numel() for t in moved.values()) and agree > 0.999 * total


def apart(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference of two images' values."""
    a, b = (np.asarray(image, dtype=np.int32) for image in (one, other))
    return int(abs(a - b).max())


def without_denoiser(base: api.Base) -> dict[str, Any]:
    return {part: sd for part, sd in base.state_dicts.items() if part != "denoiser"}


def test_the_model_is_the_base_with_the_difference_in_it(training: runs.Training, tmp_path: Path) -> None:
    finished = training.finish(**{**FULL, "learning_rate": 1e-2})
    assert finished.model_file == training.places.models / "x.safetensors"
    weights, base = load_file(finished.model_file), training.base.family.join(training.base.state_dicts)
    difference = load_file(finished.lora_file)
    assert set(weights) == set(base)
    name = "mid_block.attentions.0.proj_in"
    ours = weights[f"{UNET_PREFIX}middle_block.1.proj_in.bias"]
    shift = difference[f"lora_unet_{name.replace('.', '_')}.diff_b"]
    torch.testing.assert_close(
        ours, base[f"{UNET_PREFIX}middle_block.1.proj_in.bias"].float() + shift, rtol=0, atol=0
    )
    for key, weight in weights.items():
        if key.startswith(VAE_PREFIX):
            assert weight.dtype == torch.float16 and torch.equal(weight, base[key])
        elif key.startswith(TEXT_PREFIX):
            assert weight.dtype == torch.float32 and torch.equal(weight, base[key].float())
        else:
            assert not torch.equal(weight, base[key].float()), key
    settings = api.DrawSettings(steps=2, size=(32, 32), mixed_precision="fp32")
    drawn = {}
    for which, model, strength in (
        ("base and file", training.base, 1.0),
        ("model", None, 0.0),
        ("base", training.base, 0.0),
    ):
        tokenizer = Path(training.base.tokenizer_folders["clip"])
        model = model or api.open_base(finished.model_file, tokenizer=tokenizer)
        (one,) = api.draw(
            model, [finished.lora_file], prompts=["a"], seeds=[1], strengths=[strength],
            settings=settings, device="cpu",
        )  # fmt: skip
        drawn[which] = one.image
    assert apart(drawn["model"], drawn["base and file"]) <= 1
    assert apart(drawn["model"], drawn["base"]) > 8


def test_its_metadata_is_that_of_a_model(training: runs.Training) -> None:
    finished = training.start(workflow='{"a": 1}', **FULL)
    (end,) = runs.of(finished, api.Finished)
    assert end.model_file is not None
    told, lora = read_metadata(end.model_file), read_metadata(end.lora_file)
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert lora["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["workflow"] == '{"a": 1}' and told["loragraft_run"] == lora["loragraft_run"]
    assert not [key for key in told if key.startswith("ss_network")]
    assert lora["ss_network_module"] == "lycoris.kohya" and '"preset":"everything"' in lora["ss_network_args"]


@pytest.mark.parametrize(
    "changes",
    [
        {"algo": "lora", "preset": "", "max_train_steps": 1},
        {"dora_wd": True, "algo": "lora", "train_norm": True, "preset": "", "max_train_steps": 1},
        {"algo": "oft", "preset": "", "max_train_steps": 1},
    ],
    ids=["lora", "dora and norms", "oft"],
)
def test_any_network_can_be_in_the_model(training: runs.Training, changes: dict[str, Any]) -> None:
    changes = {**FULL, **changes, "network_train_unet_only": False, "learning_rate": 1e-2}
    finished = training.finish(**changes)
    assert finished.model_file is not None
    weights, base = load_file(finished.model_file), training.base.family.join(training.base.state_dicts)
    for prefix in (UNET_PREFIX, TEXT_PREFIX):
        own = [key for key in weights if key.startswith(prefix)]
        assert any(not torch.equal(weights[key], base[key].float()) for key in own)


def test_merging_the_file_gives_the_same_model(
    training: runs.Training, checkpoint: Path, tmp_path: Path
) -> None:
    finished = training.finish(**FULL)
    target = tmp_path / "merged.safetensors"
    merge_into_checkpoint(checkpoint, [(read_lora(finished.lora_file), 1.0)], target, precision="fp32")
    assert finished.model_file is not None
    merged, made = load_file(target), load_file(finished.model_file)
    assert all(torch.equal(merged[key], made[key].float()) for key in made)


# ---- the file's place ----


def test_a_model_of_others_is_never_replaced(training: runs.Training) -> None:
    other = training.places.models / "x.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    quick = {**FULL, "max_train_steps": 1, "train_modules": ["conv_in$"]}
    finished = training.finish(**quick)
    assert finished.model_file == other.with_name("x_2.safetensors") and other.read_bytes() == b"mine"
    made = finished.model_file.stat().st_mtime_ns
    again = training.finish(**quick)
    assert again.reused and again.model_file == finished.model_file
    assert finished.model_file.stat().st_mtime_ns == made, "a finished run's model is left as it is"
    finished.model_file.unlink()
    assert training.finish(**quick).model_file == finished.model_file, "and made again where it is gone"
    assert finished.model_file.is_file()
    with Refusal("LG-SAVE-005", "x.safetensors"):
        training.finish(**quick, name_taken="refuse", seed=3)


def test_saves_on_the_way_are_models_too(training: runs.Training) -> None:
    changes = {**FULL, "max_train_steps": 3, "save_every_n_steps": 1, "publish_checkpoints": True}
    changes |= {"save_last_n_steps": 1, "train_modules": ["conv_in$"]}
    training.finish(**changes)
    names = sorted(file.name for file in training.places.models.iterdir())
    assert names == ["x-step00000001.safetensors", "x-step00000002.safetensors", "x.safetensors"]
    weights = [load_file(training.places.models / name) for name in names]
    key = f"{UNET_PREFIX}input_blocks.0.0.weight"
    assert not torch.equal(weights[0][key], weights[1][key])


def test_a_disk_without_room_is_found_before_the_first_step(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage

    def small(place: Any) -> Any:
        free = 64 * 2**20 + 10_000 if "checkpoints" in str(place) else real(place).free
        return SimpleNamespace(free=free, total=real(place).total)

    training.places.models.mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", small)
    events = training.start(**{**FULL, "train_modules": ["conv_in$"]})
    with Refusal("LG-SAVE-001", "checkpoints"):
        for event in events:
            assert not isinstance(event, (api.Step, api.Planned))


# ---- which modules ----


def test_only_named_modules_are_trained(training: runs.Training) -> None:
    changes = {"max_train_steps": 1, "algo": "full", "preset": "everything"}
    file = training.finish(**changes, train_modules=["re:up_blocks.*attn2", "conv_norm_out"]).lora_file
    keys = {name.partition(".")[0] for name in load_file(file)}
    assert all("up_blocks" in key and "attn2" in key for key in keys - {"lora_unet_conv_norm_out"})
    assert len(keys) > 4 and "lora_unet_conv_norm_out" in keys
    lora = training.finish(max_train_steps=1, train_modules=["attn1_to_q$"], output_name="y").lora_file
    assert {k.partition(".")[0][-10:] for k in load_file(lora)} == {"attn1_to_q"}


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"train_modules": ["atn2"]}, "LG-CFG-003", ["train_modules", "attn2;"]),
        ({"train_modules": ["conv_in$"]}, "LG-CFG-003", ["preset everything"]),
        ({"train_modules": ["(a+)+b"]}, "LG-CFG-003", ["train_modules", "repeats a group"]),
        (
            {"train_modules": ["attn1"], "network_weights": "a", "dim_from_weights": True},
            "LG-CFG-004",
            ["train_modules", "dim_from_weights"],
        ),
    ],
)
def test_patterns_that_cannot_be(
    training: runs.Training, changes: dict[str, Any], code: str, named: list[str]
) -> None:
    with Refusal(code, *named):
        training.finish(max_train_steps=1, **changes)


def test_layers_learn_at_rates_of_their_own(training: runs.Training) -> None:
    changes = {**FULL, "max_train_steps": 1, "lr_scheduler": "constant", "optimizer_args": ["weight_decay=0"]}
    rates = ["conv_in=1e-2", "norm=0"]
    difference = load_file(training.finish(**changes, network_reg_lrs=rates).lora_file)
    largest = {name: float(tensor.abs().max()) for name, tensor in difference.items()}
    assert largest["lora_unet_conv_in.diff"] == pytest.approx(1e-2, rel=1e-2)
    assert largest["lora_unet_conv_out.diff"] == pytest.approx(1e-3, rel=1e-2)
    assert largest["lora_unet_conv_norm_out.w_norm"] == 0


# ---- DreamBooth ----


@pytest.fixture
def dreambooth(training: runs.Training, tmp_path: Path) -> Callable[..., runs.Training]:
    """Return a function that makes runs of three images and two class images, in batches of their own."""

    def make(weight: float) -> runs.Training:
        blocks = []
        for name, count, size, is_reg in (("1_zibu", 3, 3, False), ("1_cat", 2, 1, True)):
            folder = tmp_path / "both" / name
            if not folder.exists():
                tiny.write_images(folder, [(32, 32)] * count, seed=count)
            config = api.make(api.DatasetConfig, {**runs.SMALL_BUCKETS, "prior_loss_weight": weight})
            dataset = api.scan_folder(folder, is_reg=is_reg, class_tokens=name[2:])
            blocks.append(Block(dataset, config, size, keeps_pace=is_reg))
        elsewhere = training.elsewhere(f"weight {weight}")
        return dataclasses.replace(elsewhere, train_set=freeze_blocks(blocks))

    return make


def test_class_images_count_as_set_in_batches_of_their_own_size(
    dreambooth: Callable[..., runs.Training],
) -> None:
    """The loss of a step is the mean over one batch of each: of three images, and of one at its weight."""
    found = {}
    for weight in (1.0, 0.25, 0.0):
        own = dreambooth(weight)
        batches = plan_epoch(own.train_set, 7, 42, 0)
        assert [len(batch.indices) for batch in batches] == [3, 1]
        assert [set(batch.loss_weights) for batch in batches] == [{1.0}, {weight}]
        found[weight] = own.finish(max_train_steps=1, gradient_accumulation_steps=2).losses[0]
    of_training, of_classes = found[0.0], found[1.0] - found[0.0]
    assert of_training > 0.1 and of_classes > 0.1
    assert found[0.25] == pytest.approx(of_training + 0.25 * of_classes, rel=1e-5)


def test_class_images_of_weight_0_teach_nothing(
    dreambooth: Callable[..., runs.Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient too is that of the weighted losses."""
    norms = {}
    for weight in (0.0, 0.5, 1.0):

        def backward(run: Any, weight: float = weight) -> None:
            run.engine.backward([Micro(0, run.feed(0)[1].tensors, 1)])
            norms[weight] = float(run.engine.update(0, 0.0))

        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "engine": "eager"}
        runs.look_inside(dreambooth(weight), monkeypatch, backward, **options)
    assert norms[0.0] == 0 and norms[1.0] > 0
    assert norms[0.5] == pytest.approx(norms[1.0] / 2, rel=1e-4)
