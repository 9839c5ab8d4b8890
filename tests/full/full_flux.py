"""Random weights of Flux.1 dev's true width, two blocks of each kind, in the files that people keep.

The T5 has its true size, 24 layers of width 4096, in fp8 as most cards hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from loragraft_tests.full.random_values import Values

WIDTH, TEXT, POOLED = 3072, 4096, 768
CLIP_LAYERS, T5_LAYERS, T5_INSIDE = 12, 24, 10240
CLIP_WORDS, T5_WORDS = 49408, 32128
MODULES = 2 * 10 + 2 * 3  # of the transformer that a LoRA trains
# part -> below which folder of ComfyUI's models, and as what
FILES: dict[str, tuple[str, torch.dtype]] = {
    "flux": ("diffusion_models", torch.bfloat16),
    "clip_l": ("text_encoders", torch.bfloat16),
    "t5xxl": ("text_encoders", torch.float8_e4m3fn),
    "ae": ("vae", torch.float32),
}


def transformer() -> nn.Module:
    """Return the transformer without weights."""
    from loragraft.trainer.families.modules.flux_blocks import FluxTransformer

    with torch.device("meta"):
        return FluxTransformer(
            width=WIDTH,
            heads=24,
            inside=4 * WIDTH,
            channels=64,
            context=TEXT,
            pooled=POOLED,
            double=2,
            single=2,
            guided=True,
        )


def vae() -> nn.Module:
    """Return the autoencoder without weights, under diffusers' names."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        made: nn.Module = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return made


def clip(layers: int = CLIP_LAYERS, words: int = CLIP_WORDS) -> nn.Module:
    """Return CLIP-L without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        made: nn.Module = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=POOLED,
                intermediate_size=4 * POOLED,
                num_hidden_layers=layers,
                num_attention_heads=12,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
            )
        )
    return made


def t5(layers: int = T5_LAYERS, words: int = T5_WORDS, inside: int = T5_INSIDE) -> nn.Module:
    """Return T5's encoder without weights."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        made: nn.Module = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=TEXT,
                d_kv=64,
                d_ff=inside,
                num_layers=layers,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
    return made


def named(part: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return a part's tensors under the names that its own file has."""
    from loragraft.trainer.families.names.ldm_keys import VAE_PREFIX
    from loragraft.trainer.families.names.ldm_vae import join_vae

    tensors: Mapping[str, torch.Tensor] = module.state_dict()
    if part == "ae":
        joined = join_vae(tensors)
        return {name.removeprefix(VAE_PREFIX): joined[name] for name in joined}
    if part == "clip_l":
        body = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
        return {k: v for k, v in body.items() if not k.endswith("position_ids")}
    return {k: v for k, v in tensors.items() if "embed_tokens" not in k}


MADE = {"flux": transformer, "clip_l": clip, "t5xxl": t5, "ae": vae}


def num_tensors() -> int:
    """Return how many tensors the four files hold."""
    return sum(len(named(part, make())) for part, make in MADE.items())


def write_files(folder: Path) -> dict[str, Path]:
    """Return the four files in ``folder`` (8 GB), each written tensor by tensor if it is not there."""
    from loragraft.trainer.tools.stream import write_stream

    paths = {part: folder / f"{part}_random.safetensors" for part in FILES}
    for part, path in paths.items():
        if path.exists():
            continue
        dtype = FILES[part][1]
        shapes = {name: tensor.shape for name, tensor in named(part, MADE[part]()).items()}
        forms = {name: (dtype, tuple(shape)) for name, shape in shapes.items()}
        write_stream(path, forms, partial(_value, Values(0, torch.float32), shapes, dtype), {"format": "pt"})
    return paths


def _value(values: Values, shapes: Mapping[str, torch.Size], dtype: torch.dtype, name: str) -> torch.Tensor:
    return values.of(name, shapes[name]).to(dtype)
