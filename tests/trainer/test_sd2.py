"""SD2.x: names and shapes as the reference has them, its text encoder, and what it predicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.unet import unet_config
from loragraft.trainer.families.names import ldm_keys as keys
from loragraft.trainer.families.names.unet_kinds import heads_of
from loragraft.trainer.families.sd2 import SD2
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import runs, tiny, tiny_sd2
from loragraft_tests.trainer.data_folders import Refusal, golden

OPENCLIP = "cond_stage_model.model."
FULL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
}


def full_unet(**changes: Any) -> Any:
    """Return SD2.1's U-Net in full size, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**FULL, **changes)


@pytest.fixture(scope="module")
def full_size() -> Parts:
    """Return SD2.1's modules as they are trained, in full size, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )
    with torch.device("meta"):
        text = CLIPTextModel(config)
    return Parts(full_unet(), nn.Identity(), nn.ModuleDict({"text_encoder": text}), {})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base's single file, float32."""
    return tiny_sd2.write_checkpoint(tmp_path_factory.mktemp("sd2") / "tiny.safetensors", torch.float32)


@pytest.fixture(scope="module")
def sd2(file: Path, tokenizer: Path) -> api.Base:
    """Return the opened tiny base."""
    return api.open_base(file, tokenizer=tokenizer)


@pytest.fixture
def sd2_runs(sd2: api.Base, train_set: api.TrainSet, places: api.Places) -> runs.Training:
    """Return runs on the tiny base."""
    return runs.Training(sd2, train_set, places)


# ---- names and shapes ----


def test_the_lora_has_the_references_modules(full_size: Parts) -> None:
    """The stored list has the residual blocks' linear layers too, see the golden files' README."""
    expected = golden("lora_modules")["sd21_lora_dim16"]
    found = {}
    for target in SD2().targets(full_size, convolutions=True):
        module: Any = full_size.part(target.part).get_submodule(target.path)
        out, *inside = module.weight.shape
        if target.kind == "linear":
            found[target.key] = [[16, *inside], [out, 16, *(1 for _ in inside[1:])]]
    assert found == expected
    of_blocks = re.compile(r"time_emb_proj|conv_shortcut")
    plain = {t.key for t in SD2().targets(full_size, convolutions=False)}
    assert plain == {k for k in expected if not of_blocks.search(k)}
    assert len(plain) == 138 + 192


def test_full_size_is_read_from_a_files_matrices() -> None:
    """A file has matrices where the modules that are trained have 1x1 convolutions."""
    linear = full_unet(use_linear_projection=True)
    state = linear.state_dict()
    there = keys.unet_to_ldm(state)
    assert len(there) == len(state) == 686
    weights = {keys.UNET_PREFIX + new: state[old] for new, old in there.items()}
    family = SD2()
    assert family.detect(weights)
    unet = family.split(weights)["denoiser"]
    config = unet_config(unet, heads=heads_of)
    assert config == {**config, **FULL, "use_linear_projection": False}
    assert {k: v.shape for k, v in unet.items()} == {k: v.shape for k, v in full_unet().state_dict().items()}
    vae = tiny_sd2.random_modules()["vae"].state_dict()
    back = family.join({"denoiser": unet, "vae": vae, "text_encoder": {}})
    shapes = {k: v.shape for k, v in back.items() if k.startswith(keys.UNET_PREFIX)}
    assert shapes == {k: v.shape for k, v in weights.items()}


def test_a_file_is_shared_and_computes_what_diffusers_own_model_does(file: Path, tokenizer: Path) -> None:
    weights = load_file(file)
    storages = {v.untyped_storage().data_ptr() for v in weights.values()}
    base = api.open_base_from_weights(weights, name="x", tokenizers={"clip": str(tokenizer)})
    assert base.family.name == "sd2"
    parts, modules = base.load(), tiny_sd2.random_modules()
    for module in (parts.denoiser, parts.text_encoder, parts.vae):
        for key, value in module.state_dict().items():
            assert value.untyped_storage().data_ptr() in storages, key
    x, t, hidden = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, tiny.TEXT)
    unet: Any = modules["unet"]
    found = base.family.predict(parts, x, t, (hidden,))
    torch.testing.assert_close(found, unet(x, t, hidden).sample, rtol=1e-4, atol=1e-5)


def test_a_file_is_put_together_again(sd2: api.Base, file: Path, tmp_path: Path, tokenizer: Path) -> None:
    """The last layer of the text encoder, which nothing reads, is the one before once more."""
    weights, again = load_file(file), sd2.family.join(sd2.state_dicts)
    unused = f"{OPENCLIP}transformer.resblocks.{tiny_sd2.LAYERS - 1}."
    before = f"{OPENCLIP}transformer.resblocks.{tiny_sd2.LAYERS - 2}."
    assert set(weights) - set(again) == {f"{OPENCLIP}logit_scale", f"{OPENCLIP}text_projection"}
    for key, weight in again.items():
        expected = weights[key.replace(unused, before)]
        assert torch.equal(weight, expected), key
    save_file({k: again[k].contiguous().clone() for k in again}, tmp_path / "x.safetensors")
    assert api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer).weights_hash == sd2.weights_hash


