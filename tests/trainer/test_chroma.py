"""Chroma: what its transformer, texts and autoencoder compute, as diffusers, ComfyUI and kohya have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families import FAMILIES, detect
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.chroma import Chroma
from loragraft.trainer.families.modules.chroma_model import ChromaTransformer, chroma_config
from loragraft.trainer.families.names.chroma_keys import chroma_from_diffusers
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import comfy_peer, dit_checks, tiny_dits, tiny_t5

LATENT = (16, 8, 6)
FULL_SIZE = {
    "width": 3072,
    "heads": 24,
    "inside": 12288,
    "channels": 64,
    "context": 4096,
    "double": 19,
    "single": 38,
    "guide_channels": 64,
    "guide_inside": 5120,
    "guide_depth": 5,
}
COMFYUI = "comfy.ldm.chroma.model.Chroma"


def comfyui_arguments(double: int, single: int) -> dict[str, Any]:
    """Return what ComfyUI's class wants to know of the tiny model."""
    return {
        "in_channels": 64,
        "out_channels": 64,
        "context_in_dim": tiny_t5.WIDTH,
        "hidden_size": 64,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": double,
        "depth_single_blocks": single,
        "axes_dim": [4, 14, 14],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "in_dim": 64,
        "out_dim": 64,
        "hidden_dim": 48,
        "n_layers": 2,
        "txt_ids_dims": [],
        "vec_in_dim": None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the tokenizer."""
    return tmp_path_factory.mktemp("chroma")


@pytest.fixture(scope="module")
def base(folder: Path) -> api.Base:
    """Return a tiny Chroma."""
    return tiny_dits.chroma_base(folder)


@pytest.fixture(scope="module")
def parts(base: api.Base) -> Parts:
    """Return its modules."""
    return base.load()


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy latents and timesteps."""
    rng = torch.Generator().manual_seed(7)
    return torch.randn((batch, *LATENT), generator=rng), torch.tensor([123.4, 900.0])[:batch]


# ---- the transformer ----


def diffusers_velocity(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return what diffusers' transformer computes, as its pipeline packs latents and numbers places."""
    from diffusers import ChromaPipeline

    model = tiny_dits.random_chroma()
    batch, channels, height, width = x.shape
    rows = ChromaPipeline._pack_latents(x, batch, channels, height, width)
    places = ChromaPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    with torch.no_grad():
        out = model(
            hidden_states=rows,
            timestep=t / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
    return ChromaPipeline._unpack_latents(out, height * 8, width * 8, 8)


def test_padded_texts_of_a_batch_give_what_diffusers_gives_for_each_alone(parts: Parts) -> None:
    x, t = inputs()
    text = torch.randn((2, 12, tiny_t5.WIDTH), generator=torch.Generator().manual_seed(1))
    lengths = (5, 12)
    seen = torch.arange(12) < torch.tensor(lengths)[:, None]
    ours = Chroma().predict(parts, x, t, (text, seen))
    for i, length in enumerate(lengths):
        theirs = diffusers_velocity(x[i : i + 1], t[i : i + 1], text[i : i + 1, :length])
        dit_checks.check_near(ours[i : i + 1], theirs)


@pytest.mark.comfy
def test_comfyui_computes_the_same_on_the_same_file(tmp_path: Path) -> None:
    """ComfyUI's class knows one depth alone: 344 modulations."""
    weights = tiny_dits.chroma_weights(num_layers=19, num_single_layers=38)
    parts = Chroma().load(Chroma().split(weights), tiny_tokenizers(tmp_path))
    x, t = inputs()
    text = torch.randn((2, 9, tiny_t5.WIDTH), generator=torch.Generator().manual_seed(1))
    ours = Chroma().predict(parts, x, t, (text, torch.ones((2, 9), dtype=torch.bool)))
    answer = comfy_peer.ask(
        tmp_path / "peer",
        COMFYUI,
        comfyui_arguments(19, 38),
        # ComfyUI renames so what it reads from a file
        {
            k.removesuffix(".scale") + ".weight" if k.endswith(".scale") else k: v
            for k, v in dit_checks.below(weights).items()
        },
        {"x": x, "timestep": t / 1000, "context": text, "guidance": torch.zeros(2)},
        [{"x": "x", "timestep": "timestep", "context": "context", "guidance": "guidance"}],
    )
    dit_checks.check_near(ours, answer.outputs[0])


def tiny_tokenizers(folder: Path) -> dict[str, Any]:
    """Return the tokenizer that a tiny base takes."""
    from transformers import T5TokenizerFast

    return {"text_encoder": T5TokenizerFast.from_pretrained(tiny_t5.write_t5_tokenizer(folder / "t5"))}


def test_half_precision_is_near(base: api.Base) -> None:
    parts = base.load()
    x, t = inputs()
    cond = dit_checks.conditioning(base, parts, ["a", "bb"], Reading(t5_length=16))
    exact = Chroma().predict(parts, x, t, cond)
    parts.denoiser.to(torch.bfloat16)
    parts.dtype = torch.bfloat16
    near = Chroma().predict(parts, x, t, cond).float()
    assert (near - exact).norm() / exact.norm() < 0.05


# ---- texts and images ----


def test_texts_are_encoded_as_diffusers_pipeline_does(base: api.Base, parts: Parts) -> None:
    from diffusers import ChromaPipeline

    captions = ["a cat", "", "x" * 40]
    pipeline = ChromaPipeline(
        scheduler=None,
        vae=None,
        text_encoder=tiny_t5.random_t5(),
        tokenizer=parts.tokenizer,
        transformer=None,
    )
    text, _, mask, *_ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=32, device=torch.device("cpu")
    )
    ours, seen = dit_checks.conditioning(base, parts, captions, Reading(t5_length=32))
    torch.testing.assert_close(ours, text, atol=1e-6, rtol=1e-6)
    assert torch.equal(seen, mask)
    assert seen.sum(1).int().tolist() == [
        len("a cat") + 3,
        2,
        32,
    ]  # a space before, an end and a place of padding


def test_a_long_prompt_is_read_to_its_end(parts: Parts) -> None:
    reading = Chroma().reading_for(parts, ["x" * 600], Reading())
    assert reading.t5_length == 640  # 602 tokens and a place of padding, in steps of 64
    assert Chroma().reading_for(parts, ["x"], Reading()).t5_length == 64
    assert Chroma().reading_for(parts, ["x" * 2000], Reading()).t5_length == 1024


def test_images_become_latents_as_diffusers_has_it(parts: Parts) -> None:
    vae = tiny_dits.random_vae()
    pixels = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(2)) * 2 - 1
    family = Chroma()
    moments = family.encode_images(parts, pixels)
    with torch.no_grad():
        theirs = (vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611  # type: ignore[operator]
        decoded = vae.decode(theirs / 0.3611 + 0.1159).sample  # type: ignore[operator]
    latents = family.latents(moments, torch.zeros_like(moments["mean"]))
    torch.testing.assert_close(latents, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(family.decode(parts, latents), decoded, atol=1e-5, rtol=1e-5)


def test_shapes_are_as_announced(base: api.Base) -> None:
    dit_checks.check_shapes(base)


# ---- names ----


def test_weights_are_shared_and_survive_the_way_there_and_back(base: api.Base) -> None:
    weights = tiny_dits.chroma_weights()
    opened = api.open_base_from_weights(weights, name="x", tokenizers=base.tokenizer_folders)
    assert opened.family.name == "chroma"
    dit_checks.check_shared(opened, weights)
    again = Chroma().join(Chroma().split(weights))
    assert set(again) == set(weights)
    assert all(torch.equal(again[k], v) for k, v in weights.items())
    assert "model.diffusion_model.distilled_guidance_layer.norms.0.scale" in weights


def test_the_names_that_comfyui_holds_are_read_too(base: api.Base) -> None:
    held = {
        k.replace(".scale", ".weight")
        .replace("cond_stage_model.", "text_encoders.")
        .replace("first_stage_model.", "vae."): v
        for k, v in tiny_dits.chroma_weights().items()
    }
    opened = api.open_base_from_weights(held, name="x", tokenizers=base.tokenizer_folders)
    assert opened.weights_hash == base.weights_hash


def test_a_missing_and_an_unknown_tensor_are_refused(base: api.Base) -> None:
    for change in ("missing", "unknown"):
        weights = tiny_dits.chroma_weights()
        name = "model.diffusion_model.double_blocks.1.img_mlp.0.bias"
        value = weights.pop(name)
        if change == "unknown":
            weights |= {name: value, "model.diffusion_model.double_blocks.1.extra": value}
        opened = api.open_base_from_weights(weights, name="x", tokenizers=base.tokenizer_folders)
        with pytest.raises(LoraGraftError) as caught:
            opened.load()
        assert caught.value.code == "LG-BASE-003" and change in caught.value.where


def test_only_chroma_is_taken_for_chroma() -> None:
    weights = tiny_dits.chroma_weights()
    assert [name for name, family in FAMILIES.items() if family.detect(weights)] == ["chroma"]
    pixels = {**weights, "model.diffusion_model.nerf_blocks.0.norm.scale": torch.ones(1)}
    assert not Chroma().detect(pixels)
    flux = {k: v for k, v in weights.items() if "distilled_guidance_layer" not in k}
    assert not Chroma().detect(flux)
    assert detect(weights, where="x").name == "chroma"


def test_the_released_models_shape_is_read_from_its_weights() -> None:
    from diffusers import ChromaTransformer2DModel

    with torch.device("meta"):
        theirs = ChromaTransformer2DModel()
    read = dit_checks.check_shapes_are_read(theirs, chroma_from_diffusers, chroma_config, ChromaTransformer)
    assert read == FULL_SIZE


def test_the_lora_has_the_references_modules() -> None:
    with torch.device("meta"):
        denoiser = ChromaTransformer(**FULL_SIZE)  # type: ignore[arg-type]
    parts = Parts(denoiser, torch.nn.Module(), torch.nn.ModuleDict(), {})
    dit_checks.check_golden_modules("chroma", parts, "chroma_dim16")


@pytest.mark.parametrize(
    ("preset", "count"),
    [("", 20), ("full", 20), ("attn-only", 12), ("unet-transformer-only", 20), ("everything", 29 + 14)],
)
def test_presets_name_sets_of_layers(parts: Parts, preset: str, count: int) -> None:
    targets = Chroma().targets(parts, convolutions=False, preset=preset)
    assert len(targets) == count
    assert len({t.key for t in targets}) == count
    assert {t.kind for t in targets} == ({"linear", "norm"} if preset == "everything" else {"linear"})


def test_settings_for_u_nets_are_refused(parts: Parts) -> None:
    for given in ({"convolutions": True}, {"convolutions": False, "preset": "unet-convblock-only"}):
        with pytest.raises(LoraGraftError) as caught:
            Chroma().targets(parts, **given)  # type: ignore[arg-type]
        assert caught.value.code == "LG-CFG-004"


@pytest.mark.comfy
def test_comfyui_knows_every_key_of_the_lora(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_comfyui_reads_the_lora(base, tmp_path, COMFYUI, comfyui_arguments(2, 2))


def test_a_diffusers_folder_is_the_same_base(base: api.Base, tmp_path: Path) -> None:
    parts = tiny_dits.folder_parts(tiny_dits.random_chroma(), tiny_dits.random_vae(), tiny_t5.random_t5())
    dit_checks.check_folder(base, parts, tmp_path / "folder")


# ---- training and drawing ----


def test_gradients_reach_the_adapters_alone(base: api.Base) -> None:
    dit_checks.check_gradients(base, LATENT)


def test_images_are_drawn(base: api.Base) -> None:
    dit_checks.check_sampling(base)


def test_a_run_resumes_to_the_same_bytes(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_training(base, tmp_path)
