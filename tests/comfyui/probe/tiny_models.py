"""Tiny random models of several families, as ComfyUI's own MODEL, CLIP and VAE objects and as one file.

ComfyUI detects models by their full widths, so these are put together by hand from the same classes. Widths
follow what no file states but all models have: heads of 64 or 128, a depth of 1/64 of SD3's width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.ldm.models.autoencoder as autoencoder
import comfy.ldm.wan.vae as causal_autoencoder
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import comfy.text_encoders.flux as flux_text
import comfy.text_encoders.sd2_clip as sd2_text
import comfy.text_encoders.sd3_clip as sd3_text
import comfy.utils
import folder_paths
import torch
from transformers import T5TokenizerFast

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "text_encoders.{}.transformer."
WIDTH = 64  # of CLIP and of Flux's T5
SD3_TEXT = 4096  # ComfyUI pads CLIP's part of SD3's conditioning to it
WORDS = 1000  # of T5's 32100, where its vectors are that wide
V, EPS = comfy.model_base.ModelType.V_PREDICTION, comfy.model_base.ModelType.EPS


def clip_config(width: int = WIDTH) -> dict[str, int]:
    return {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 3,
    }


def t5_config(width: int, words: int) -> dict[str, int]:
    return {
        "d_model": width,
        "d_kv": 64,
        "num_heads": 1,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "vocab_size": words,
    }


def unet_config(**changes: Any) -> dict[str, Any]:
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1],
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "adm_in_channels": None,
    }
    return {**config, **changes}


@dataclass(frozen=True)
class Tiny:
    """How a family's tiny model is put together."""

    config: type
    unet: dict[str, Any]
    tokenizer: type
    clip: Any
    texts: dict[str, dict[str, int]]
    latent_channels: int = 4
    quant_conv: bool = True
    batch_norm: bool = False  # of latents, 2x2 of which are one
    causal: bool = False  # Wan's autoencoder, as Qwen-Image has it
    model_type: Any = None
    biases: float = 0.05  # their spread, by which SD2.x's prediction is told
    extra: tuple[str, ...] = ()  # tensors of the file that only say something
    dtype: torch.dtype = torch.float32  # of the denoiser as it is held
    scaled: str = ""  # the text encoder whose matrices are fp8 with a scale each, and what holds it
    scaled_clip: Any = None
    pieces: Callable[[], torch.Tensor] | None = (
        None  # the tokenizer that lies among the text encoder's weights
    )

    def tokenizer_data(self) -> dict[str, torch.Tensor]:
        return {} if self.pieces is None else {"spiece_model": self.pieces()}


