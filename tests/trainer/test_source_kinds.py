"""What a file of weights is: its names and shapes tell, whatever made it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.sources.sources import Source, bring_together, parts_of
from loragraft.trainer.families.sources.text_files import GEMMA_NAMES, LLM_NAMES, T5_NAMES, read_text_file
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer import tiny_dits, tiny_qwen, tiny_t5
from loragraft_tests.trainer.model_files import LORA, VAES, below
from loragraft_tests.trainer.tiny_families import TOKENIZERS, WEIGHTS


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


def test_bytes_of_a_tokenizer_in_a_text_encoder_are_kept() -> None:
    text = {**llm(2304, GEMMA), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    unet = shapes({"noise_refiner.0.attention.qkv.weight": (3, 1)})
    weights = bring_together(Source("d", unet), texts=[Source("t", text)]).weights()
    assert weights["text_encoders.spiece_model"].shape == (9,)
    assert "text_encoders.gemma2_2b.transformer.model.embed_tokens.weight" in weights


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
