"""Qwen-Image: its names, what its parts compute as diffusers' do, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.config import TrainConfig
from loragraft.trainer.contradictions.family import check
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families import qwen_image as module
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.qwen_vae import file_names, vae_config, vae_names
from loragraft.trainer.families.qwen_image import CHAT, QwenImage, transformer_config
from loragraft.trainer.families.text.qwen_text import qwen_config
from loragraft.trainer.families.text.tokenizers import KINDS, load_tokenizer
from loragraft.trainer.parts import Parts
from loragraft_tests.conftest import comfyui_path
from loragraft_tests.trainer import tiny_qwen as tiny
from loragraft_tests.trainer.data_folders import Refusal

FAMILY = QwenImage()
CAPTIONS = ["zibu, blue", "a caption of more than one row", ""]
READING = Reading(t5_length=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))), "qwen")


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return tiny.qwen_image_modules()


@pytest.fixture(scope="module")
def file(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return tiny.qwen_image_file(modules)


@pytest.fixture(scope="module")
def parts(file: dict[str, torch.Tensor], tokenizer: Any) -> Parts:
    return FAMILY.load(FAMILY.split(file), {"text_encoder": tokenizer})


def noisy(height: int = 12, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents (3, 16, h, w) and timesteps (3,)."""
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(3, 16, height, width, generator=drawn), torch.tensor([30.0, 500.0, 998.5])


def conditioning(parts: Parts, reading: Reading = READING) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return FAMILY.encode_text(parts, FAMILY.tokenize(parts, CAPTIONS, reading), reading)


# ---- names ----


def test_a_checkpoint_is_known_and_no_other_family_takes_it(file: dict[str, torch.Tensor]) -> None:
    assert [name for name, family in FAMILIES.items() if family.detect(file)] == ["qwen_image"]


def test_names_go_both_ways_and_nothing_is_copied(file: dict[str, torch.Tensor], parts: Parts) -> None:
    again = FAMILY.join(FAMILY.split(file))
    text = "text_encoders.qwen25_7b.transformer."
    left_out = {k for k in file if k.startswith((f"{text}visual.", f"{text}lm_head."))}
    assert len(left_out) > 10 and set(file) - set(again) == left_out and not set(again) - set(file)
    assert all(again[name].data_ptr() == file[name].data_ptr() for name in again)
    trees = (parts.denoiser, parts.vae, parts.text_encoder)
    held = {p.data_ptr() for tree in trees for p in tree.parameters()}
    assert held <= {weight.data_ptr() for weight in file.values()}


def test_a_checkpoint_with_ldms_prefix_is_read_too(file: dict[str, torch.Tensor]) -> None:
    renamed = {re.sub(r"^vae\.", "first_stage_model.", k): v for k, v in file.items()}
    a, b = FAMILY.split(renamed)["vae"], FAMILY.split(file)["vae"]
    assert set(a) == set(b) and len(a) > 50
    assert all(a[k].equal(b[k]) for k in a)


def test_a_diffusers_folder_gives_the_same_weights(
    modules: dict[str, nn.Module], file: dict[str, torch.Tensor]
) -> None:
    folder = {part: modules[name].state_dict() for part, name in FAMILY.folders.items()}
    there, here = FAMILY.from_folder(folder), FAMILY.split(file)
    for part in here:
        assert set(there[part]) == set(here[part])
        assert all(there[part][name].equal(here[part][name]) for name in here[part])