class SD3TinyTokenizer(sd3_text.SD3Tokenizer):
    """SD3's three, with T5's first words only."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {})
        self.t5xxl.tokenizer = T5TokenizerFast.from_pretrained(short_t5())


SDXL_UNET = unet_config(
    transformer_depth=[0, 2],
    transformer_depth_middle=2,
    transformer_depth_output=[0, 0, 2, 2],
    context_dim=2 * WIDTH,
    num_classes="sequential",
    adm_in_channels=WIDTH + 6 * 256,
)
MMDIT = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 2 * WIDTH,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": SD3_TEXT, "out_features": 128},
    },
    "num_patches": 16 * 16,
    "pos_embed_max_size": 16,
    "pos_embed_scaling_factor": None,
}
FLUX = {
    "image_model": "flux",
    "axes_dim": [16, 56, 56],
    "num_heads": 2,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "context_in_dim": WIDTH,
    "vec_in_dim": WIDTH,
    "depth": 2,
    "depth_single_blocks": 2,
    "guidance_embed": True,
    "yak_mlp": False,
    "txt_norm": False,
}
SDXL_TEXT = {"clip_l": clip_config(), "clip_g": clip_config()}
SD3_TEXTS = {**SDXL_TEXT, "t5xxl": t5_config(SD3_TEXT, WORDS + 128)}
FLUX_TEXTS = {"clip_l": clip_config(), "t5xxl": t5_config(WIDTH, 32128)}
SD2 = Tiny(
    supported.SD20,
    unet_config(context_dim=2 * WIDTH),
    sd2_text.SD2Tokenizer,
    sd2_text.SD2ClipModel,
    {"clip_h": clip_config(2 * WIDTH)},
    model_type=EPS,
)
SDXL = Tiny(
    supported.SDXL,
    SDXL_UNET,
    comfy.sdxl_clip.SDXLTokenizer,
    comfy.sdxl_clip.SDXLClipModel,
    SDXL_TEXT,
    model_type=EPS,
)


def changed(tiny: Tiny, **changes: Any) -> Tiny:
    return Tiny(**{**vars(tiny), **changes})


SD35 = Tiny(
    supported.SD3,
    {**MMDIT, "qk_norm": "rms", "x_block_self_attn_layers": [0]},  # as 3.5 medium
    SD3TinyTokenizer,
    sd3_text.sd3_clip(),
    SD3_TEXTS,
    latent_channels=16,
    quant_conv=False,
)
FLUX_DEV = Tiny(
    supported.Flux,
    FLUX,
    flux_text.FluxTokenizer,
    flux_text.flux_clip(),
    FLUX_TEXTS,
    latent_channels=16,
    quant_conv=False,
)
FAMILIES: dict[str, Tiny] = {
    "sd2": SD2,
    "sd2_v": changed(SD2, model_type=V, biases=0.15),
    "sdxl": SDXL,
    "sdxl_v": changed(SDXL, model_type=V, extra=("v_pred", "ztsnr")),
    "sd3": changed(SD35, unet=MMDIT),
    "sd35": SD35,
    "sd35_clips": changed(
        SD35, clip=sd3_text.sd3_clip(t5=False), texts={k: v for k, v in SD3_TEXTS.items() if k != "t5xxl"}
    ),
    "flux": FLUX_DEV,
    "flux_fp8": changed(
        FLUX_DEV,
        dtype=torch.float8_e4m3fn,
        scaled="t5xxl",
        scaled_clip=flux_text.flux_clip(t5_quantization_metadata={"mixed_ops": True}),
    ),
    "flux_schnell": changed(FLUX_DEV, config=supported.FluxSchnell, unet={**FLUX, "guidance_embed": False}),
}


def file_of(name: str) -> Path:
    return Path(folder_paths.get_folder_paths("checkpoints")[0]) / f"tiny_{name}.safetensors"


def short_t5() -> str:
    """Write T5's tokenizer with its first words only; return its folder."""
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0]) / "t5_short"
    if not (folder / "tokenizer.json").is_file():
        whole = Path(sd3_text.__file__).parent / "t5_tokenizer"
        made = json.loads((whole / "tokenizer.json").read_text("utf-8"))
        made["model"]["vocab"] = made["model"]["vocab"][:WORDS]
        made["added_tokens"] = [t for t in made["added_tokens"] if t["id"] < WORDS]
        config = json.loads((whole / "tokenizer_config.json").read_text("utf-8"))
        kept = ("eos_token", "pad_token", "unk_token", "tokenizer_class", "model_max_length")
        config = {**{k: config[k] for k in kept}, "extra_ids": 0}
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(json.dumps(made), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


# ---- the modules, empty ----


def model_of(tiny: Tiny, disable_dynamic: bool = False) -> Any:
    class Config(tiny.config):  # type: ignore[name-defined]
        def model_type(self, state_dict: Any, prefix: str = "") -> Any:
            return tiny.model_type or super().model_type(state_dict, prefix)

    config = Config(dict(tiny.unet))
    config.set_inference_dtype(tiny.dtype, None if tiny.dtype == torch.float32 else torch.float32)
    if "ztsnr" in tiny.extra:
        config.sampling_settings["zsnr"] = True
    model = config.get_model({}, "")
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(
        model,
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


def clip_of(tiny: Tiny, weights: Sequence[dict[str, torch.Tensor]] = ()) -> Any:
    """Return a CLIP; with ``weights``, one a text encoder, on these, which may be quantised."""
    kind = tiny.scaled_clip if weights else tiny.clip
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tiny.tokenizer, kind),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={
            "dtype": torch.float32,  # a LoRA on half precision is rounded to it
            **{f"{kind}_model_config": config for kind, config in tiny.texts.items()},
        },
        parameters=1,
        state_dict=list(weights),
        tokenizer_data=tiny.tokenizer_data(),
    )


def autoencoder_of(tiny: Tiny) -> Any:
    if tiny.causal:
        numbers = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
        return causal_autoencoder.WanVAE(dim=8, z_dim=tiny.latent_channels, **numbers)
    parts = {
        "double_z": True,
        "z_channels": tiny.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": tiny.batch_norm,
    }
    if tiny.quant_conv:
        return autoencoder.AutoencoderKL(ddconfig=parts, embed_dim=tiny.latent_channels)
    inner = "comfy.ldm.modules.diffusionmodules.model."
    return autoencoder.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": inner + "Encoder", "params": parts},
        decoder_config={"target": inner + "Decoder", "params": parts},
    )


