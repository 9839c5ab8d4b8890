"""Text encoders that lie in a file of their own: which one it is, and its names as ComfyUI holds them.

Told by names and shapes. Sizes that no released model has count as the usual one of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..names.pieces import Pieced
from ..text.openclip import to_hf
from .weights import Renamed

Tensors = Mapping[str, torch.Tensor]

CLIP_BY_WIDTH = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
CLIP_BY_LAYERS = ((31, "clip_g"), (23, "clip_h"), (0, "clip_l"))  # at least so many
T5_BY_WIDTH = {768: "t5base", 2048: "t5xl"}  # else t5xxl
UMT5_WORDS = 256384
QWEN25_BY_WIDTH = {2048: "qwen25_3b"}  # else qwen25_7b
QWEN3_BY_WIDTH = {1024: "qwen3_06b", 2048: "qwen3_2b", 4096: "qwen3_8b"}  # else qwen3_4b
GEMMA3_BY_WIDTH = {3840: "gemma3_12b"}  # else gemma3_4b
OTHER_BY_WIDTH = {3072: "ministral_3_3b", 5120: "mistral3_24b"}  # else llama

CLIP_INSIDE = ("embeddings.", "encoder.", "final_layer_norm.")
OPENCLIP_PREFIXES = ("", "model.", "cond_stage_model.model.")
LLM_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")  # of "layers.0."
TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")  # ComfyUI keeps some in the file, as bytes

# What llama.cpp calls the layers of a T5 encoder, and of a model that reads from left to right.
T5_NAMES = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
LLM_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = {
    **LLM_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LLAMA_BLOCK = re.compile(r"(?:enc\.)?blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class TextFile:
    """A text encoder: ComfyUI's name of its kind, and its weights under HF's names (views)."""

    kind: str
    weights: Tensors


def read_text_file(weights: Tensors) -> TextFile | None:
    """Return the text encoder that a file holds; None where it holds none that is known."""
    weights = _from_llama_cpp(weights)
    for reader in (_openclip, _clip, _t5, _llm):
        found = reader(weights)
        if found is not None:
            return found
    return None


def _openclip(weights: Tensors) -> TextFile | None:
    for prefix in OPENCLIP_PREFIXES:
        if f"{prefix}transformer.resblocks.0.ln_1.weight" in weights:
            found = Pieced(weights, to_hf(weights, prefix))
            return TextFile(_clip_kind(found), found)
    return None


def _clip(weights: Tensors) -> TextFile | None:
    for prefix in ("text_model.", ""):
        if f"{prefix}embeddings.token_embedding.weight" in weights:
            inside = tuple(prefix + start for start in CLIP_INSIDE)
            names = {f"text_model.{k.removeprefix(prefix)}": k for k in weights if k.startswith(inside)}
            names = {new: old for new, old in names.items() if not new.endswith("position_ids")}
            names |= {k: k for k in weights if k == "text_projection.weight"}
            found = Renamed(weights, names)
            return TextFile(_clip_kind(found), found)
    return None


def _clip_kind(weights: Tensors) -> str:
    width = weights["text_model.embeddings.token_embedding.weight"].shape[-1]
    layers = 1 + max((int(m[1]) for k in weights if (m := re.search(r"\.layers\.(\d+)\.", k))), default=-1)
    return CLIP_BY_WIDTH.get(width) or next(kind for least, kind in CLIP_BY_LAYERS if layers >= least)


def _t5(weights: Tensors) -> TextFile | None:
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in weights:
        return None
    names = {k: k for k in weights if k.startswith("encoder.") or k == "shared.weight"}
    tied = names.pop("encoder.embed_tokens.weight", None)  # the same as "shared"
    if tied is not None:
        names.setdefault("shared.weight", tied)
    words, width = weights[names["shared.weight"]].shape if "shared.weight" in names else (0, 0)
    kind = "umt5xxl" if words == UMT5_WORDS else T5_BY_WIDTH.get(width, "t5xxl")
    return TextFile(kind, Renamed(weights, names | {k: k for k in weights if k in TOKENIZERS}))


def _llm(weights: Tensors) -> TextFile | None:
    prefix = next((p for p in LLM_PREFIXES if f"{p}layers.0.self_attn.q_proj.weight" in weights), None)
    if prefix is None:
        return None
    inside = tuple(prefix + start for start in ("layers.", "embed_tokens.", "norm."))
    names = {f"model.{k[len(prefix) :]}": k for k in weights if k.startswith(inside)}
    for key in weights:  # Qwen2.5-VL's eyes, which ComfyUI calls so
        if key.startswith(("visual.", "model.visual.")):
            names[key.removeprefix("model.")] = key
    names |= {k: k for k in weights if k in TOKENIZERS}
    found = Renamed(weights, names)
    return TextFile(_llm_kind(found), found)


def _llm_kind(weights: Tensors) -> str:
    width = weights["model.layers.0.self_attn.q_proj.weight"].shape[-1]
    has_q_norm = "model.layers.0.self_attn.q_norm.weight" in weights
    if "model.layers.0.post_feedforward_layernorm.weight" in weights:
        return GEMMA3_BY_WIDTH.get(width, "gemma3_4b") if has_q_norm else "gemma2_2b"
    if "model.layers.0.self_attn.k_proj.bias" in weights:
        return QWEN25_BY_WIDTH.get(width, "qwen25_7b")
    if has_q_norm:
        return QWEN3_BY_WIDTH.get(width, "qwen3_4b")
    return OTHER_BY_WIDTH.get(width, "llama")


# ---- llama.cpp's names ----


@dataclass(frozen=True)
class _LessOne(Mapping[str, torch.Tensor]):
    """Weights of which some (``names``) were stored with 1 added, as llama.cpp keeps Gemma's norms."""

    source: Tensors
    names: frozenset[str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[name] - 1 if name in self.names else self.source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def _from_llama_cpp(weights: Tensors) -> Tensors:
    """Bring a GGUF text encoder to HF's names; other weights stay as they are."""
    if "token_embd.weight" not in weights:
        return weights
    if "enc.blk.0.attn_q.weight" in weights:
        return Renamed(weights, _renamed(weights, T5_NAMES, "encoder.block."))
    is_gemma = "blk.0.post_ffw_norm.weight" in weights
    found = Renamed(weights, _renamed(weights, GEMMA_NAMES if is_gemma else LLM_NAMES, "model.layers."))
    norms = frozenset(k for k in found if k.endswith("norm.weight")) if is_gemma else frozenset()
    return _LessOne(found, norms) if is_gemma else found


def _renamed(weights: Tensors, table: Mapping[str, str], block: str) -> dict[str, str]:
    """Map HF's names to llama.cpp's; a decoder's and an output layer's have no place and are left out."""
    names: dict[str, str] = {}
    for key in weights:
        match = LLAMA_BLOCK.fullmatch(key)
        if match and match[2] in table:
            names[f"{block}{match[1]}.{table[match[2]]}.{match[3]}"] = key
        elif not match and key.removesuffix(".weight") in table:
            names[f"{table[key.removesuffix('.weight')]}.weight"] = key
    return names
