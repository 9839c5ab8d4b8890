"""The embedded base as ComfyUI's own MODEL, CLIP and VAE objects.

ComfyUI detects checkpoints by SD1.5's widths, so these are built by hand from the shapes in the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."
TEXT_HEAD_DIM = 64


class DemoConfig(comfy.supported_models.SD15):
    """SD1.5 but for its widths."""


def load(file: Path, tokenizer: Path) -> tuple[Any, Any, Any]:
    """Return MODEL, CLIP and VAE of a single file in SD1.5's layout with any widths."""
    weights = comfy.utils.load_torch_file(str(file))
    clip = _clip(_part(weights, TEXT), tokenizer)
    clip.patcher.cached_patcher_init = (_reload_clip, (str(file), str(tokenizer)))
    vae = _vae(_part(weights, VAE))
    vae.patcher.cached_patcher_init = (_reload_vae, (str(file),))
    return model_only(str(file)), clip, vae


def model_only(file: str, disable_dynamic: bool = False) -> Any:
    """Return the MODEL alone; ComfyUI calls this again when it needs an own copy of the weights."""
    weights = comfy.utils.load_torch_file(file)
    config = DemoConfig(comfy.model_detection.detect_unet_config(weights, UNET))
    device = management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights, UNET)
    kinds = config.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=kinds, weight_dtype=comfy.utils.weight_dtype(weights, UNET)
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, kinds))
    model = config.get_model(weights, UNET)
    patcher_class = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    )
    patcher = patcher_class(model, load_device=device, offload_device=management.unet_offload_device())
    model.load_model_weights(weights, UNET, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (model_only, (file,))
    return patcher


def _clip(weights: dict[str, torch.Tensor], tokenizer: Path, disable_dynamic: bool = False) -> Any:
    vocabulary, hidden = weights["embeddings.token_embedding.weight"].shape

    class DemoTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                tokenizer_path=str(tokenizer),
                embedding_directory=embedding_directory,
                embedding_size=hidden,
                tokenizer_data=tokenizer_data or {},
            )

    class DemoClipModel(comfy.sd1_clip.SD1CheckpointClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {})
            # ComfyUI's CLIP always has 49408 words; this one has its own, with start and end at the end.
            embeddings = self.transformer.text_model.embeddings
            embeddings.token_embedding = self.operations.Embedding(
                vocabulary, hidden, dtype=dtype, device=device
            )
            embeddings.token_embedding.requires_grad_(False)
            self.special_tokens = {"start": vocabulary - 2, "end": vocabulary - 1, "pad": vocabulary - 1}

    config = {
        "hidden_size": hidden,
        "projection_dim": hidden,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(1, hidden // TEXT_HEAD_DIM),
        "num_hidden_layers": _count(weights, r"encoder\.layers\.(\d+)\."),
        "max_position_embeddings": weights["embeddings.position_embedding.weight"].shape[0],
        "eos_token_id": vocabulary - 1,
    }
    state = {"text_model." + k: v for k, v in weights.items()}
    # SD1.x files hold no projection; ComfyUI never uses it for them, and warns where it is missing.
    state["text_projection.weight"] = torch.eye(hidden, dtype=weights["final_layer_norm.weight"].dtype)
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"clip_l_tokenizer_class": DemoTokenizer},
        model_options={"clip_l_class": DemoClipModel, "clip_l_model_config": config},
        parameters=sum(v.numel() for v in weights.values()),
        state_dict=[state],
        disable_dynamic=disable_dynamic,
    )


def _vae(weights: dict[str, torch.Tensor]) -> Any:
    # The decoder has one residual block a level more than the encoder, which may have none.
    levels = _count(weights, r"decoder\.up\.(\d+)\.")
    widths = [weights[f"decoder.up.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    channels = weights["encoder.conv_in.weight"].shape[0]
    config = {
        "double_z": True,
        "z_channels": weights["decoder.conv_in.weight"].shape[1],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": [w // channels for w in widths],
        "num_res_blocks": _count(weights, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    embed = weights["post_quant_conv.weight"].shape[1]
    return comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": config, "embed_dim": embed}})


def _reload_clip(file: str, tokenizer: str, disable_dynamic: bool = False) -> Any:
    return _clip(_part(comfy.utils.load_torch_file(file), TEXT), Path(tokenizer), disable_dynamic).patcher


def _reload_vae(file: str, disable_dynamic: bool = False) -> Any:
    return _vae(_part(comfy.utils.load_torch_file(file), VAE)).patcher


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for k in weights if (m := re.match(pattern, k)))