def test_full_size_shapes_are_read_from_the_weights() -> None:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2Config, Qwen2Model

    shape = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    with torch.device("meta"):
        transformer, vae = QwenImageTransformer2DModel().state_dict(), AutoencoderKLQwenImage().state_dict()
        text = Qwen2Model(Qwen2Config(**shape, **heads)).state_dict()
        again = QwenImageTransformer2DModel(**transformer_config(transformer))
        vae_again = AutoencoderKLQwenImage(**vae_config(vae))
    assert again.config["axes_dims_rope"] == (16, 56, 56) and again.config["num_attention_heads"] == 24
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in transformer.items()}
    assert vae_again.config["temperal_downsample"] == [False, True, True]
    assert {k: v.shape for k, v in vae_again.state_dict().items()} == {k: v.shape for k, v in vae.items()}
    names = file_names(vae)
    assert sorted(names.values()) == sorted(vae) and len(names) == 194
    assert vae_names(names) == {old: new for new, old in names.items()}
    for known in (
        "decoder.upsamples.7.time_conv.weight",
        "encoder.downsamples.2.resample.1.weight",
        "conv2.bias",
    ):
        assert known in names
    config = qwen_config(text)
    assert {k: config[k] for k in (*shape, *heads)} == {**shape, **heads}


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("__index_timestep_zero__", "Qwen-Image-Edit-2511"),
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    ],
)
def test_relatives_are_refused(
    file: dict[str, torch.Tensor], tokenizer: Any, name: str, relative: str
) -> None:
    weights = {**file, f"model.diffusion_model.{name}": torch.zeros(2)}
    with Refusal("LG-BASE-004", relative):
        FAMILY.load(FAMILY.split(weights), {"text_encoder": tokenizer})