def test_a_hosts_names_and_a_folders_are_the_same_base(
    sd2: api.Base, file: Path, tmp_path: Path, tokenizer: Path
) -> None:
    whole = tiny_sd2.random_modules()["text_encoder"].state_dict()
    host = {k: v for k, v in load_file(file).items() if not k.startswith(OPENCLIP)}
    for key, value in whole.items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        host[f"text_encoders.clip_h.transformer.{name}"] = value
    host["text_encoders.clip_h.transformer.text_projection.weight"] = torch.eye(tiny.TEXT)
    held = api.open_base_from_weights(host, name="x", tokenizers={"clip": str(tokenizer)})
    assert held.weights_hash == sd2.weights_hash
    sgm = {k.replace(OPENCLIP, "conditioner.embedders.0.model."): v for k, v in load_file(file).items()}
    other = api.open_base_from_weights(sgm, name="x", tokenizers={"clip": str(tokenizer)})
    assert other.weights_hash == sd2.weights_hash
    folder = api.open_base(tiny_sd2.write_folder(tmp_path / "folder"), tokenizer=None)
    assert folder.family.name == "sd2"
    assert folder.part_hash("denoiser") == sd2.part_hash("denoiser")


def test_an_encoder_of_23_layers_has_lost_its_last_one_already() -> None:
    def layers(count: int) -> set[str]:
        prefix = "text_encoders.clip_h.transformer.text_model.encoder.layers."
        text = {f"{prefix}{i}.mlp.fc1.bias": torch.zeros(1) for i in range(count)}
        unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}
        return set(SD2().split({**text, **unet})["text_encoder"])

    assert layers(23) == layers(24)
    assert len(layers(24)) == 23


# ---- what it predicts ----


@pytest.mark.parametrize(("spread", "velocity"), [(0.2, True), (0.05, False)])
def test_the_spread_of_a_bias_tells_velocity(
    spread: float, velocity: bool, file: Path, tmp_path: Path, tokenizer: Path
) -> None:
    weights = load_file(file)
    name = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.norm1.bias"
    alternating = torch.tensor([1.0, -1.0]).repeat(weights[name].numel() // 2)
    save_file(weights | {name: alternating * spread}, tmp_path / "x.safetensors")
    base = api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)
    assert base.velocity is velocity
    assert base.zero_terminal is None


@pytest.mark.parametrize(
    ("channels", "named"), [(9, "inpainting"), (5, "depth"), (7, "upscaler"), (8, "InstructPix2Pix")]
)
def test_relatives_are_refused_by_name(
    channels: int, named: str, file: Path, tmp_path: Path, tokenizer: Path
) -> None:
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}
    save_file(load_file(file) | first, tmp_path / "x.safetensors")
    with Refusal("LG-BASE-004", named, "SD2.x"):
        api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)


# ---- text ----


def test_text_is_encoded_as_diffusers_pipeline_encodes_it(sd2: api.Base, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    read = CLIPTokenizer.from_pretrained(tiny_sd2.write_folder(tmp_path / "folder") / "tokenizer")
    read.pad_token_id = 0
    modules = tiny_sd2.random_modules()
    text: Any = modules["text_encoder"]
    body = getattr(text, "text_model", text)
    body.encoder.layers = body.encoder.layers[:-1]  # as diffusers' folders hold it
    pipe = StableDiffusionPipeline(
        **modules, tokenizer=read, scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    parts, reading = sd2.load(), Reading()
    for caption in ("zibu, blue", "", "abcdefgh" * 20):
        with torch.no_grad():
            expected, _ = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
            tokens = sd2.family.tokenize(parts, [caption], reading)
            (found,) = sd2.family.encode_text(parts, tokens, reading)
        torch.testing.assert_close(found, expected)
        assert [found.shape[1:]] == sd2.family.cond_shapes(parts, reading)


# ---- runs ----


@pytest.mark.parametrize("settings", [{}, {"v_parameterization": True, "clip_skip": 2}])
def test_a_stopped_run_goes_on_to_the_same_bytes(settings: dict[str, Any], sd2_runs: runs.Training) -> None:
    whole = sd2_runs.elsewhere("whole").finish(**settings)
    sd2_runs.stop_after(2, **settings)
    resumed = sd2_runs.finish(**settings)
    assert resumed.lora_file.read_bytes() == whole.lora_file.read_bytes()
    metadata = api.lora_metadata(resumed.lora_file)
    version, architecture = ("sd_v2_v", "768-v") if settings else ("sd_v2", "512")
    assert metadata["ss_v2"] == "True" and metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"stable-diffusion-v2-{architecture}/lora"


def test_the_whole_model_is_a_file_with_the_training_in_it(sd2_runs: runs.Training, tokenizer: Path) -> None:
    end = sd2_runs.finish(save_as="checkpoint", save_precision="fp32", max_train_steps=2, learning_rate=0.1)
    assert end.model_file is not None
    whole = api.open_base(end.model_file, tokenizer=tokenizer)
    settings = api.DrawSettings(steps=2, size=(32, 32), mixed_precision="fp32")
    with_file, in_model, without = (
        np.asarray(drawn.image, dtype=np.int32)
        for model, strength in ((sd2_runs.base, 1.0), (whole, 0.0), (sd2_runs.base, 0.0))
        for drawn in api.draw(
            model, [end.lora_file], prompts=["a"], seeds=[1], strengths=[strength], settings=settings,
            device="cpu",
        )
    )  # fmt: skip
    assert abs(with_file - in_model).max() <= 1
    assert abs(with_file - without).max() > 8


def test_words_are_learnt(sd2_runs: runs.Training) -> None:
    end = sd2_runs.finish(train_embeddings=["zibu"], max_train_steps=2)
    (saved,) = end.lora_file.parent.glob("*zibu*.safetensors")
    (vectors,) = load_file(saved).values()
    assert vectors.shape[1] == tiny.TEXT
