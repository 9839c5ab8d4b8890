"""Random weights of transformers' true width, two blocks of each kind, in the files that people keep.

Text encoders have their true size and lie in fp8, as most cards hold them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft_tests.full.random_values import Values

TRANSFORMER, VAE = "model.diffusion_model.", r"(vae|first_stage_model)\."
TEXT = r"text_encoders\.(\w+)\.transformer\."
SMALL = ("clip_l",)  # kept in bf16
CLIP_WORDS, T5_WORDS = 49408, 32128
QWEN25_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def flux() -> nn.Module:
    """Return Flux.1 dev's transformer."""
    from loragraft.trainer.families.modules.flux_blocks import FluxTransformer

    return FluxTransformer(
        width=3072,
        heads=24,
        inside=12288,
        channels=64,
        context=4096,
        pooled=768,
        double=2,
        single=2,
        guided=True,
    )


def flux2() -> nn.Module:
    """Return FLUX.2 klein 4B's transformer."""
    from loragraft.trainer.families.modules.flux2_model import Flux2Transformer

    return Flux2Transformer(width=3072, heads=24, inside=9216, channels=128, context=7680, double=2, single=2)


def z_image() -> nn.Module:
    """Return Z-Image's transformer."""
    from loragraft.trainer.families.modules.z_image_model import ZImageTransformer

    return ZImageTransformer(
        width=3840,
        heads=30,
        inside=10240,
        channels=64,
        context=2560,
        time=256,
        time_inside=1024,
        layers=2,
        noise_refiners=2,
        context_refiners=2,
    )


def qwen_image() -> nn.Module:
    """Return Qwen-Image's transformer."""
    from diffusers import QwenImageTransformer2DModel

    made: nn.Module = QwenImageTransformer2DModel(num_layers=2)
    return made


def flux_vae() -> nn.Module:
    """Return Flux.1's autoencoder."""
    from diffusers import AutoencoderKL

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


def flux2_vae() -> nn.Module:
    """Return FLUX.2's autoencoder."""
    from diffusers import AutoencoderKLFlux2

    made: nn.Module = AutoencoderKLFlux2()
    return made


def qwen_vae() -> nn.Module:
    """Return Qwen-Image's autoencoder."""
    from diffusers import AutoencoderKLQwenImage

    made: nn.Module = AutoencoderKLQwenImage()
    return made


def clip(layers: int = 12, words: int = CLIP_WORDS) -> nn.Module:
    """Return CLIP-L."""
    from transformers import CLIPTextConfig, CLIPTextModel

    made: nn.Module = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=12,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
        )
    )
    return made


def t5(layers: int = 24, words: int = T5_WORDS, inside: int = 10240) -> nn.Module:
    """Return T5-XXL's encoder."""
    from transformers import T5Config, T5EncoderModel

    made: nn.Module = T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=4096,
            d_kv=64,
            d_ff=inside,
            num_layers=layers,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )
    return made


def qwen25() -> nn.Module:
    """Return Qwen2.5-VL 7B's language model."""
    from transformers import Qwen2Config, Qwen2Model

    made: nn.Module = Qwen2Model(Qwen2Config(**QWEN25_7B))
    return made


def qwen3() -> nn.Module:
    """Return Qwen3 4B without its head."""
    from transformers import Qwen3Config, Qwen3Model

    made: nn.Module = Qwen3Model(Qwen3Config(**QWEN3_4B))
    return made


@dataclass(frozen=True)
class Wide:
    """A family's modules by the names of its parts, and ComfyUI's names for its text encoders.

    ``texts`` are their files in the order of the loader's inputs, ``kind`` is the loader's type.
    """

    parts: Mapping[str, Callable[[], nn.Module]]
    texts: tuple[str, ...]
    kind: str


FAMILIES: dict[str, Wide] = {
    "flux": Wide(
        {"denoiser": flux, "vae": flux_vae, "text_encoder": clip, "text_encoder_2": t5},
        ("t5xxl", "clip_l"),
        "flux",
    ),
    "flux2": Wide({"denoiser": flux2, "vae": flux2_vae, "text_encoder": qwen3}, ("qwen3_4b",), "flux2"),
    "z_image": Wide({"denoiser": z_image, "vae": flux_vae, "text_encoder": qwen3}, ("qwen3_4b",), "lumina2"),
    "qwen_image": Wide(
        {"denoiser": qwen_image, "vae": qwen_vae, "text_encoder": qwen25}, ("qwen25_7b",), "qwen_image"
    ),
}


def named(name: str, parts: Mapping[str, Callable[[], nn.Module]]) -> Mapping[str, torch.Tensor]:
    """Return meta tensors of a family's parts under single-file names."""
    from loragraft.trainer.families import FAMILIES as families

    with torch.device("meta"):
        return families[name].join({part: _state_dict(make()) for part, make in parts.items()})


def _state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's tensors; a CLIP's under the names that all releases of transformers read."""
    tensors = {k: v for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    if any(k.startswith("embeddings.") for k in tensors):
        return {f"text_model.{k}": v for k, v in tensors.items()}
    return tensors


def in_files(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return a family's meta tensors by the file they lie in, below ComfyUI's models, under its own names."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in named(name, FAMILIES[name].parts).items():
        if key.startswith(TRANSFORMER):
            file, own = f"diffusion_models/{name}", key.removeprefix(TRANSFORMER)
        elif match := re.match(TEXT, key):
            file, own = f"text_encoders/{match[1]}", key[match.end() :]
        else:
            file, own = f"vae/{FAMILIES[name].parts['vae'].__name__}", re.sub(VAE, "", key, count=1)
        files.setdefault(file, {})[own] = tensor
    return files


def dtype_of(file: str) -> torch.dtype:
    """Return the dtype in which a file's weights are kept."""
    if file.startswith("text_encoders") and not file.endswith(SMALL):
        return torch.float8_e4m3fn
    return torch.float32 if file.startswith("vae") else torch.bfloat16


def write_files(name: str, folder: Path) -> dict[str, Path]:
    """Return a family's files in ``folder`` (4 to 10 GB), each written tensor by tensor if not there."""
    from loragraft.trainer.tools.stream import write_stream

    paths = {}
    for file, tensors in in_files(name).items():
        paths[file] = path = folder / f"{file.replace('/', '_')}_random.safetensors"
        if not path.exists():
            shapes = {own: tensor.shape for own, tensor in tensors.items()}
            forms = {own: (dtype_of(file), tuple(shape)) for own, shape in shapes.items()}
            make = partial(_value, Values(0, torch.float32), shapes, dtype_of(file))
            write_stream(path, forms, make, {"format": "pt"})
    return paths


def _value(values: Values, shapes: Mapping[str, torch.Size], dtype: torch.dtype, name: str) -> torch.Tensor:
    return values.of(name, shapes[name]).to(dtype)
