"""The whole model as a product, of every family: what was learnt is in it, and the VAE stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.engine.packed_tensor import PackedTensor, unpacked
from loragraft.trainer.tools.deltas import delta
from loragraft.trainer.tools.lora_file import read_lora
from loragraft.trainer.tools.places import places_in
from loragraft.trainer.tools.sample import merge_into_modules
from loragraft_tests.trainer import quantised_files, runs, tiny, tiny_families

QUICK = ("sd2", "flux")
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"text_encoder_lr": 1e-2},
    "full": {"algo": "full", "preset": "everything"},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in tiny_families.WEIGHTS],
)
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return one family's tiny base."""
    return tiny_families.open_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_model_is_the_base_with_what_was_learnt(
    tiny_base: api.Base, network: str, places: api.Places, tmp_path: Path
) -> None:
    tiny.write_images(tmp_path / "1_zibu", [(64, 64)])
    data = runs.train_set(tmp_path, resolution=64, bucket_reso_steps=32, min_bucket_reso=32)
    options = dict(NETWORKS[network])
    if not tiny_base.family.trains_text:
        options.pop("text_encoder_lr", None)
    options |= {"max_train_steps": 1, "learning_rate": 1e-2, "lr_scheduler": "constant"}
    training = runs.Training(tiny_base, data, places)
    finished = training.finish(save_as="checkpoint", save_precision="fp32", **options)
    assert finished.model_file is not None
    tokenizers = [Path(folder) for folder in tiny_base.tokenizer_folders.values()]
    made = api.open_base(finished.model_file, tokenizer=tokenizers)
    assert made.family.name == tiny_base.family.name
    parts, ours, before = made.load(), tiny_base.load(), tiny_base.load()
    for module in (ours.denoiser, ours.text_encoders):
        module.float()
    merge_into_modules(tiny_base.family, ours, [(read_lora(finished.lora_file), 1.0)])
    moved = 0
    for which in ("denoiser", "text_encoders"):
        found, wanted, old = (getattr(p, which).state_dict() for p in (parts, ours, before))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].float(), tensor, rtol=1e-5, atol=1e-6)
            moved += not torch.equal(tensor, old[name].float())
    assert moved >= 10
    vae = made.state_dicts["vae"]
    for name, tensor in tiny_base.state_dicts["vae"].items():
        assert vae[name].dtype == tensor.dtype and torch.equal(vae[name], tensor), name
    told = read_metadata(finished.model_file)
    architecture = tiny_base.family.metadata["modelspec.architecture"]
    assert told["modelspec.architecture"] == architecture.removesuffix("/lora")


def test_a_vae_in_half_precision_stays_so(places: api.Places, tmp_path: Path) -> None:
    """Under either prefix that checkpoints have for it."""
    base = tiny_families.open_tiny("flux", tmp_path / "base")
    half = {name: tensor.half() for name, tensor in base.state_dicts["vae"].items()}
    base.state_dicts = {**base.state_dicts, "vae": half}
    tiny.write_images(tmp_path / "images" / "1_zibu", [(64, 64)])
    data = runs.train_set(tmp_path / "images", resolution=64, bucket_reso_steps=32, min_bucket_reso=32)
    options = {"save_as": "checkpoint", "save_precision": "bf16", "max_train_steps": 1}
    finished = runs.Training(base, data, places).finish(**options)
    assert finished.model_file is not None
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, tensor in load_file(finished.model_file).items():
        dtypes.setdefault(name.partition(".")[0], set()).add(tensor.dtype)
    assert dtypes["vae"] == {torch.float16} and dtypes["model"] == {torch.bfloat16}


def test_a_quantised_bases_model_has_its_values(places: api.Places, tmp_path: Path) -> None:
    """A small change would be rounded away in them, so that they are written in save_precision."""
    weights = tiny_families.WEIGHTS["flux"](tmp_path)
    packed, _, _ = quantised_files.scaled_fp8(weights, "layer")
    save_file({k: v.contiguous() for k, v in packed.items()}, tmp_path / "base.safetensors")
    kinds = ("clip", "t5")
    tokenizers = [tiny_families.TOKENIZERS[kind](tmp_path / kind) for kind in kinds]
    base = api.open_base(tmp_path / "base.safetensors", tokenizer=tokenizers)
    values = base.family.join(base.state_dicts)
    held = [name for name in values if isinstance(values[name], PackedTensor)]
    assert held, "nothing is packed in it"
    tiny.write_images(tmp_path / "images" / "1_zibu", [(64, 64)])
    data = runs.train_set(tmp_path / "images", resolution=64, bucket_reso_steps=32, min_bucket_reso=32)
    options = {"save_as": "checkpoint", "save_precision": "fp32", "max_train_steps": 1}
    finished = runs.Training(base, data, places).finish(**options)
    assert finished.model_file is not None
    found, lora = load_file(finished.model_file), read_lora(finished.lora_file)
    trained = {place.key: name for name, place in places_in(values).items() if name in lora.modules}
    assert set(trained) & set(held)
    for name in held:
        wanted = unpacked(values[name]).float()
        if name in trained:
            wanted = wanted + delta(lora.modules[trained[name]])
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)
