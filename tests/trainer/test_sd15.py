"""SD1.x: names as the reference writes them, one base from three sources, and refusals of all others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal, golden
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.adapters import lora
from loragraft.trainer.families import FAMILIES, opening
from loragraft.trainer.families import ldm_keys as keys
from loragraft.trainer.families.sd15 import SD15, text_config, unet_config, vae_config
from loragraft.trainer.parts import Parts

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
    return Parts(unet, vae, text, None)


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tiny base's weights under single-file names, fp16."""
    return load_file(checkpoint)


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash names, dtypes and bytes."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """Write weights as a single file."""
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return path


def write_folder(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the tiny base as a diffusers folder with its tokenizer."""
    for module, part in zip(tiny.random_modules(), ("unet", "vae", "text_encoder"), strict=True):
        module.to(dtype).save_pretrained(folder / part)
    tiny.write_tokenizer(folder / "tokenizer")
    return folder


# ---- names and shapes at full size ----


@pytest.mark.parametrize(("case", "conv"), [("sd15_lora_dim32", None), ("sd15_locon_dim32_conv4", 4)])
def test_the_lora_of_sd15_has_exactly_the_references_tensors(
    full_size: Parts, case: str, conv: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.empty(shape, device="meta"))
    expected = GOLDEN_LORA[case]
    targets = SD15().targets(full_size, convolutions=conv is not None)
    adapter = lora.inject(full_size, lora.Settings(32, 16, conv, 1.0, seed=0), targets)
    found: dict[str, list[int]] = {}
    for m in adapter.modules:
        found[f"{m.target.key}.alpha"] = []
        found[f"{m.target.key}.lora_down.weight"] = list(m.module.down.shape)
        found[f"{m.target.key}.lora_up.weight"] = list(m.module.up.shape)
    lora.remove(full_size, adapter)
    assert found == expected["keys"]
    assert len(found) == expected["num_tensors"]
    assert {m.alpha for m in adapter.modules if m.target.kind == "linear"} == {16.0}
    assert {m.alpha for m in adapter.modules if m.target.kind == "conv"} == ({1.0} if conv else set())


def test_full_size_shapes_are_read_from_the_weights(full_size: Parts) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae, text = (m.state_dict() for m in (full_size.denoiser, full_size.vae, full_size.text_encoder))
    with torch.device("meta"):
        again = UNet2DConditionModel(**unet_config(unet)).state_dict()
        vae_again = AutoencoderKL(**vae_config(vae)).state_dict()
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
    parts = Parts(None, None, None, opening.load_tokenizer(str(clip_tokenizer())))  # type: ignore[arg-type]
    for case in GOLDEN_TOKENS:
        (ids,) = SD15().tokenize(parts, [case["caption"]], case["max_token_length"]).tolist()
        assert ids == case["input_ids"], (case["max_token_length"], case["caption"])


