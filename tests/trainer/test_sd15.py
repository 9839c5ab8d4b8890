"""SD1.x: modules, names and tokens as the reference has them, and what its parts compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.families import drawing
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.autoencoder import vae_config
from loragraft.trainer.families.names import ldm_keys as keys
from loragraft.trainer.families.sd15 import SCALING_FACTOR, SD15, config_of
from loragraft.trainer.families.text.clip_text import text_config
from loragraft.trainer.families.text.tokenizers import load_tokenizer
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal, golden

GOLDEN_LORA = golden("lora_keys")
GOLDEN_TOKENS = golden("token_chunks")
SD15_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


# What diffusers' converters want to know of the tiny modules.
PEER_UNET = {
    "layers_per_block": 2,
    "class_embed_type": None,
    "addition_embed_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PEER_VAE = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}


@pytest.fixture(scope="module")
def full_size() -> Parts:
    """Return SD1.5's modules in full size, without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    return tiny.parts_of(unet, vae, text)


# ---- names and shapes at full size ----


@pytest.mark.parametrize(("case", "conv"), [("sd15_lora_dim32", None), ("sd15_locon_dim32_conv4", 4)])
def test_the_lora_of_sd15_has_exactly_the_references_tensors(
    full_size: Parts, case: str, conv: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.empty(shape, device="meta"))
    expected = GOLDEN_LORA[case]
    targets = SD15().targets(full_size, convolutions=conv is not None)
    adapter = network.inject(full_size, network.Settings(32, 16, conv, 1.0, seed=0), targets)
    found: dict[str, list[int]] = {}
    for m in adapter.modules:
        found[f"{m.target.key}.alpha"] = []
        found[f"{m.target.key}.lora_down.weight"] = list(m.low.down.shape)
        found[f"{m.target.key}.lora_up.weight"] = list(m.low.up.shape)
    network.remove(full_size, adapter)
    assert found == expected["keys"]
    assert len(found) == expected["num_tensors"]
    assert {m.alpha for m in adapter.modules if m.target.kind == "linear"} == {16.0}
    assert {m.alpha for m in adapter.modules if m.target.kind == "conv"} == ({1.0} if conv else set())


def test_full_size_shapes_are_read_from_the_weights(full_size: Parts) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae, text = (m.state_dict() for m in (full_size.denoiser, full_size.vae, full_size.text_encoder))
    with torch.device("meta"):
        again = UNet2DConditionModel(**config_of(unet)).state_dict()
        vae_again = AutoencoderKL(**vae_config(vae, scaling_factor=SCALING_FACTOR)).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in unet.items()}
    assert {k: v.shape for k, v in vae_again.items()} == {k: v.shape for k, v in vae.items()}
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.items()}
    config = text_config(named)
    assert {k: config[k] for k in SD15_TEXT} == SD15_TEXT


def test_full_size_names_go_both_ways(full_size: Parts) -> None:
    unet, vae = full_size.denoiser.state_dict(), full_size.vae.state_dict()
    for state, to_ldm, to_diffusers, count in (
        (unet, keys.unet_to_ldm, keys.unet_to_diffusers, 686),
        (vae, keys.vae_to_ldm, keys.vae_to_diffusers, 248),
    ):
        there = to_ldm(state)
        assert len(state) == len(there) == count
        assert sorted(there.values()) == sorted(state)
        assert to_diffusers(there) == {old: new for new, old in there.items()}
    there = keys.unet_to_ldm(unet)
    for known in (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.3.0.op.weight",
        "middle_block.1.proj_in.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        "time_embed.0.weight",
        "out.2.bias",
    ):
        assert known in there


def test_names_agree_with_diffusers_own_converters(weights: dict[str, torch.Tensor]) -> None:
    from diffusers.loaders import single_file_utils as peer

    ours = SD15().split(weights)
    unet = peer.convert_ldm_unet_checkpoint(dict(weights), PEER_UNET)
    vae = peer.convert_ldm_vae_checkpoint(dict(weights), PEER_VAE)
    for part, theirs in (("denoiser", unet), ("vae", vae)):
        assert set(ours[part]) == set(theirs)
        assert all(torch.equal(ours[part][k], v.reshape(ours[part][k].shape)) for k, v in theirs.items())


# ---- tokens ----


def clip_tokenizer() -> Path | None:
    """Return CLIP's real tokenizer folder from LORAGRAFT_TOKENIZERS or a ComfyUI, if there is one."""
    for variable, folder in (("LORAGRAFT_TOKENIZERS", "clip_l"), ("COMFYUI_PATH", "comfy/sd1_tokenizer")):
        place = Path(os.environ.get(variable, ""), folder)
        if os.environ.get(variable) and (place / "vocab.json").is_file():
            return place
    return None


@pytest.mark.skipif(
    clip_tokenizer() is None, reason="no CLIP tokenizer: set LORAGRAFT_TOKENIZERS or COMFYUI_PATH"
)
def test_token_chunks_equal_the_reference() -> None:
    tokenizer = load_tokenizer(str(clip_tokenizer()))
    parts = Parts(nn.Identity(), nn.Identity(), nn.ModuleDict(), {"text_encoder": tokenizer})
    for case in GOLDEN_TOKENS:
        (ids,) = SD15().tokenize(parts, [case["caption"]], Reading(case["max_token_length"]))[0].tolist()
        assert ids == case["input_ids"], (case["max_token_length"], case["caption"])