def test_an_autoencoder_of_pictures_with_layers_is_refused(
    file: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    with Refusal("LG-BASE-004", "4 colour channels"):
        FAMILY.load(
            FAMILY.split({**file, "vae.encoder.conv1.weight": torch.zeros(8, 4, 3, 3, 3)}),
            {"text_encoder": tokenizer},
        )


def test_mage_flow_with_the_same_names_is_another_architecture(file: dict[str, torch.Tensor]) -> None:
    name = "model.diffusion_model.img_in.weight"
    assert not FAMILY.detect({**file, name: torch.zeros(64, 128)})


# ---- older libraries, other tokenizers ----


@pytest.mark.parametrize("lacking", ["compute_text_seq_len_from_mask", "QwenImageTransformer2DModel"])
def test_an_older_diffusers_is_refused_with_the_remedy(
    file: dict[str, torch.Tensor], tokenizer: Any, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.models.transformers import transformer_qwenimage

    monkeypatch.delattr(transformer_qwenimage, lacking)
    monkeypatch.setattr(diffusers, "__version__", "0.35.2")
    with Refusal("LG-BASE-010", "Qwen-Image needs a newer diffusers", "0.35.2", "diffusers>=0.37", "3.11"):
        FAMILY.load(FAMILY.split(file), {"text_encoder": tokenizer})


def test_a_diffusers_without_the_module_is_refused(
    file: dict[str, torch.Tensor], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    name = "diffusers.models.transformers.transformer_qwenimage"
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with Refusal("LG-BASE-010", "Qwen-Image needs a newer diffusers"):
        FAMILY.load(FAMILY.split(file), {"text_encoder": tokenizer})


def test_a_tokenizer_without_the_marks_of_a_chat_is_refused(
    file: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    class Plain:
        def __len__(self) -> int:
            return 256

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    with Refusal("LG-BASE-006", "<|im_start|>"):
        FAMILY.load(FAMILY.split(file), {"text_encoder": Plain()})


def test_a_tokenizer_with_more_entries_than_embeddings_is_refused(
    file: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    name = "text_encoders.qwen25_7b.transformer.model.embed_tokens.weight"
    with Refusal("LG-BASE-006", "259 entries", "258"):
        FAMILY.load(FAMILY.split({**file, name: file[name][:258]}), {"text_encoder": tokenizer})


def test_the_real_tokenizer_hides_the_34_tokens_that_diffusers_drops() -> None:
    root = comfyui_path()
    folder = None if root is None else root / KINDS["qwen"].in_comfyui
    if folder is None or not KINDS["qwen"].lies_in(folder):
        pytest.skip("no ComfyUI: COMFYUI_PATH is not set to one")
    tokenizer = load_tokenizer(str(folder), "qwen")
    assert CHAT.hides(tokenizer) == 34
    ids, mask = module.chat_tokens(tokenizer, ["a cat"], Reading(t5_length=16), CHAT)
    assert ids[0, 34:43].tolist() == [64, 8251, 151645, 198, 151644, 77091, 198, 0, 0]
    assert mask.tolist() == [[1] * 7 + [0] * 9]


# ---- what the parts compute ----


@pytest.mark.parametrize("size", [(12, 8), (6, 22)])
def test_the_velocity_is_what_diffusers_predicts_of_each_caption_alone(
    parts: Parts, modules: dict[str, nn.Module], size: tuple[int, int]
) -> None:
    from diffusers import QwenImagePipeline

    x, t = noisy(*size)
    cond, mask = conditioning(parts)
    packed = QwenImagePipeline._pack_latents(x, 3, 16, *size)
    with torch.no_grad():
        ours = FAMILY.predict(parts, x, t, (cond, mask))
        for i, length in enumerate(int(n) for n in mask.sum(1)):
            theirs = modules["transformer"](
                packed[i : i + 1],
                timestep=t[i : i + 1] / 1000,
                encoder_hidden_states=cond[i : i + 1, :length],
                img_shapes=[[(1, size[0] // 2, size[1] // 2)]],
                return_dict=False,
            )[0]
            unpacked = QwenImagePipeline._unpack_latents(theirs, size[0] * 8, size[1] * 8, 8)[:, :, 0]
            torch.testing.assert_close(ours[i : i + 1], unpacked, rtol=1e-5, atol=2e-6)


def test_padding_changes_nothing(parts: Parts) -> None:
    x, t = noisy()
    with torch.no_grad():
        a, b = (FAMILY.predict(parts, x, t, conditioning(parts, Reading(t5_length=n))) for n in (50, 128))
        cond, mask = conditioning(parts)
        hidden = torch.where(mask.bool()[..., None], cond, torch.full_like(cond, 7.0))
        c = FAMILY.predict(parts, x, t, (hidden, mask))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(a, c, rtol=1e-5, atol=2e-6)


def test_the_timestep_keeps_its_digits_in_half_precision(
    file: dict[str, torch.Tensor], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {k: v.bfloat16() for k, v in file.items()}
    parts = FAMILY.load(FAMILY.split(half), {"text_encoder": tokenizer})
    parts.dtype = torch.bfloat16
    seen: list[torch.Tensor] = []
    embed = type(parts.denoiser.time_text_embed).forward
    monkeypatch.setattr(
        type(parts.denoiser.time_text_embed),
        "forward",
        lambda self, t, x: seen.append(t) or embed(self, t, x),
    )
    x, _ = noisy()
    with torch.no_grad():
        out = FAMILY.predict(parts, x, torch.tensor([997.3, 998.4, 999.5]), conditioning(parts))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(seen[0], torch.tensor([0.9973, 0.9984, 0.9995]))


def test_captions_are_encoded_as_diffusers_pipeline_does(
    parts: Parts, modules: dict[str, nn.Module], tokenizer: Any
) -> None:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(
        None, modules["vae"], modules["text_encoder"], tokenizer, modules["transformer"]
    )
    pipeline.prompt_template_encode_start_idx = CHAT.hides(tokenizer)  # in bytes, which are tokens here
    assert pipeline.prompt_template_encode == f"{CHAT.before}{{}}{CHAT.after}"
    cond, mask = conditioning(parts)
    assert [tuple(s) for s in (cond.shape[1:], mask.shape[1:])] == FAMILY.cond_shapes(parts, READING)
    with torch.no_grad():
        theirs, their_mask = pipeline.encode_prompt(list(CAPTIONS), device="cpu")
    assert mask[:, : their_mask.shape[1]].tolist() == their_mask.tolist()
    torch.testing.assert_close(cond[:, : theirs.shape[1]], theirs, rtol=1e-4, atol=2e-5)
    assert not mask[:, their_mask.shape[1] :].any() and not cond[~mask.bool()].any()


def test_long_captions_are_cut_and_readings_grow_with_them(parts: Parts) -> None:
    caption = "x" * 70
    ids, mask = FAMILY.tokenize(parts, [caption], READING)
    assert mask.sum() == 64 and ids.shape[1] == 64 + CHAT.hides(parts.tokenizer)
    assert FAMILY.reading_for(parts, ["a", caption], READING).t5_length == 128
    assert FAMILY.reading_for(parts, ["a"], Reading()).t5_length == 64
    assert FAMILY.reading_for(parts, ["x" * 5000], Reading()).t5_length == 1024
    assert FAMILY.cond_shapes(parts, Reading())[1] == (512,)


def test_images_go_to_latents_and_back_as_in_diffusers(parts: Parts, modules: dict[str, nn.Module]) -> None:
    vae: Any = modules["vae"]
    mean, std = (
        torch.tensor(x).view(1, 16, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = FAMILY.latents(FAMILY.encode_images(parts, pixels), noise)
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        theirs = (posterior.mean + posterior.std * noise[:, :, None] - mean) / std
        torch.testing.assert_close(latents, theirs[:, :, 0], rtol=1e-5, atol=1e-6)
        assert tuple(latents.shape[1:]) == FAMILY.latent_shape(parts, 32, 48)
        back = vae.decode(theirs * std + mean).sample[:, :, 0]
        torch.testing.assert_close(FAMILY.decode(parts, latents), back, rtol=1e-5, atol=1e-5)
        assert back.std() > 0.01


def test_sampling_follows_the_published_schedule() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    steps, tokens = 20, 83 * 83
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    torch.testing.assert_close(
        FAMILY.objective.sigmas_for(steps, (1328, 1328)), scheduler.sigmas, rtol=0, atol=2e-6
    )


# ---- what is trained ----


def full_size() -> Parts:
    """Return the transformer in full size, without weights."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        return Parts(QwenImageTransformer2DModel(), nn.Module(), nn.ModuleDict(), {})


def test_the_lora_has_the_references_modules_that_learn() -> None:
    """kohya's musubi-tuner trains all layers of the blocks but the modulations; four of them never learn."""
    parts = full_size()
    found = FAMILY.targets(parts, convolutions=False)
    theirs = {
        f"lora_unet_{path.replace('.', '_')}"
        for path, layer in parts.denoiser.named_modules()
        if isinstance(layer, nn.Linear) and path.startswith("transformer_blocks.") and "_mod." not in path
    }
    unread = {f"lora_unet_transformer_blocks_59_{name.replace('.', '_')}" for name in module.UNREAD}
    assert len(theirs) == 720 and unread < theirs
    assert {t.key for t in found} == theirs - unread
    assert len(found) == 716


def test_what_is_left_out_gets_no_gradient(parts: Parts) -> None:
    for parameter in parts.denoiser.parameters():
        parameter.requires_grad_(True)
    x, t = noisy()
    FAMILY.predict(parts, x, t, conditioning(parts)).square().mean().backward()
    silent = {name for name, p in parts.denoiser.named_parameters() if p.grad is None or not p.grad.any()}
    for parameter in parts.denoiser.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    last = "transformer_blocks.1."
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in silent} == {
        *(last + name for name in module.UNREAD),
        f"{last}attn.norm_added_q",
    }


@pytest.mark.parametrize(
    ("preset", "count"),
    [("", 20), ("attn-mlp", 20), ("attn-only", 14), ("full", 24), ("everything", 30)],
)
def test_presets_name_sets_of_layers(parts: Parts, preset: str, count: int) -> None:
    found = FAMILY.targets(parts, convolutions=False, preset=preset)
    linear = [t for t in found if t.kind == "linear"]
    assert len(linear) == count and len({t.key for t in found}) == len(found)
    assert any("_mod_1" in t.key for t in found) == (preset in ("full", "everything"))


def test_settings_without_a_meaning_here_are_refused() -> None:
    values: dict[str, Any] = {
        "clip_skip": 2,
        "max_token_length": 150,
        "tokenizer_repeats": 2,
        "conv_dim": 4,
        "weighted_captions": True,
        "train_embeddings": ("zibu",),
        "guidance_scale": 3.5,
        "apply_t5_attn_mask": True,
        "attention": "plain",
        "train_norm": True,
        "text_encoder_lr": 1e-5,
        "min_snr_gamma": 5.0,
    }
    assert set(FAMILY.ignored) < set(values)
    for name, value in values.items():
        with Refusal("LG-CFG-004", name, "qwen_image"):
            check(dataclasses.replace(TrainConfig(), **{name: value}), FAMILY)
    check(TrainConfig(), FAMILY)