def test_long_captions_are_cut_into_chunks_that_each_have_their_ends(base: api.Base) -> None:
    """The same as the reference's chunks, here on the tiny tokenizer: one token a letter."""
    parts = base.load()
    letters = "abcdefghij" * 20
    one = {c: parts.tokenizer.convert_tokens_to_ids(c) for c in "abcdefghij"}
    start, end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    body = [one[c] for c in letters[:-1]] + [parts.tokenizer.convert_tokens_to_ids("j</w>")]
    for length in (75, 150, 225):
        (ids,) = base.family.tokenize(parts, [letters], length).tolist()
        assert len(ids) == length // 75
        padded = (body + [end] * 225)[:length]
        for i, chunk in enumerate(ids):
            assert chunk == [start, *padded[i * 75 : (i + 1) * 75], end]
        (empty,) = base.family.tokenize(parts, [""], length).tolist()
        assert empty == [[start] + [end] * 76] * (length // 75)


# ---- text ----


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("length", [75, 225])
def test_text_is_encoded_chunk_by_chunk(base: api.Base, length: int, clip_skip: int) -> None:
    parts = base.load()
    parts.text_encoder.float()
    captions = ["zibu, blue, " * 15, ""]
    ids = base.family.tokenize(parts, captions, length)
    found = base.family.encode_text(parts, ids, clip_skip)
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
    ids = base.family.tokenize(parts, ["zibu"], 75)
    full = base.family.encode_text(parts, ids, 1)
    skipped = base.family.encode_text(parts, ids, 2)
    body = getattr(parts.text_encoder, "text_model", parts.text_encoder)
    body.encoder.layers = body.encoder.layers[:1]
    torch.testing.assert_close(base.family.encode_text(parts, ids, 1), skipped)
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


# ---- one base, three sources ----


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Path,
    tokenizer: Path,
    weights: dict[str, torch.Tensor],
) -> dict[str, api.Base]:
    """Return the same base opened from a file, a folder, memory, and memory upcast as a host does."""
    folder = write_folder(tmp_path_factory.mktemp("folder"))
    upcast = {k: v.float() for k, v in weights.items()}
    return {
        "file": api.open_base(checkpoint, tokenizer=tokenizer),
        "folder": api.open_base(folder),
        "memory": api.open_base_from_weights(weights, name="m", tokenizer=tokenizer),
        "upcast": api.open_base_from_weights(upcast, name="u", tokenizer=tokenizer),
        "known": api.open_base_from_weights(
            weights, name="k", tokenizer=tokenizer, weights_hash=api.hash_weights(weights)
        ),
    }


def test_every_source_has_the_same_hash(sources: dict[str, api.Base]) -> None:
    assert len({base.weights_hash for base in sources.values()}) == 1


def test_every_source_gives_the_same_bytes(
    sources: dict[str, api.Base], train_set: api.TrainSet, tmp_path: Path
) -> None:
    files = {}
    for name, base in sources.items():
        places = api.Places(tmp_path / name / "runs", tmp_path / name / "loras", tmp_path / name / "cache")
        finished = runs.Training(base, train_set, places).finish(max_train_steps=3)
        files[name] = finished.lora_file.read_bytes()
    assert len(set(files.values())) == 1


