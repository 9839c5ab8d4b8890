"""Tiny models of the newer transformers: Chroma, FLUX.2 klein, Z-Image, Qwen-Image and Lumina 2.

See `tiny_models`.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any
from unittest import mock

import comfy.supported_models as supported
import comfy.text_encoders.flux as flux_text
import comfy.text_encoders.llama as llama
import comfy.text_encoders.lumina2 as lumina_text
import comfy.text_encoders.pixart_t5 as pixart_text
import comfy.text_encoders.qwen_image as qwen_text
import comfy.text_encoders.z_image as z_text
import sentencepiece
import torch
from torch import nn

from .tiny_models import FAMILIES, FLUX, WIDTH, Tiny, t5_config

PIECES = 60  # of Gemma's 256000
KLEIN_LAYERS = 28  # its conditioning is three of them: 9, 18 and 27


def qwen_config(layers: int) -> dict[str, int]:
    """Return Qwen's, whose heads have always 128 values."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def blind_qwen(**kwargs: Any) -> Any:
    """Build Qwen2.5-VL without its eyes, which are always of full size."""
    with mock.patch.object(llama.qwen_vl, "Qwen2VLVisionTransformer", lambda **_: nn.Module()):
        return qwen_text.te()(**kwargs)


@cache
def pieces() -> torch.Tensor:
    """Return the bytes of a small SentencePiece model with Gemma's numbers of special tokens."""
    stream = io.BytesIO()
    texts = [
        "a red circle, a blue creature, an assistant designed to generate images",
        "<Prompt Start> You draw.",
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5),
        model_writer=stream,
        vocab_size=PIECES,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


CHROMA = {
    **{k: v for k, v in FLUX.items() if k not in ("guidance_embed", "yak_mlp", "txt_norm")},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 128,
    "n_layers": 2,
    # ComfyUI counts the modulations of all blocks of the full depth, whatever it is
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 19,
    "depth_single_blocks": 38,
    "vec_in_dim": None,
}
KLEIN = {
    **FLUX,
    "image_model": "flux2",
    "axes_dim": [32, 32, 32, 32],
    "mlp_ratio": 3.0,
    "theta": 2000,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "qkv_bias": False,
    "ops_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
    "context_in_dim": 3 * WIDTH,
    "vec_in_dim": None,
    "guidance_embed": False,
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
QWEN_IMAGE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 192,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
GEMMA = {
    "vocab_size": PIECES + 4,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES["lumina2"] = Tiny(
    supported.Lumina2,
    LUMINA,
    lumina_text.LuminaTokenizer,
    lumina_text.te(),
    {"gemma2_2b": GEMMA},
    latent_channels=16,
    quant_conv=False,
    pieces=pieces,
)
FAMILIES["qwen_image"] = Tiny(
    supported.QwenImage,
    QWEN_IMAGE,
    qwen_text.QwenImageTokenizer,
    blind_qwen,
    {"qwen25_7b": qwen_config(2)},
    latent_channels=16,
    causal=True,
)
FAMILIES["chroma"] = Tiny(
    supported.Chroma,
    CHROMA,
    pixart_text.PixArtTokenizer,
    pixart_text.pixart_te(),
    {"t5xxl": t5_config(WIDTH, 32128)},
    latent_channels=16,
    quant_conv=False,
)
FAMILIES["flux2"] = Tiny(
    supported.Flux2,
    KLEIN,
    flux_text.KleinTokenizer,
    flux_text.klein_te(),
    {"qwen3_4b": qwen_config(KLEIN_LAYERS)},
    latent_channels=32,
    batch_norm=True,
)
FAMILIES["z_image"] = Tiny(
    supported.ZImage,
    Z_IMAGE,
    z_text.ZImageTokenizer,
    z_text.te(),
    {"qwen3_4b": qwen_config(3)},
    latent_channels=16,
    quant_conv=False,
)
