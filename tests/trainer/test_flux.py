"""Flux.1: names and shares of its weights, its outputs against other implementations, its modules' names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loragraft.trainer.config import TrainConfig
from loragraft.trainer.contradictions.family import check
from loragraft.trainer.engine import checkpointing
from loragraft.trainer.engine.frozen import freeze
from loragraft.trainer.engine.precision import KEPT_WHOLE
from loragraft.trainer.engine.swap import Swap
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families import FAMILIES, detect, opening
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.flux_blocks import FluxTransformer
from loragraft.trainer.families.names import flux_keys
from loragraft.trainer.families.targets.flux_targets import find_flux_targets
from loragraft.trainer.parts import Parts
from loragraft_tests.conftest import TESTS
from loragraft_tests.trainer import tiny_flux
from loragraft_tests.trainer.tiny_flux import Folders

CAPTIONS = ["a cat", "on the mat, with a long tail"]
READING = Reading(t5_length=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the tiny tokenizers."""
    return tiny_flux.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def parts(folders: Folders) -> Parts:
    """Return a tiny dev."""
    return cast(Parts, tiny_flux.load_parts(folders))


def inputs(channels: int = tiny_flux.LATENT) -> dict[str, torch.Tensor]:
    """Return noisy latents that are not square, two times, and a conditioning."""
    drawn = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, channels, 6, 8, generator=drawn),
        "t": torch.tensor([433.3, 12.7]),
        "text": torch.randn(2, 7, 32, generator=drawn),
        "pooled": torch.randn(2, 64, generator=drawn),
        "seen": torch.tensor([[True] * 5 + [False] * 2, [True] * 2 + [False] * 5]),
    }