def test_another_weight_is_another_base(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    plain = api.hash_weights(weights)
    for prefix, part in ((keys.UNET_PREFIX, 0), (keys.VAE_PREFIX, 1), (keys.TEXT_PREFIX, 2)):
        name = next(k for k in sorted(weights) if k.startswith(prefix) and k.endswith("weight"))
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[0] += 1
        other = api.hash_weights(changed).split("-")
        assert [a != b for a, b in zip(other, plain.split("-"), strict=True)] == [i == part for i in range(3)]
        base = api.open_base_from_weights(changed, name="x", tokenizer=tokenizer)
        assert base.part_hash(("denoiser", "vae", "text_encoder")[part]) == other[part]


def test_fp32_weights_are_shared_not_copied(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    from loragraft.trainer.engine.precision import place, resolve

    held = {k: v.float() for k, v in weights.items()}
    addresses = {v.data_ptr() for v in held.values()}
    parts = api.open_base_from_weights(held, name="x", tokenizer=tokenizer).load()
    place(parts, resolve("fp32", torch.device("cpu")))
    for module in (parts.denoiser, parts.vae, parts.text_encoder):
        for name, parameter in module.named_parameters():
            assert parameter.data_ptr() in addresses, name
            assert not parameter.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_weight_is_ever_written_to(
    weights: dict[str, torch.Tensor], tokenizer: Path, train_set: api.TrainSet, places: api.Places,
    dtype: torch.dtype, precision: str,
) -> None:  # fmt: skip
    held = {k: v.to(dtype) for k, v in weights.items()}
    parameter = torch.nn.Parameter(held.pop("model.diffusion_model.out.2.bias"))
    held["model.diffusion_model.out.2.bias"] = parameter
    before, grad = (
        digest({k: v.detach() for k, v in held.items()}),
        {k: v.requires_grad for k, v in held.items()},
    )
    base = api.open_base_from_weights(held, name="x", tokenizer=tokenizer)
    runs.Training(base, train_set, places).finish(
        max_train_steps=1, mixed_precision=precision, preview_image=True, sample_steps=1, conv_dim=2
    )
    assert digest({k: v.detach() for k, v in held.items()}) == before
    assert {k: v.requires_grad for k, v in held.items()} == grad
    assert all(v.grad is None for v in held.values())


def test_weights_made_in_inference_mode_are_trained_all_the_same(
    sources: dict[str, api.Base], weights: dict[str, torch.Tensor], tokenizer: Path, train_set: api.TrainSet,
    places: api.Places,
) -> None:  # fmt: skip
    """A host may load its weights so; autograd would refuse them in the middle of a step."""
    with torch.inference_mode():
        held = {k: v.float() for k, v in weights.items()}
    base = api.open_base_from_weights(held, name="x", tokenizer=tokenizer)
    address = held["model.diffusion_model.out.2.bias"].data_ptr()
    assert base.state_dicts["denoiser"]["conv_out.bias"].data_ptr() == address
    assert base.weights_hash == sources["file"].weights_hash
    runs.Training(base, train_set, places).finish(max_train_steps=1)


# ---- folders as they are found ----


def test_old_vae_names_and_position_ids_in_a_folder(tmp_path: Path, sources: dict[str, api.Base]) -> None:
    """SD1.5's own folder has both: attention under its names of 2022, and integer position ids."""
    folder = write_folder(tmp_path / "old")
    vae_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = {}
    for name, value in load_file(vae_file).items():
        for new, old in new_to_old.items():
            name = name.replace(new, old) if ".attentions." in name else name
        vae[name] = value
    assert any(".proj_attn." in name for name in vae)
    write(vae_file, vae)
    text_file = folder / "text_encoder" / "model.safetensors"
    text = load_file(text_file)
    prefix = "text_model." if any(k.startswith("text_model.") for k in text) else ""
    text[f"{prefix}embeddings.position_ids"] = torch.arange(77).reshape(1, -1)
    write(text_file, text)
    base = api.open_base(folder)
    assert base.weights_hash == sources["file"].weights_hash
    base.load()


def test_a_folder_with_two_copies_is_read_once(tmp_path: Path, sources: dict[str, api.Base]) -> None:
    folder = write_folder(tmp_path / "both")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    wrong = {k: torch.zeros_like(v) for k, v in load_file(unet).items()}
    write(unet.with_name("diffusion_pytorch_model.fp16.safetensors"), wrong)
    write(unet.with_name("diffusion_pytorch_model.non_ema.safetensors"), wrong)
    assert api.open_base(folder).weights_hash == sources["file"].weights_hash


def test_a_sharded_folder_is_read_whole(tmp_path: Path, sources: dict[str, api.Base]) -> None:
    folder = write_folder(tmp_path / "shards")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    unet.unlink()
    for i, part in enumerate((sorted(weights)[:100], sorted(weights)[100:]), 1):
        name = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        write(unet.with_name(name), {k: weights[k] for k in part})
    assert api.open_base(folder).weights_hash == sources["file"].weights_hash


def test_extra_tensors_of_real_checkpoints_do_not_matter(
    weights: dict[str, torch.Tensor], tokenizer: Path, sources: dict[str, api.Base]
) -> None:
    """Real files also hold EMA copies, schedule constants and position ids."""
    extra = {
        "model_ema.decay": torch.tensor(0.9999, dtype=torch.float64),
        "model_ema.num_updates": torch.tensor(5),
        "alphas_cumprod": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    base = api.open_base_from_weights({**weights, **extra}, name="x", tokenizer=tokenizer)
    assert base.weights_hash == sources["file"].weights_hash


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "why"),
    [("a.ckpt", "run code"), ("a.pt", "run code"), ("a.gguf", "quantised"), ("a.bin", "safetensors")],
)
def test_other_file_formats_are_refused_unread(tmp_path: Path, tokenizer: Path, name: str, why: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04malicious")
    with Refusal("LG-BASE-001", name, why):
        api.open_base(tmp_path / name, tokenizer=tokenizer)


def test_a_missing_or_damaged_file(tmp_path: Path, checkpoint: Path, tokenizer: Path) -> None:
    whole = checkpoint.read_bytes()
    cases = {"gone": None, "empty": b"", "text": b"<html>", "cut": whole[:-1000], "head": whole[:5000]}
    cases["length"] = b"\xff" * 8 + whole[8:]
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with Refusal("LG-BASE-001", f"{name}.safetensors"):
            api.open_base(path, tokenizer=tokenizer)


def test_a_damaged_or_incomplete_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with Refusal("LG-BASE-001", "vae"):
        api.open_base(folder)
    file.rename(file.with_suffix(".bin"))
    with Refusal("LG-BASE-001", "vae", "safetensors"):
        api.open_base(folder)
    with Refusal("LG-BASE-001", "unet"):
        api.open_base(tmp_path / "folder" / "vae")


def test_no_weights_of_other_architectures(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    rename = {
        "sdxl": (keys.TEXT_PREFIX, "conditioner.embedders.0.transformer."),
        "sd2": (keys.TEXT_PREFIX, "cond_stage_model.model.transformer."),
        "flux": (keys.UNET_PREFIX + "input_blocks.", "double_blocks."),
    }
    for name, (old, new) in rename.items():
        with Refusal("LG-BASE-002", name, "sd15"):
            opening.open_weights(
                {k.replace(old, new): v for k, v in weights.items()},
                name=name,
                tokenizer=str(tokenizer),
                where=name,
            )
    with Refusal("LG-BASE-002"):
        api.open_base_from_weights({**weights, keys.UNET_PREFIX + "label_emb.0.0.weight": torch.zeros(1)}, name="x",
                                   tokenizer=tokenizer)  # fmt: skip
    with Refusal("LG-BASE-002", "0 tensors"):
        api.open_base_from_weights({}, name="x", tokenizer=tokenizer)


def load_changed(weights: Mapping[str, torch.Tensor], tokenizer: Path) -> None:
    api.open_base_from_weights(weights, name="x", tokenizer=tokenizer).load()


def test_other_models_of_the_family_are_named(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    conv_in = keys.UNET_PREFIX + "input_blocks.0.0.weight"
    with Refusal("LG-BASE-004", "inpainting", "9 input channels"):
        load_changed({**weights, conv_in: torch.zeros(32, 9, 3, 3)}, tokenizer)
    wide = {k: v for k, v in weights.items() if "attn2.to_k.weight" in k or "attn2.to_v.weight" in k}
    with Refusal("LG-BASE-004", "SD2.x", "1024"):
        load_changed({**weights, **{k: torch.zeros(v.shape[0], 1024) for k, v in wide.items()}}, tokenizer)


@pytest.mark.parametrize(
    "gone",
    [keys.UNET_PREFIX, keys.VAE_PREFIX, keys.TEXT_PREFIX, "model.diffusion_model.input_blocks.0.0.weight",
     "attn2.to_k.weight", "proj_in.weight", "model.diffusion_model.out.2.bias", "first_stage_model.post_quant_conv",
     "first_stage_model.decoder.", "token_embedding", "text_model.encoder.layers.0.mlp.fc1.weight",
     "final_layer_norm", "input_blocks.1.0.in_layers.2"],
)  # fmt: skip
def test_missing_weights_are_named_not_invented(
    weights: dict[str, torch.Tensor], tokenizer: Path, gone: str
) -> None:
    """'A pruned checkpoint without VAE' is the usual case."""
    left = {k: v for k, v in weights.items() if gone not in k}
    assert len(left) < len(weights)
    whole_part = gone in (keys.UNET_PREFIX, keys.TEXT_PREFIX)  # then nothing says which architecture it was
    with Refusal("LG-BASE-002" if whole_part else "LG-BASE-003"):
        load_changed(left, tokenizer)


def test_weights_of_other_shapes_are_refused(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    for name in (
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ):
        with Refusal("LG-BASE-003"):
            load_changed({**weights, name: torch.zeros(7)}, tokenizer)


class Packed(torch.Tensor):
    """Stand in for a loader's quantised tensor class."""


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.int8, "int8"),
        (torch.uint8, "uint8"),
        (Packed, "packed"),
    ],
)
def test_quantised_weights_are_refused(
    weights: dict[str, torch.Tensor], tokenizer: Path, kind: Any, named: str, tmp_path: Path
) -> None:
    name = keys.UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    value = weights[name].as_subclass(Packed) if kind is Packed else weights[name].to(kind)
    with Refusal("LG-BASE-005", named, "to_q"):
        api.open_base_from_weights({**weights, name: value}, name="x", tokenizer=tokenizer)
    if kind is not Packed:
        path = write(tmp_path / "q.safetensors", {**weights, name: value})
        with Refusal("LG-BASE-005", named, "q.safetensors"):
            api.open_base(path, tokenizer=tokenizer)


def test_a_tokenizer_of_another_model(tmp_path: Path, checkpoint: Path, tokenizer: Path) -> None:
    with Refusal("LG-BASE-007", str(tmp_path)):
        api.open_base(checkpoint, tokenizer=tmp_path)
    other = tiny.write_tokenizer(tmp_path / "other")
    vocabulary = (other / "vocab.json").read_text("utf-8")
    (other / "vocab.json").write_text(vocabulary[:-1] + ', "extra</w>": 514}', encoding="utf-8")
    with Refusal("LG-BASE-006", "515", "514"):
        api.open_base(checkpoint, tokenizer=other).load()
    (other / "vocab.json").write_text("{ not json", encoding="utf-8")
    with Refusal("LG-BASE-007", "other"):
        api.open_base(checkpoint, tokenizer=other).load()


def test_clips_tokenizer_is_found_in_a_host_or_asked_for(
    tmp_path: Path, checkpoint: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def nothing_cached(name: str, **options: Any) -> None:
        assert options["local_files_only"], "the network is used only on request"
        raise OSError("not cached")

    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", nothing_cached)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    if (Path(opening.__file__).parents[4] / "comfy" / "sd1_tokenizer").is_dir():
        pytest.skip("this checkout lies in a ComfyUI")
    with Refusal("LG-BASE-008", "--tokenizer", "COMFYUI_PATH"):
        api.open_base(checkpoint)
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    tokenizer.rename(tokenizer)  # it exists
    tiny.write_tokenizer(host / "comfy" / "sd1_tokenizer")
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    assert api.open_base(checkpoint).tokenizer_folder == str(host / "comfy" / "sd1_tokenizer")


def test_the_table_of_families() -> None:
    assert list(FAMILIES) == ["sd15"]
    assert all(family.name == name for name, family in FAMILIES.items())


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
    with resolved.autocast():
        (image,) = base.family.sample(
            parts, ["a"], negative="", seeds=[1], size=(32, 48), steps=1, cfg=2.0, clip_skip=1
        )
    assert image.size == (48, 32)
    assert seen == [torch.float32]


def test_a_drawing_depends_on_its_seed_and_prompt_not_on_its_batch(base: api.Base) -> None:
    from loragraft.trainer.engine.precision import place, resolve

    parts = base.load()
    place(parts, resolve("fp32", torch.device("cpu")))

    def draw(prompts: list[str], seeds: list[int], **changes: Any) -> list[bytes]:
        options = {"negative": "", "size": (32, 32), "steps": 2, "cfg": 3.0, "clip_skip": 1, **changes}
        return [im.tobytes() for im in base.family.sample(parts, prompts, seeds=seeds, **options)]

    (plain,) = draw(["zibu"], [1])
    assert draw(["zibu"], [1]) == [plain]
    assert draw(["zibu"], [2]) != [plain]
    assert draw(["zibu"], [1], negative="blue") != [plain]
    assert draw(["zibu " * 40], [1]) != [plain]
    assert draw(["red"], [1]) != [plain]