def vae_of(tiny: Tiny, weights: dict[str, torch.Tensor]) -> Any:
    if tiny.causal:
        return comfy.sd.VAE(sd=weights)
    with mock.patch.object(comfy.sd, "AutoencoderKL", lambda: autoencoder_of(tiny)):
        vae = comfy.sd.VAE(sd=weights, config={"params": {}})
    folded = 2 if tiny.batch_norm else 1
    vae.latent_channels = tiny.latent_channels * folded**2
    vae.downscale_ratio = vae.upscale_ratio = 8 * folded
    return vae


# ---- the weights ----


def drawn(name: str, shape: torch.Size, seed: int, biases: float) -> torch.Tensor:
    """Draw a weight by its name: matrices keep the scale of what they are applied to."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    values = torch.randn(shape, generator=generator)
    if name.endswith(".gamma"):
        return 1 + 0.1 * values
    if len(shape) > 1 and not name.endswith(("embedding.weight", "shared.weight", "pos_embed")):
        return values / max(1, int(shape[1:].numel())) ** 0.5
    if len(shape) == 1 and name.endswith((".weight", ".scale", ".running_var")):
        return 1 + 0.1 * values
    return biases * values if len(shape) == 1 else 0.1 * values


def write(name: str, seed: int = 0) -> Path:
    """Write the family's tiny weights as one checkpoint, half precision, unless they are there."""
    path, tiny = file_of(name), FAMILIES[name]
    if path.is_file():
        return path
    parts = {UNET: model_of(tiny).model.diffusion_model, VAE: autoencoder_of(tiny)}
    cond = clip_of(tiny).cond_stage_model
    parts |= {TEXT.format(kind): getattr(cond, kind).transformer for kind in tiny.texts}
    weights = {
        prefix + key: drawn(prefix + key, value.shape, seed, tiny.biases).half()
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }
    # Flux's and Chroma's files have another name for it than ComfyUI's modules.
    weights = {
        k.replace("_norm.weight", "_norm.scale") if is_flux_norm(k) else k: v for k, v in weights.items()
    }
    if tiny.dtype != torch.float32:
        weights |= {k: v.to(tiny.dtype) for k, v in weights.items() if k.startswith(UNET)}
    if tiny.scaled:
        weights = dict(with_scales(weights, TEXT.format(tiny.scaled) + "encoder.block."))
    weights |= {key: torch.zeros(()) for key in tiny.extra}
    weights |= {f"text_encoders.{key}": value for key, value in tiny.tokenizer_data().items()}
    comfy.utils.save_torch_file(weights, str(path))
    return path


def with_scales(weights: dict[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights, those of linear layers below ``prefix`` as fp8 with a scale, as ComfyUI marks them."""
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not name.startswith(prefix) or weight.ndim < 2 or "relative_attention_bias" in name:
            yield name, weight
            continue
        scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        yield name, (weight.float() / scale).to(torch.float8_e4m3fn)
        yield f"{layer}.weight_scale", scale
        yield f"{layer}.comfy_quant", mark.clone()


def is_flux_norm(name: str) -> bool:
    own = name.endswith(("query_norm.weight", "key_norm.weight"))
    return name.startswith(UNET) and own and "_blocks." in name and ".attention." not in name


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def load_model(name: str, disable_dynamic: bool = False) -> Any:
    """Return the MODEL; ComfyUI calls this again when it needs an own copy of the weights."""
    patcher = model_of(FAMILIES[name], disable_dynamic)
    weights = comfy.utils.load_torch_file(str(file_of(name)))
    patcher.model.load_model_weights(weights, UNET, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def load(name: str) -> tuple[Any, Any, Any]:
    """Return MODEL, CLIP and VAE of a tiny family, on the weights of its file."""
    tiny, weights = FAMILIES[name], comfy.utils.load_torch_file(str(write(name)))
    texts = {kind: part(weights, TEXT.format(kind)) for kind in tiny.texts}
    if tiny.scaled:
        return load_model(name), clip_of(tiny, list(texts.values())), vae_of(tiny, part(weights, VAE))
    clip = clip_of(tiny)
    for kind, own in texts.items():
        missing, extra = getattr(clip.cond_stage_model, kind).load_sd(own)
        assert not missing and not extra, (missing, extra)
    return load_model(name), clip, vae_of(tiny, part(weights, VAE))


class ProbeTinyBase:
    """Hand out a tiny random base of a family; its file lies in models/checkpoints."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (list(FAMILIES),)}}

    def load(self, family: str) -> tuple[Any, Any, Any]:
        return load(family)


NODES = {"ProbeTinyBase": ProbeTinyBase}