def diffusers_output(model: Any, guidance: float | None, given: dict[str, torch.Tensor], masked: bool) -> Any:
    """Return what diffusers' transformer and its pipeline's packing make of the inputs."""
    from diffusers import FluxPipeline

    latents, seen = given["latents"], given["seen"]
    batch, channels, height, width = latents.shape
    places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    mask = torch.cat([seen, seen.new_ones(batch, height * width // 4)], 1)[:, None, None]
    out = model(
        hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=given["text"],
        pooled_projections=given["pooled"],
        timestep=given["t"] / 1000,
        img_ids=places,
        txt_ids=torch.zeros(given["text"].shape[1], 3),
        guidance=None if guidance is None else torch.full((batch,), guidance),
        joint_attention_kwargs={"attention_mask": mask} if masked else None,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(out, height * 8, width * 8, 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("width", "head_dim", "guided"), [(128, 128, True), (64, 32, True), (128, 128, False)]
)
@torch.no_grad()
def test_it_computes_what_diffusers_does(width: int, head_dim: int, guided: bool, masked: bool) -> None:
    theirs = tiny_flux.random_transformer(guided=guided, width=width, head_dim=head_dim)
    family, given = tiny_flux.family(guided=guided), inputs()
    from loragraft.trainer.families.modules.flux_blocks import flux_config

    weights = flux_keys.from_diffusers(theirs.state_dict())
    ours = FluxTransformer(**flux_config(weights))
    ours.load_state_dict(dict(weights))
    holder = Parts(ours, nn.Module(), nn.ModuleDict(), {})
    cond = (given["text"], given["pooled"], *([given["seen"].long()] if masked else []))
    found = family.predict(holder, given["latents"], given["t"], cond, None, 1.75 if guided else None)
    expected = diffusers_output(theirs, 1.75 if guided else None, given, masked)
    scale = expected.abs().max().item()
    assert scale > 0.1, "the test model does something"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale)
    unmasked = family.predict(holder, given["latents"], given["t"], cond[:2], None, 1.75)
    assert masked != torch.equal(found, unmasked)


def test_guidance_reaches_dev_alone(folders: Folders) -> None:
    given = inputs()
    cond = given["text"], given["pooled"]
    for guided in (True, False):
        own = tiny_flux.family(guided=guided)
        loaded = tiny_flux.load_parts(folders, guided=guided)
        with torch.no_grad():
            a, b = (own.predict(loaded, given["latents"], given["t"], cond, None, g) for g in (1.0, 3.5))
            usual = own.predict(loaded, given["latents"], given["t"], cond)
        assert guided != torch.equal(a, b)
        assert torch.equal(usual, b), "without a scale it is the one that images are drawn with"


@pytest.mark.parametrize("guided", [True, False])
def test_single_files_and_folders_find_their_way_there_and_back(guided: bool) -> None:
    own, folder = tiny_flux.family(guided=guided), tiny_flux.random_folder(guided=guided)
    weights = tiny_flux.single_file_weights(guided=guided)
    split, from_folder = own.split(weights), own.from_folder(folder)
    for part, sd in from_folder.items():
        assert sorted(sd) == sorted(split[part])
        for name in sd:
            torch.testing.assert_close(split[part][name], sd[name], rtol=0, atol=0)
    again = own.join(split)
    assert sorted(again) == sorted(weights)
    assert all(torch.equal(again[name], weights[name]) for name in again)


def test_names_in_a_file_are_those_of_its_authors_and_of_comfyui() -> None:
    names = set(tiny_flux.single_file_weights())
    assert "model.diffusion_model.double_blocks.1.img_attn.norm.query_norm.scale" in names
    assert "model.diffusion_model.single_blocks.0.linear1.bias" in names
    assert "vae.decoder.up.0.block.0.conv1.weight" in names
    assert "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight" in names
    assert "text_encoders.t5xxl.transformer.shared.weight" in names
    assert not any(name.endswith(("embed_tokens.weight", "position_ids")) for name in names)


def test_other_names_of_the_same_weights_are_read() -> None:
    """As ComfyUI holds them, and with what its CLIP has beside the text model."""
    weights = tiny_flux.single_file_weights()
    renamed = {}
    for name, tensor in weights.items():
        held = name.replace("_norm.scale", "_norm.weight").replace("vae.", "first_stage_model.")
        renamed[held] = tensor
    renamed["text_encoders.clip_l.transformer.text_projection.weight"] = torch.ones(64, 64)
    renamed["text_encoders.clip_l.logit_scale"] = torch.ones(1)
    renamed["text_encoders.clip_l.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    own = tiny_flux.family()
    split, expected = own.split(renamed), own.split(weights)
    for part, sd in expected.items():
        assert sorted(split[part]) == sorted(sd)
        assert all(torch.equal(split[part][name], sd[name]) for name in sd)


def test_loading_copies_nothing(folders: Folders) -> None:
    from loragraft.trainer.families.text.tokenizers import load_tokenizer

    own, weights = tiny_flux.family(), tiny_flux.single_file_weights()
    tokenizers = {"text_encoder": load_tokenizer(str(folders.clip), "clip")}
    tokenizers["text_encoder_2"] = load_tokenizer(str(folders.t5), "t5")
    loaded = own.load(own.split(weights), tokenizers)
    known = {tensor.data_ptr() for tensor in weights.values()}
    modules = (loaded.denoiser, loaded.vae, *loaded.text_encoders.values())
    held = [p for module in modules for p in module.parameters()]
    assert all(p.data_ptr() in known for p in held)
    assert not any(p.requires_grad or p.is_meta for p in held)
    assert len({p.data_ptr() for p in held}) == len(weights)


@pytest.mark.parametrize("guided", [True, False])
def test_it_is_known_by_its_weights(guided: bool) -> None:
    weights = tiny_flux.single_file_weights(guided=guided)
    name = "flux" if guided else "flux_schnell"
    assert detect(weights, where="test").name == name
    assert [n for n, family in FAMILIES.items() if family.detect(weights)] == [name]
    held = {k.replace("_norm.scale", "_norm.weight"): v for k, v in weights.items()}
    assert [n for n, family in FAMILIES.items() if family.detect(held)] == [name]
    chroma = {k: v for k, v in weights.items() if "_mod." not in k and "vector_in" not in k}
    assert not any(family.detect(chroma) for n, family in FAMILIES.items() if n.startswith("flux"))


def test_models_that_see_a_second_picture_are_refused(folders: Folders) -> None:
    own, weights = tiny_flux.family(), tiny_flux.single_file_weights()
    name = "model.diffusion_model.img_in.weight"
    weights[name] = torch.cat([weights[name]] * 2, dim=1)
    with pytest.raises(LoraGraftError, match="LG-BASE-004") as caught:
        own.load(own.split(weights), {})
    assert "128 input channels, 64 output" in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("model.diffusion_model.double_blocks.1.txt_mlp.2.bias", "transformer"),
        ("model.diffusion_model.time_in.in_layer.weight", "transformer"),
        ("vae.encoder.conv_in.bias", "VAE"),
        ("text_encoders.clip_l.transformer.text_model.final_layer_norm.bias", "text encoder"),
        ("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight", "T5"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(folders: Folders, missing: str, part: str) -> None:
    from loragraft.trainer.families.text.tokenizers import load_tokenizer

    own, weights = tiny_flux.family(), tiny_flux.single_file_weights()
    del weights[missing]
    tokenizers = {"text_encoder": load_tokenizer(str(folders.clip), "clip")}
    tokenizers["text_encoder_2"] = load_tokenizer(str(folders.t5), "t5")
    with pytest.raises(LoraGraftError, match="LG-BASE-003") as caught:
        own.load(own.split(weights), tokenizers)
    assert part in str(caught.value)


def test_another_models_text_encoder_is_refused(folders: Folders) -> None:
    own, weights = tiny_flux.family(), tiny_flux.single_file_weights()
    name = "model.diffusion_model.txt_in.weight"
    weights[name] = torch.cat([weights[name]] * 2, dim=1)
    tokenizers: Any = {"text_encoder": None, "text_encoder_2": None}
    from loragraft.trainer.families.text.tokenizers import load_tokenizer

    tokenizers["text_encoder"] = load_tokenizer(str(folders.clip), "clip")
    tokenizers["text_encoder_2"] = load_tokenizer(str(folders.t5), "t5")
    with pytest.raises(LoraGraftError, match="LG-BASE-003") as caught:
        own.load(own.split(weights), tokenizers)
    assert "32 wide, the transformer reads 64" in str(caught.value)


@torch.no_grad()
def test_captions_become_t5s_states_and_clips_pooled_state(parts: Parts) -> None:
    own = tiny_flux.family()
    tokens = own.tokenize(parts, CAPTIONS, READING)
    assert [tuple(x.shape) for x in tokens] == [(2, 77), (2, 24), (2, 24)]
    hidden, pooled = own.encode_text(parts, tokens, READING)
    assert own.cond_shapes(parts, READING) == [tuple(x.shape[1:]) for x in (hidden, pooled)]
    clip: Any = parts.text_encoders["text_encoder"]
    assert torch.equal(pooled, clip(tokens[0]).pooler_output)
    end = tokens[0].argmax(-1)  # the end token has the highest number
    assert torch.equal(pooled, clip(tokens[0]).last_hidden_state[torch.arange(2), end])
    t5: Any = parts.text_encoders["text_encoder_2"]
    assert torch.equal(hidden, t5(input_ids=tokens[1]).last_hidden_state)


@torch.no_grad()
def test_hidden_padding_is_hidden_from_t5_and_from_the_transformer(parts: Parts) -> None:
    own, reading = tiny_flux.family(), Reading(t5_length=24, mask_padding=True)
    tokens = own.tokenize(parts, CAPTIONS, reading)
    cond = own.encode_text(parts, tokens, reading)
    assert own.cond_shapes(parts, reading) == [tuple(x.shape[1:]) for x in cond]
    assert torch.equal(cond[2], tokens[2])
    t5: Any = parts.text_encoders["text_encoder_2"]
    assert torch.equal(cond[0], t5(input_ids=tokens[1], attention_mask=tokens[2]).last_hidden_state)
    assert not torch.allclose(cond[0], own.encode_text(parts, tokens, READING)[0])
    given = inputs()
    before = own.predict(parts, given["latents"], given["t"], cond)
    cond[0][0, 10:] = 5.0  # padding of the first caption
    after = own.predict(parts, given["latents"], given["t"], cond)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    cond[0][0, 2] = 5.0
    assert not torch.allclose(own.predict(parts, given["latents"], given["t"], cond), before, atol=1e-3)


def test_captions_are_as_long_as_the_version_has_them(parts: Parts) -> None:
    dev, schnell = tiny_flux.family(), tiny_flux.family(guided=False)
    assert dev.tokenize(parts, CAPTIONS, Reading())[1].shape == (2, 512)
    assert schnell.tokenize(parts, CAPTIONS, Reading())[1].shape == (2, 256)
    assert dev.reading_for(parts, CAPTIONS, Reading()) == Reading(t5_length=512)
    assert dev.reading_for(parts, ["a" * 600], Reading()).t5_length == 602
    assert dev.reading_for(parts, ["a" * 30], Reading(t5_length=16)).t5_length == 32


@torch.no_grad()
def test_images_become_latents_of_16_channels_and_back(parts: Parts) -> None:
    own = tiny_flux.family()
    vae: Any = parts.vae
    moments = own.encode_images(parts, torch.rand(1, 3, 32, 48) * 2 - 1)
    noise = torch.randn(own.latent_shape(parts, 32, 48))[None]
    latents = own.latents(moments, noise)
    assert latents.shape == (1, 16, 4, 6)
    torch.testing.assert_close(latents, (moments["mean"] + moments["std"] * noise - 0.1159) * 0.3611)
    pixels = own.decode(parts, latents)
    expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def full_size() -> Parts:
    """Return a dev of its true size, without memory."""
    with torch.device("meta"):
        denoiser = FluxTransformer(
            width=3072,
            heads=24,
            inside=12288,
            channels=64,
            context=4096,
            pooled=768,
            double=19,
            single=38,
            guided=True,
        )
    return Parts(denoiser, nn.Module(), nn.ModuleDict(), {})


def test_modules_are_the_reference_trainers_in_its_order() -> None:
    golden = json.loads((TESTS / "golden" / "lora_modules.json").read_text())["flux_dev_dim16"]
    big, rank = full_size(), 16
    found: dict[str, list[list[int]]] = {}
    for target in find_flux_targets(big, convolutions=False):
        layer = cast(nn.Linear, big.denoiser.get_submodule(target.path))
        found[target.key] = [[rank, layer.in_features], [layer.out_features, rank]]
    assert list(found.items()) == list(golden.items())


def test_text_encoders_modules_have_the_reference_trainers_names(parts: Parts) -> None:
    found = [t for t in find_flux_targets(parts, convolutions=False) if t.part != "denoiser"]
    keys = [t.key for t in found]
    assert keys[:6] == [
        f"lora_te1_text_model_encoder_layers_0_{name}"
        for name in (
            *("self_attn_k_proj", "self_attn_v_proj", "self_attn_q_proj", "self_attn_out_proj"),
            *("mlp_fc1", "mlp_fc2"),
        )
    ]
    of_t5 = [t for t in found if t.part == "text_encoder_2"]
    assert [t.key for t in of_t5[:7]] == [
        *(f"lora_te3_encoder_block_0_layer_0_SelfAttention_{name}" for name in "qkvo"),
        *(f"lora_te3_encoder_block_0_layer_1_DenseReluDense_{name}" for name in ("wi_0", "wi_1", "wo")),
    ]
    assert len(of_t5) == 14
    for target in found:
        assert isinstance(parts.part(target.part).get_submodule(target.path), nn.Linear)


@pytest.mark.parametrize(
    ("preset", "denoiser", "text"),
    [
        ("", 26, True),
        ("full", 26, True),
        ("attn-mlp", 26, True),
        ("unet-only", 26, False),
        ("attn-only", 8, True),
        ("everything", 36, True),
    ],
)
def test_presets_name_sets_of_layers(parts: Parts, preset: str, denoiser: int, text: bool) -> None:
    found = find_flux_targets(parts, convolutions=False, preset=preset)
    linear = [t for t in found if t.part == "denoiser" and t.kind == "linear"]
    assert len(linear) == denoiser
    assert any(t.part != "denoiser" for t in found) == text
    assert len({t.key for t in found}) == len(found)


@pytest.mark.parametrize(
    "options", [{"preset": "ia3"}, {"preset": "unet-convblock-only"}, {"convolutions": True}]
)
def test_sets_of_layers_that_flux_lacks_are_refused(parts: Parts, options: dict[str, Any]) -> None:
    with pytest.raises(LoraGraftError, match="LG-CFG-004"):
        find_flux_targets(parts, **{"convolutions": False, **options})


def test_a_folder_with_an_unknown_tensor_is_refused(folders: Folders) -> None:
    own, folder = tiny_flux.family(), tiny_flux.random_folder()
    folder["denoiser"]["transformer_blocks.0.attn.to_x.weight"] = torch.ones(1)
    with pytest.raises(LoraGraftError, match="LG-BASE-003") as caught:
        own.load(own.from_folder(folder), {})
    assert "transformer_blocks.0.attn.to_x.weight" in str(caught.value)


def test_however_a_base_is_kept_it_is_the_same_model(tmp_path: Path, folders: Folders) -> None:
    """One file, four files as ComfyUI's folders have them, a diffusers folder, and a host's tensors."""
    weights = tiny_flux.single_file_weights()
    weights["text_encoders.clip_l.transformer.text_projection.weight"] = torch.ones(64, 64)
    save_file(weights, tmp_path / "whole.safetensors")
    split = {"": "model.diffusion_model.", "ae": "vae."}
    split |= {kind: f"text_encoders.{kind}.transformer." for kind in ("clip_l", "t5xxl")}
    for name, prefix in split.items():
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        save_file(own, tmp_path / f"{name or 'unet'}.safetensors")
    for part, folder in tiny_flux.family().folders.items():
        (tmp_path / "diffusers" / folder).mkdir(parents=True)
        sd = {k: v.contiguous() for k, v in tiny_flux.random_folder()[part].items()}
        sd.pop("encoder.embed_tokens.weight", None)  # one tensor has one name in a file
        save_file(sd, tmp_path / "diffusers" / folder / "model.safetensors")
    tokenizers = [folders.clip, folders.t5]
    bases = {
        "file": opening.open_file(tmp_path / "whole.safetensors", tokenizer=tokenizers),
        "files": opening.open_file(
            tmp_path / "unet.safetensors",
            tokenizer=tokenizers,
            vae=tmp_path / "ae.safetensors",
            text_encoders=[tmp_path / "t5xxl.safetensors", tmp_path / "clip_l.safetensors"],
        ),
        "folder": opening.open_folder(tmp_path / "diffusers", tokenizer=tokenizers),
        "host": opening.open_weights(weights, name="tiny", tokenizers=folders.by_kind),
    }
    assert {base.family.name for base in bases.values()} == {"flux"}
    assert len({base.weights_hash for base in bases.values()}) == 1
    given, outputs = inputs(), []
    for base in bases.values():
        loaded = base.load()
        assert list(loaded.text_encoders) == ["text_encoder", "text_encoder_2"]
        with torch.no_grad():
            cond = base.family.encode_text(loaded, base.family.tokenize(loaded, CAPTIONS, READING), READING)
            outputs.append(base.family.predict(loaded, given["latents"], given["t"], cond, None, 1.0))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("prefix", "part"), [("vae.", "vae"), ("text_encoders.clip_l", "clip"), ("text_enc", "t5")]
)
def test_a_file_without_a_part_is_refused_with_the_remedy(
    tmp_path: Path, folders: Folders, prefix: str, part: str
) -> None:
    weights = {k: v for k, v in tiny_flux.single_file_weights().items() if not k.startswith(prefix)}
    save_file(weights, tmp_path / "flux.safetensors")
    with pytest.raises(LoraGraftError, match="LG-BASE-012") as caught:
        opening.open_file(tmp_path / "flux.safetensors", tokenizer=[folders.clip, folders.t5])
    assert part in caught.value.what
    assert "--vae FILE, --text_encoder FILE" in caught.value.fix


def test_blocks_of_both_kinds_can_be_computed_twice_or_wait_in_host_memory(parts: Parts) -> None:
    found = checkpointing.blocks(parts.denoiser)
    assert [type(block).__name__ for block in found] == ["DoubleBlock"] * 2 + ["SingleBlock"] * 2
    own, given = tiny_flux.family(), inputs()
    cond = given["text"], given["pooled"]
    with torch.no_grad():
        plain = own.predict(parts, given["latents"], given["t"], cond)
        swap = Swap(found, torch.device("cpu"))
        try:
            assert torch.equal(own.predict(parts, given["latents"], given["t"], cond), plain)
        finally:
            swap.undo()
        assert torch.equal(own.predict(parts, given["latents"], given["t"], cond), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near(folders: Folders, dtype: torch.dtype) -> None:
    own, given = tiny_flux.family(), inputs()
    exact, half = tiny_flux.load_parts(folders), tiny_flux.load_parts(folders)
    freeze(half.denoiser, dtype, None)
    freeze(half.text_encoders, dtype, None)
    half.dtype = dtype
    found = []
    for loaded in (exact, half):
        cond = own.encode_text(loaded, own.tokenize(loaded, CAPTIONS, READING), READING)
        found.append(own.predict(loaded, given["latents"], given["t"], cond).float())
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < (0.03 if dtype == torch.bfloat16 else 0.004)
    assert half.denoiser.img_in.weight.dtype == dtype


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_layers_around_the_blocks_are_never_packed(folders: Folders, storage: str) -> None:
    loaded = tiny_flux.load_parts(folders)
    done = freeze(loaded.denoiser, torch.float32, None, storage=storage, skip=KEPT_WHOLE)
    assert done.num_packed == 26
    outside = (loaded.denoiser.img_in, loaded.denoiser.final_layer.linear, loaded.denoiser.time_in.in_layer)
    assert all(type(layer) is nn.Linear for layer in outside)


GIVEN: dict[str, Any] = {
    "clip_skip": 2,
    "max_token_length": 150,
    "tokenizer_repeats": 2,
    "conv_dim": 4,
    "weighted_captions": True,
    "train_embeddings": ("zibu",),
    "attention": "plain",
    "down_lr_weight": "sine",
    "mid_lr_weight": "1",
    "up_lr_weight": "cosine",
    "block_dims": "4",
    "block_alphas": "4",
    "conv_block_dims": "4",
    "conv_block_alphas": "4",
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize("name", GIVEN)
def test_settings_without_a_meaning_are_refused(name: str) -> None:
    dev, schnell = FAMILIES["flux"], FAMILIES["flux_schnell"]
    assert {*dev.ignored, *schnell.ignored} == set(GIVEN)
    given = dataclasses.replace(TrainConfig(), **{name: GIVEN[name]})
    check(TrainConfig(), dev)
    check(TrainConfig(), schnell)
    with pytest.raises(LoraGraftError, match="LG-CFG-004") as caught:
        check(given, schnell)
    assert name in caught.value.what
    if name == "guidance_scale":
        check(given, dev)
    else:
        with pytest.raises(LoraGraftError, match="LG-CFG-004"):
            check(given, dev)