def test_long_captions_are_cut_into_chunks_that_each_have_their_ends(base: api.Base) -> None:
    """The same as the reference's chunks, here on the tiny tokenizer: one token a letter."""
    parts = base.load()
    letters = "abcdefghij" * 20
    one = {c: parts.tokenizer.convert_tokens_to_ids(c) for c in "abcdefghij"}
    start, end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    body = [one[c] for c in letters[:-1]] + [parts.tokenizer.convert_tokens_to_ids("j</w>")]
    for length in (75, 150, 225):
        (ids,) = base.family.tokenize(parts, [letters], Reading(length))[0].tolist()
        assert len(ids) == length // 75
        padded = (body + [end] * 225)[:length]
        for i, chunk in enumerate(ids):
            assert chunk == [start, *padded[i * 75 : (i + 1) * 75], end]
        (empty,) = base.family.tokenize(parts, [""], Reading(length))[0].tolist()
        assert empty == [[start] + [end] * 76] * (length // 75)


# ---- text ----


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("length", [75, 225])
def test_text_is_encoded_chunk_by_chunk(base: api.Base, length: int, clip_skip: int) -> None:
    parts = base.load()
    parts.text_encoder.float()
    captions = ["zibu, blue, " * 15, ""]
    ids = base.family.tokenize(parts, captions, Reading(length))[0]
    found = base.family.encode_text(parts, (ids,), Reading(clip_skip=clip_skip))[0]
    assert found.shape == (2, length + 2, tiny.TEXT)
    body = getattr(parts.text_encoder, "text_model", parts.text_encoder)
    for i in range(2):
        pieces = []
        for chunk in ids[i]:
            out = parts.text_encoder(chunk[None], output_hidden_states=True)
            hidden = out.last_hidden_state if clip_skip == 1 else body.final_layer_norm(out.hidden_states[-2])
            pieces.append(hidden[0])
        plain = torch.cat([pieces[0][:1], *(p[1:-1] for p in pieces), pieces[-1][-1:]])
        torch.testing.assert_close(found[i], plain, rtol=1e-5, atol=1e-6)


def test_clip_skip_leaves_out_layers_from_the_end(base: api.Base) -> None:
    """Checked without the library's bookkeeping: a network that ends one layer earlier gives the same."""
    parts = base.load()
    parts.text_encoder.float()
    ids = base.family.tokenize(parts, ["zibu"], Reading(75))[0]
    full = base.family.encode_text(parts, (ids,), Reading(clip_skip=1))[0]
    skipped = base.family.encode_text(parts, (ids,), Reading(clip_skip=2))[0]
    body = getattr(parts.text_encoder, "text_model", parts.text_encoder)
    body.encoder.layers = body.encoder.layers[:1]
    torch.testing.assert_close(base.family.encode_text(parts, (ids,), Reading(clip_skip=1))[0], skipped)
    assert not torch.allclose(full, skipped, atol=1e-3)


def test_clip_skip_beyond_the_text_encoders_layers_is_refused(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    with Refusal("LG-CFG-008", "clip_skip", "2"):
        runs.Training(base, train_set, places).events(clip_skip=3)


def test_clip_skip_two_trains_all_but_the_last_layer(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    """The reference's check: with clip_skip 2 exactly the last layer's six up tensors stay zero."""
    training = runs.Training(base, train_set, places)
    events = training.events(clip_skip=2, max_train_steps=2)
    tensors = api.lora_tensors(runs.only(events, api.Finished).lora_file)
    zero = {k for k, v in tensors.items() if not v.any()}
    last = "lora_te_text_model_encoder_layers_1"
    modules = [f"self_attn_{n}_proj" for n in "kvq"] + ["self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    assert zero == {f"{last}_{m}.lora_up.weight" for m in modules}
    assert runs.of(events, api.Saved)[-1].zero_tensors == 6
    events = training.events(clip_skip=1, max_train_steps=2)
    assert runs.of(events, api.Saved)[-1].zero_tensors == 0


# ---- drawing ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_vae_draws_in_full_precision(
    base: api.Base, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 overflows in SD1.x's VAE, and autocast would bring it in by the back door."""
    from loragraft.trainer.engine.precision import place, resolve

    parts, resolved = base.load(), resolve(precision, torch.device("cpu"))
    place(parts, resolved)
    seen: list[torch.dtype] = []
    parts.vae.decoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad():
        (image,) = drawing.sample(
            base.family,
            parts,
            ["a"],
            seeds=[1],
            size=(32, 48),
            steps=1,
            guided=drawing.Guided(cfg=2.0),
            reading=Reading(),
        )
    assert image.size == (48, 32)
    assert seen == [torch.float32]


def test_a_drawing_depends_on_its_seed_and_prompt_not_on_its_batch(base: api.Base) -> None:
    from loragraft.trainer.engine.precision import place, resolve

    parts = base.load()
    place(parts, resolve("fp32", torch.device("cpu")))

    def draw(prompts: list[str], seeds: list[int], negative: str = "") -> list[bytes]:
        options: dict[str, Any] = {"size": (32, 32), "steps": 2, "reading": Reading()}
        guided = drawing.Guided(negative, 3.0)
        found = drawing.sample(base.family, parts, prompts, seeds=seeds, guided=guided, **options)
        return [image.tobytes() for image in found]

    (plain,) = draw(["zibu"], [1])
    assert draw(["zibu"], [1]) == [plain]
    assert draw(["zibu"], [2]) != [plain]
    assert draw(["zibu"], [1], negative="blue") != [plain]
    assert draw(["zibu " * 40], [1]) != [plain]
    assert draw(["red"], [1]) != [plain]
