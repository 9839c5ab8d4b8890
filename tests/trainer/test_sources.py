"""Bases in several files: what each is, its content tells; denoiser, VAE and text encoders make one."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.names import ldm_keys
from loragraft.trainer.families.names.pieces import Pieced
from loragraft.trainer.families.sources.sources import Source, bring_together, parts_of
from loragraft.trainer.families.sources.text_files import GEMMA_NAMES, LLM_NAMES, T5_NAMES, read_text_file
from loragraft.trainer.families.text.openclip import to_hf
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer import (
    quantised_files,
    runs,
    tiny,
    tiny_dits,
    tiny_qwen,
    tiny_sd2,
    tiny_sd3,
    tiny_sdxl,
    tiny_t5,
)
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.tiny_families import TOKENIZERS, WEIGHTS

Tensors = Mapping[str, torch.Tensor]
# Text encoders of sizes that no released model has say what they are, as ComfyUI's saved ones do.
CLIPS = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}
NAMED: Mapping[str, Mapping[str, str]] = {
    "sd2": {"text_encoder": "clip_h.transformer."},
    "sdxl": CLIPS,
    "sd3": CLIPS,
    "sd35_large": CLIPS,
    "sd35_medium": CLIPS,
}
VAES = ("first_stage_model.", "vae.")
LORA = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32),
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(32, 4),
}


def write(path: Path, weights: Tensors) -> Path:
    save_file({k: weights[k].detach().contiguous().clone() for k in weights}, path)
    return path


def below(weights: Tensors, *prefixes: str) -> dict[str, torch.Tensor]:
    """Return the weights below prefixes, without them."""
    return {k.removeprefix(p): weights[k] for p in prefixes for k in weights if k.startswith(p)}


def tokenizers_of(family: str, folder: Path) -> list[Path]:
    return [TOKENIZERS[kind](folder / kind) for kind in sorted(set(FAMILIES[family].encoders.values()))]


# ---- what a file is ----


def shapes(names: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def clip(width: int, layers: int, prefix: str = "text_model.") -> dict[str, torch.Tensor]:
    return shapes(
        {
            f"{prefix}embeddings.token_embedding.weight": (49408, width),
            f"{prefix}embeddings.position_ids": (1, 77),
            **{f"{prefix}encoder.layers.{i}.mlp.fc1.weight": (4 * width, width) for i in range(layers)},
        }
    )


def openclip(width: int, layers: int, prefix: str = "") -> dict[str, torch.Tensor]:
    blocks = {f"{prefix}transformer.resblocks.{i}.ln_1.weight": (width,) for i in range(layers)}
    joined = {
        f"{prefix}transformer.resblocks.{i}.attn.in_proj_weight": (3 * width, width) for i in range(layers)
    }
    table = {f"{prefix}token_embedding.weight": (49408, width), f"{prefix}text_projection": (width, width)}
    return shapes({**blocks, **joined, **table})


def t5(width: int, words: int = 32128) -> dict[str, torch.Tensor]:
    attention = "encoder.block.0.layer.0.SelfAttention.q.weight"
    return shapes({"shared.weight": (words, width), attention: (width, width), "decoder.block.0.x": (1,)})


def llm(width: int, *more: str, prefix: str = "model.") -> dict[str, torch.Tensor]:
    layer = f"{prefix}layers.0."
    names = ["self_attn.q_proj.weight", "post_attention_layernorm.weight", *more]
    return shapes(
        {f"{prefix}embed_tokens.weight": (1000, width), **{layer + name: (width, width) for name in names}}
    )


Q_NORM, BIAS, GEMMA = "self_attn.q_norm.weight", "self_attn.k_proj.bias", "post_feedforward_layernorm.weight"
TEXTS = {
    "CLIP-L": (clip(768, 12), "clip_l"),
    "CLIP-L without its model's name": (clip(768, 12, ""), "clip_l"),
    "CLIP-H": (clip(1024, 24), "clip_h"),
    "CLIP-H cut": (clip(1024, 23), "clip_h"),
    "CLIP-G": (clip(1280, 32), "clip_g"),
    "OpenCLIP's G": (openclip(1280, 32), "clip_g"),
    "OpenCLIP's H, as SD2 has it": (openclip(1024, 24, "cond_stage_model.model."), "clip_h"),
    "another width of 32 layers": (clip(64, 32), "clip_g"),
    "another width of 2 layers": (clip(64, 2), "clip_l"),
    "T5 XXL": (t5(4096), "t5xxl"),
    "T5 of any width": (t5(64), "t5xxl"),
    "T5 XL": (t5(2048), "t5xl"),
    "UMT5": (t5(4096, 256384), "umt5xxl"),
    "Qwen2.5-VL 7B": (llm(3584, BIAS), "qwen25_7b"),
    "the same as transformers names it": (llm(3584, BIAS, prefix="model.language_model."), "qwen25_7b"),
    "Qwen2.5-VL 3B": (llm(2048, BIAS), "qwen25_3b"),
    "Qwen3 4B": (llm(2560, Q_NORM), "qwen3_4b"),
    "Qwen3 8B": (llm(4096, Q_NORM), "qwen3_8b"),
    "Qwen3 0.6B": (llm(1024, Q_NORM, prefix=""), "qwen3_06b"),
    "Gemma 2 2B": (llm(2304, GEMMA), "gemma2_2b"),
    "Gemma 3 4B": (llm(2560, GEMMA, Q_NORM), "gemma3_4b"),
    "Mistral": (llm(5120), "mistral3_24b"),
    "Llama": (llm(4096), "llama"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_are_told_by_names_and_shapes(name: str) -> None:
    weights, kind = TEXTS[name]
    found = read_text_file(weights)
    assert found is not None and found.kind == kind
    start = "text_model." if kind.startswith("clip") else "shared." if "t5" in kind else "model."
    assert any(k.startswith(start) for k in found.weights)
    assert not any(k.endswith("position_ids") or k.startswith("decoder.") for k in found.weights)
    parts = parts_of(Source("x", weights))
    assert set(parts) == {kind}


def test_nothing_else_is_a_text_encoder(weights: dict[str, torch.Tensor]) -> None:
    for other in (below(weights, "model.diffusion_model."), below(weights, *VAES), LORA, {}):
        assert read_text_file(other) is None


LLAMA_CPP = {
    "t5xxl": (T5_NAMES, "encoder.block.", "enc.blk."),
    "qwen3_4b": (LLM_NAMES, "model.layers.", "blk."),
    "gemma2_2b": (GEMMA_NAMES, "model.layers.", "blk."),
}


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_llama_cpps_names_are_brought_back(kind: str) -> None:
    module = {
        "t5xxl": tiny_t5.random_t5,
        "qwen3_4b": lambda: tiny_qwen.random_qwen3(),
        "gemma2_2b": tiny_dits.random_gemma,
    }[kind]()
    table, ours, theirs = LLAMA_CPP[kind]
    plain = read_text_file({k: v.detach() for k, v in module.state_dict().items()})
    assert plain is not None and plain.kind == kind
    named = {}
    for name in plain.weights:
        end = name.rpartition(".")[2]
        inside = name.removeprefix(ours) if name.startswith(ours) else ""
        number, _, layer = inside.rpartition(f".{end}")[0].partition(".")
        old = next(k for k, v in table.items() if v == (layer or name.removesuffix(f".{end}")))
        value = plain.weights[name] + (1 if kind == "gemma2_2b" and name.endswith("norm.weight") else 0)
        named[f"{theirs}{number}.{old}.{end}" if inside else f"{old}.{end}"] = value
    assert "token_embd.weight" in named
    found = read_text_file(
        {**named, "output.weight": torch.zeros(1), "dec.blk.0.attn_q.weight": torch.zeros(1)}
    )
    assert found is not None and found.kind == kind and set(found.weights) == set(plain.weights)
    for name in plain.weights:
        torch.testing.assert_close(found.weights[name], plain.weights[name], rtol=0, atol=1e-6)


# ---- one base of several files ----


@pytest.mark.parametrize("family", WEIGHTS)
def test_files_apart_are_the_checkpoint(family: str, tmp_path: Path) -> None:
    weights = WEIGHTS[family](tmp_path)
    given = tokenizers_of(family, tmp_path)
    whole = api.open_base(write(tmp_path / "whole.safetensors", weights), tokenizer=given)
    assert whole.family.name == family and not whole.notes
    denoiser = write(tmp_path / "denoiser.safetensors", below(weights, "model.diffusion_model."))
    vae = write(tmp_path / "vae.safetensors", below(weights, *VAES))
    texts = []
    for part in whole.family.encoders:
        prefix = NAMED.get(family, {}).get(part, "")
        own: Tensors = whole.state_dicts[part]
        if family == "sd2":  # which leaves out the last layer
            own = Pieced(weights, to_hf(weights, "cond_stage_model.model."))
        named = {prefix + k: v for k, v in own.items()}
        texts.append(write(tmp_path / f"{part}.safetensors", named))
    apart = api.open_base(denoiser, vae=vae, text_encoders=texts, tokenizer=given)
    assert apart.family is whole.family and apart.name == "denoiser"
    assert apart.weights_hash == whole.weights_hash
    with Refusal("LG-BASE-012", "vae missing", "text_encoder"):
        api.open_base(denoiser, text_encoders=texts, tokenizer=given)
    with Refusal("LG-BASE-012", "text_encoder", "missing"):
        api.open_base(denoiser, vae=vae, tokenizer=given)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_denoiser_with_any_prefix(
    prefix: str, weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    unet = {prefix + k: v for k, v in below(weights, "model.diffusion_model.").items()}
    text = write(tmp_path / "text.safetensors", below(weights, "cond_stage_model.transformer."))
    vae = write(tmp_path / "vae.sft", below(weights, "first_stage_model."))
    opened = api.open_base(
        write(tmp_path / "unet.safetensors", unet), vae=vae, text_encoders=[text], tokenizer=tokenizer
    )
    whole = api.open_base(checkpoint, tokenizer=tokenizer)
    assert opened.weights_hash == whole.weights_hash and opened.vae_name == "vae"


def test_diffusers_names_of_a_unet_and_of_vaes(
    checkpoint: Path, tokenizer: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = api.open_base(checkpoint, tokenizer=tokenizer)
    unet = write(tmp_path / "unet.safetensors", whole.state_dicts["denoiser"])
    vae = write(tmp_path / "vae.safetensors", whole.state_dicts["vae"])
    opened = api.open_base(unet, vae=vae, text_encoders=[checkpoint], tokenizer=tokenizer)
    assert opened.weights_hash == whole.weights_hash
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, value in load_file(vae).items():
        for new, before in old.items():
            name = name.replace(new, before) if ".attentions." in name else name
        renamed[name] = value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
    oldest = write(tmp_path / "old.safetensors", renamed)
    assert api.open_base(checkpoint, vae=oldest, tokenizer=tokenizer).weights_hash == whole.weights_hash


def test_qwen_images_vae_with_diffusers_names(tmp_path: Path) -> None:
    weights, given = WEIGHTS["qwen_image"](tmp_path), tokenizers_of("qwen_image", tmp_path)
    file = write(tmp_path / "whole.safetensors", weights)
    whole = api.open_base(file, tokenizer=given)
    vae = write(tmp_path / "vae.safetensors", whole.state_dicts["vae"])
    assert api.open_base(file, vae=vae, tokenizer=given).weights_hash == whole.weights_hash


def test_further_files_take_the_place_of_a_checkpoints_own(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    other = tiny.write_checkpoint(tmp_path / "other.safetensors", seed=1)
    vae = write(tmp_path / "new_vae.safetensors", below(load_file(other), "first_stage_model."))
    text = write(tmp_path / "text.safetensors", below(load_file(other), "cond_stage_model.transformer."))
    plain, changed = (api.open_base(file, tokenizer=tokenizer) for file in (checkpoint, other))
    opened = api.open_base(checkpoint, vae=vae, tokenizer=tokenizer)
    assert opened.notes == ("VAE: new_vae.safetensors takes the place of the one in tiny.safetensors",)
    both = api.open_base(checkpoint, vae=other, text_encoders=[other], tokenizer=tokenizer)
    for base, taken in (
        (opened, ["vae"]),
        (api.open_base(checkpoint, text_encoders=[text], tokenizer=tokenizer), ["text_encoder"]),
        (both, ["vae", "text_encoder"]),
    ):
        for part in ("denoiser", "vae", "text_encoder"):
            assert base.part_hash(part) == (changed if part in taken else plain).part_hash(part), part
        assert len(base.notes) == len(taken)


def test_a_gguf_denoiser_with_plain_files_beside_it(
    weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, train_set: api.TrainSet,
    places: api.Places, tmp_path: Path,
) -> None:  # fmt: skip
    quantised_files.write_gguf(tmp_path / "unet.gguf", below(weights, "model.diffusion_model."))
    base = api.open_base(
        tmp_path / "unet.gguf", vae=checkpoint, text_encoders=[checkpoint], tokenizer=tokenizer
    )
    assert base.notes == ("denoiser: 121 Q8_0 weights stay packed until they are used",)
    plain = api.open_base(checkpoint, tokenizer=tokenizer)
    assert base.part_hash("vae") == plain.part_hash("vae") != base.part_hash("denoiser")
    events = runs.Training(base, train_set, places).events(max_train_steps=1)
    assert [e for e in events if isinstance(e, api.Step)]


def test_flags_of_a_checkpoint_are_kept(checkpoint: Path) -> None:
    source = Source("x", {**load_file(checkpoint), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    weights = bring_together(source).weights()
    assert "v_pred" in weights and "ztsnr" in weights and set(source.weights) == set(weights)


def test_bytes_of_a_tokenizer_in_a_text_encoder_are_kept() -> None:
    text = {**llm(2304, GEMMA), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    unet = shapes({"noise_refiner.0.attention.qkv.weight": (3, 1)})
    weights = bring_together(Source("d", unet), texts=[Source("t", text)]).weights()
    assert weights["text_encoders.spiece_model"].shape == (9,)
    assert "text_encoders.gemma2_2b.transformer.model.embed_tokens.weight" in weights


# ---- refusals ----


def test_what_is_no_base_is_said(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    cases = {
        "a LoRA": LORA,
        "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(1)},
        "TAESD": {"taesd_decoder.1.weight": torch.zeros(1)},
        "an embedding": {"emb_params": torch.zeros(2, 4)},
        "diffusers": {"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)},
        "(1 tensors": {"something": torch.zeros(1)},
        "(0 tensors": {},
    }
    for named, weights in cases.items():
        file = write(tmp_path / "x.safetensors", weights)
        with Refusal("LG-BASE-002", named, "x.safetensors"):
            api.open_base(file, tokenizer=tokenizer)
        with Refusal("LG-BASE-002", named):
            api.open_base(checkpoint, vae=file, tokenizer=tokenizer)


def test_files_in_the_wrong_place(
    weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    vae = write(tmp_path / "vae.safetensors", below(weights, "first_stage_model."))
    text = write(tmp_path / "text.safetensors", below(weights, "cond_stage_model.transformer."))
    other = write(tmp_path / "t5.safetensors", tiny_t5.random_t5().state_dict())
    with Refusal("LG-BASE-012", "vae.safetensors", "no denoiser", "VAE"):
        api.open_base(vae, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "text.safetensors", "no denoiser", "clip_l"):
        api.open_base(text, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "no VAE", "clip_l"):
        api.open_base(checkpoint, vae=text, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "no text encoder", "VAE"):
        api.open_base(checkpoint, text_encoders=[vae], tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "clip_l", "text.safetensors", "tiny.safetensors"):
        api.open_base(checkpoint, text_encoders=[text, checkpoint], tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "t5xxl", "does not read", "t5.safetensors"):
        api.open_base(checkpoint, text_encoders=[other], tokenizer=tokenizer)
    with Refusal("LG-BASE-001", "gone.safetensors"):
        api.open_base(checkpoint, vae=tmp_path / "gone.safetensors", tokenizer=tokenizer)


def test_tokenizers_that_are_not_needed(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    with Refusal("LG-BASE-007", "sd15", "clip"):
        api.open_base(checkpoint, tokenizer=[tokenizer, TOKENIZERS["clip"](tmp_path / "more")])
    with Refusal("LG-BASE-007", "t5"):
        api.open_base(checkpoint, tokenizer=[tokenizer, TOKENIZERS["t5"](tmp_path / "t5")])


def test_names_of_parts_with_any_shapes_end_in_an_error_or_in_a_base(tmp_path: Path) -> None:
    pool = [name for family in ("sd15", "sd3", "flux") for name in WEIGHTS[family](tmp_path)]
    pool += [name.partition(".")[2] for name in pool] + [k for texts, _ in TEXTS.values() for k in texts]
    pool += ["token_embd.weight", "enc.blk.0.attn_q.weight", "clip_l.transformer.text_model.x"]
    generator = random.Random(0)
    telling = [k for k in pool if k.endswith(tuple(SIGNS))]
    for _ in range(cases(3000)):
        names = generator.sample(telling, 4) + generator.sample(pool, generator.choice((0, 3, 200)))
        dimensions = [generator.choices((0, 1, 3, 64, 1280), k=generator.randrange(5)) for _ in names]
        weights = {n: torch.empty(d, device="meta") for n, d in zip(names, dimensions, strict=True)}
        with contextlib.suppress(LoraGraftError):
            parts_of(Source("x", weights))
        with contextlib.suppress(LoraGraftError):
            api.open_base_from_weights(weights, name="x", tokenizers=dict.fromkeys(TOKENIZERS, "x"))


SIGNS = (
    *("input_blocks.0.0.weight", "attn2.to_k.weight", "proj_in.weight", "label_emb.0.0.weight"),
    *("token_embedding.weight", "in_proj_weight", "shared.weight", "SelfAttention.q.weight", "fc1.weight"),
    *("context_block.attn.qkv.weight", "img_attn.qkv.weight", "img_in.weight", "x_embedder.proj.weight"),
    *("pos_embed", "attention.qkv.weight", "img_mod.1.weight", "decoder.conv_in.weight", "k_proj.bias"),
    *("block_1.conv1.weight", "q_proj.weight", "q_norm.weight", "cap_embedder.1.weight", "conv_in.weight"),
)


# ---- diffusers folders ----

FOLDERS = {
    "sd2": tiny_sd2.write_folder,
    "sdxl": tiny_sdxl.write_folder,
    "sd3": lambda folder: tiny_sd3.write_folder(folder, "sd3"),
    "sd35_medium": lambda folder: tiny_sd3.write_folder(folder, "sd35_medium"),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_is_told_by_its_weights(family: str, tmp_path: Path) -> None:
    folder = FOLDERS[family](tmp_path / "folder")
    base = api.open_base(folder)
    assert base.family.name == family and base.name == "folder"
    assert set(base.state_dicts) == set(base.family.folders)
    base.load()
    if family.startswith("sd3"):  # which may lack its largest text encoder
        (folder / "text_encoder_3").rename(tmp_path / "elsewhere")
        assert "text_encoder_3" not in api.open_base(folder).state_dicts
    (folder / "vae").rename(tmp_path / "vae")
    with Refusal("LG-BASE-001", "vae"):
        api.open_base(folder)


def test_a_folder_takes_no_further_files(tmp_path: Path, checkpoint: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    with Refusal("LG-BASE-012", "folder"):
        api.open_base(folder, vae=checkpoint)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    with Refusal("LG-BASE-002", "OtherPipeline", "sdxl"):
        api.open_base(folder)
    for text in ("{", "[]", "[" * 10**5, '{"_class_name": {"a": 1}}'):
        (folder / "model_index.json").write_text(text)
        with Refusal("LG-BASE-002"):
            api.open_base(folder)


def test_a_scheduler_tells_what_is_predicted(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    plain = api.open_base(folder)
    assert not plain.velocity and not plain.zero_terminal
    (folder / "scheduler").mkdir()
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    base = api.open_base(folder)
    assert base.velocity is True and base.zero_terminal is True
    assert base.weights_hash == plain.weights_hash


def test_shards_by_their_index(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    plain = api.open_base(folder).weights_hash
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    file.unlink()
    names = sorted(whole)
    placed = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        write(file.with_name(shard), {k: whole[k] for k in part})
        placed |= dict.fromkeys(part, shard)
    write(file.with_name("other-00001-of-00001.safetensors"), {k: torch.zeros_like(whole[k]) for k in names})
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    assert api.open_base(folder).weights_hash == plain
    outside = {names[0]: "../vae/diffusion_pytorch_model.safetensors"}
    for bad in (
        "{",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": {"a": 5}}',
        json.dumps({"weight_map": outside}),
    ):
        index.write_text(bad)
        with Refusal("LG-BASE-001", "unet"):
            api.open_base(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "gone.safetensors"}}))
    with Refusal("LG-BASE-001", "gone.safetensors"):
        api.open_base(folder)


# ---- the command line ----


def test_the_command_line_takes_files_by_kohyas_names_too(
    checkpoint: Path, tokenizer: Path, images: Path, weights: dict[str, torch.Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unet = write(tmp_path / "unet.safetensors", below(weights, ldm_keys.UNET_PREFIX))
    vae = write(tmp_path / "vae.safetensors", below(weights, ldm_keys.VAE_PREFIX))
    text = write(tmp_path / "text.safetensors", below(weights, ldm_keys.TEXT_PREFIX))
    common = [
        "train", "--train_data_dir", str(images), "--tokenizer", str(tokenizer), "--resolution", "32",
        "--min_bucket_reso", "16", "--max_bucket_reso", "64", "--bucket_reso_steps", "8", "--device", "cpu",
        "--max_train_steps", "1", "--preview_image", "false", "--output_name", "x", "--network_dim", "2",
    ]  # fmt: skip
    kohyas = tmp_path / "kohya.toml"
    named = {"pretrained_model_name_or_path": unet, "vae": vae, "train_data_dir": images}
    lines = [f"{key} = {json.dumps(str(path))}" for key, path in named.items()]
    more = ['network_module = "networks.lora"', 'resolution = "32"', "network_dim = 2", "max_train_steps = 1"]
    kohyas.write_text("\n".join([*lines, *more]))
    config = tmp_path / "config.toml"
    config.write_text(f"ae = {json.dumps(str(vae))}\n[files]\ntext_encoder = {json.dumps([str(text)])}\n")
    ways = {
        "checkpoint": ["--pretrained_model_name_or_path", str(checkpoint)],
        "flags": ["--pretrained_model_name_or_path", str(unet), "--vae", str(vae), "--clip_l", str(text)],
        "config": ["--pretrained_model_name_or_path", str(unet), "--config", str(config)],
        "kohya": ["--config_file", str(kohyas), "--text_encoder", str(text)],
    }
    made = []
    for name, flags in ways.items():
        out = tmp_path / name
        assert cli.main([*common, *flags, "--output_dir", str(out)]) == 0, capsys.readouterr().err
        if name != "kohya":  # whose defaults are others
            made.append(load_file(out / "loras" / "x.safetensors"))
    assert all(torch.equal(v, made[0][k]) for other in made[1:] for k, v in other.items())
    capsys.readouterr()
    for flags, named in (
        (["--pretrained_model_name_or_path", "demo", "--vae", str(vae)], "embedded"),
        ([*ways["config"], "--config", str(two_vaes(tmp_path, vae))], "two VAEs"),
    ):
        assert cli.main([*common, *flags, "--output_dir", str(tmp_path / "no")]) == 1
        said = capsys.readouterr().err
        assert "LG-BASE-012" in said and named in said


def test_pictures_of_a_denoisers_file_tell_the_vae(
    checkpoint: Path, tokenizer: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    unet = write(tmp_path / "unet.safetensors", below(weights, ldm_keys.UNET_PREFIX))
    vae = write(tmp_path / "own_vae.safetensors", below(weights, ldm_keys.VAE_PREFIX))
    flags = [
        "sample", "--pretrained_model_name_or_path", str(unet), "--vae", str(vae), "--text_encoder",
        str(checkpoint), "--tokenizer", str(tokenizer), "--prompts", "a", "--steps", "2", "--width", "32",
        "--height", "32", "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(flags) == 0
    (picture,) = (tmp_path / "out").glob("seed*.png")
    with Image.open(picture) as image:
        assert "VAE: own_vae" in image.info["parameters"] and "Model: unet" in image.info["parameters"]


def two_vaes(folder: Path, vae: Path) -> Path:
    file = folder / "two.toml"
    file.write_text(f"ae = {json.dumps(str(vae))}\nvae = {json.dumps(str(vae))}\n")
    return file
