"""Base models: one base from three sources, folders as they are found, and refusals of all others."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.families import FAMILIES, opening
from loragraft.trainer.families.names import ldm_keys as keys
from loragraft.trainer.families.text import tokenizers
from loragraft_tests.trainer import runs, tiny, tiny_flux
from loragraft_tests.trainer.data_folders import Refusal


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
        "memory": api.open_base_from_weights(weights, name="m", tokenizers={"clip": tokenizer}),
        "upcast": api.open_base_from_weights(upcast, name="u", tokenizers={"clip": tokenizer}),
        "known": api.open_base_from_weights(
            weights, name="k", tokenizers={"clip": tokenizer}, weights_hash=api.hash_weights(weights)
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
        base = api.open_base_from_weights(changed, name="x", tokenizers={"clip": tokenizer})
        assert base.part_hash(("denoiser", "vae", "text_encoder")[part]) == other[part]


def test_fp32_weights_are_shared_not_copied(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    from loragraft.trainer.engine.precision import place, resolve

    held = {k: v.float() for k, v in weights.items()}
    addresses = {v.data_ptr() for v in held.values()}
    parts = api.open_base_from_weights(held, name="x", tokenizers={"clip": tokenizer}).load()
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
    base = api.open_base_from_weights(held, name="x", tokenizers={"clip": tokenizer})
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
    base = api.open_base_from_weights(held, name="x", tokenizers={"clip": tokenizer})
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
    base = api.open_base_from_weights({**weights, **extra}, name="x", tokenizers={"clip": tokenizer})
    assert base.weights_hash == sources["file"].weights_hash


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "why"),
    [("a.ckpt", "run code"), ("a.pt", "run code"), ("a.bin", "run code"), ("a.txt", "safetensors")],
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
    renamed = {k.replace(keys.UNET_PREFIX + "input_blocks.", "x_blocks."): v for k, v in weights.items()}
    with Refusal("LG-BASE-002", "other", "sd15"):
        opening.open_weights(renamed, name="other", tokenizers={"clip": str(tokenizer)}, where="other")
    with Refusal("LG-BASE-002", "0 tensors"):
        api.open_base_from_weights({}, name="x", tokenizers={"clip": tokenizer})


def load_changed(weights: Mapping[str, torch.Tensor], tokenizer: Path) -> None:
    api.open_base_from_weights(weights, name="x", tokenizers={"clip": tokenizer}).load()


def test_other_models_of_the_family_are_named(weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    conv_in = keys.UNET_PREFIX + "input_blocks.0.0.weight"
    with Refusal("LG-BASE-004", "inpainting", "9 input channels"):
        load_changed({**weights, conv_in: torch.zeros(32, 9, 3, 3)}, tokenizer)
    wide = {k: v for k, v in weights.items() if "attn2.to_k.weight" in k or "attn2.to_v.weight" in k}
    with Refusal("LG-BASE-003", "context width 1024", "text encoder: 64"):
        load_changed({**weights, **{k: torch.zeros(v.shape[0], 1024) for k, v in wide.items()}}, tokenizer)


TELLING = (keys.UNET_PREFIX, keys.UNET_PREFIX + "input_blocks.0.0.weight", "proj_in.weight")  # the family


@pytest.mark.parametrize(
    "gone",
    [
        keys.UNET_PREFIX,
        keys.VAE_PREFIX,
        keys.TEXT_PREFIX,
        keys.UNET_PREFIX + "input_blocks.0.0.weight",
        "model.diffusion_model.out.2.bias",
        "input_blocks.1.0.in_layers.2",
        "attn2.to_k.weight",
        "proj_in.weight",
        "first_stage_model.post_quant_conv",
        "first_stage_model.decoder.",
        "token_embedding",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "final_layer_norm",
    ],
)
def test_missing_weights_are_named_not_invented(
    weights: dict[str, torch.Tensor], tokenizer: Path, gone: str
) -> None:
    """'A pruned checkpoint without VAE' is the usual case."""
    left = {k: v for k, v in weights.items() if gone not in k}
    assert len(left) < len(weights)
    whole_part = gone in (keys.VAE_PREFIX, keys.TEXT_PREFIX)
    with Refusal("LG-BASE-002" if gone in TELLING else "LG-BASE-012" if whole_part else "LG-BASE-003"):
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
        (torch.int8, "int8"),
        (torch.uint8, "uint8"),
        (Packed, "packed"),
    ],
)
def test_quantised_weights_that_nothing_explains_are_refused(
    weights: dict[str, torch.Tensor], tokenizer: Path, kind: Any, named: str, tmp_path: Path
) -> None:
    name = keys.UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    value = weights[name].as_subclass(Packed) if kind is Packed else weights[name].to(kind)
    with Refusal("LG-BASE-005", named, "to_q"):
        api.open_base_from_weights({**weights, name: value}, name="x", tokenizers={"clip": tokenizer})
    if kind is not Packed:
        path = write(tmp_path / "q.safetensors", {**weights, name: value})
        with Refusal("LG-BASE-005", named, "q.safetensors"):
            api.open_base(path, tokenizer=tokenizer)


def test_a_vae_with_other_latents_is_refused_before_a_step(checkpoint: Path, tokenizer: Path) -> None:
    base = api.open_base(checkpoint, tokenizer=tokenizer)
    wide = tiny_flux.random_vae().state_dict()
    other = dataclasses.replace(base, state_dicts={**base.state_dicts, "vae": wide})
    with Refusal("LG-BASE-003", "16 channels", "SD1.x takes 4"):
        other.load()


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


@pytest.mark.parametrize("kind", list(tokenizers.KINDS))
def test_a_tokenizer_that_is_nowhere_is_not_made_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 makes one without words of a name of which the cache has nothing."""
    nowhere = dataclasses.replace(tokenizers.KINDS[kind], hub="nobody/nothing", in_comfyui=None)
    monkeypatch.setitem(cast(Any, tokenizers.KINDS), kind, nowhere)
    with Refusal("LG-BASE-008", "--tokenizer"):
        tokenizers.find_tokenizer(None, kind=kind)


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
    assert api.open_base(checkpoint).tokenizer_folders["clip"] == str(host / "comfy" / "sd1_tokenizer")


def test_the_table_of_families() -> None:
    assert list(FAMILIES)[:3] == ["sd15", "sd2", "sdxl"]
    assert all(family.name == name for name, family in FAMILIES.items())
