"""A MODEL whose linear layers are held as ComfyUI-GGUF holds them, and a look at what training makes of it.

That extension is not installed for tests. Copied is what counts: a tensor class of raw blocks with a type and
a shape of its own, and state dicts without values.
"""

from __future__ import annotations

import enum
import json
from typing import Any

import torch
from torch import nn

from .equal import pack

Kind = enum.Enum("Kind", {"F16": 1, "Q8_0": 8})


class GGMLTensor(torch.Tensor):
    """Raw bytes of a weight, with its type and shape."""

    def __new__(cls, data: torch.Tensor, tensor_type: Kind, tensor_shape: torch.Size) -> GGMLTensor:
        return data.as_subclass(cls)

    def __init__(self, data: torch.Tensor, tensor_type: Kind, tensor_shape: torch.Size) -> None:
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape

    def detach(self) -> GGMLTensor:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tensor_shape


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Return rows of blocks: 32 integers behind their half-precision scale."""
    blocks = weight.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
    joined = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1)
    return joined.reshape(weight.shape[0], -1)


def sketch(layer: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Write a state dict that only tells sizes, and room to work in."""
    for name, value in layer.named_parameters():
        destination[prefix + name] = torch.zeros(value.size(), device="meta")
    destination[prefix + "temp.weight"] = torch.empty(8, 8, device="meta")


class ProbeGGUF:
    """Hold the denoiser's linear layers as GGUF layers, open the base, and compare the trainer's weights."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {name: (name.upper(),) for name in ("model", "clip", "vae")}}

    def look(self, model: Any, clip: Any, vae: Any) -> dict[str, Any]:
        model = model.clone(force_deepcopy=True)
        root = model.model.diffusion_model
        plain = {k: v.clone() for k, v in root.state_dict().items()}
        raw = set()
        for layer in root.modules():
            if isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0:
                weight = layer.weight.detach()
                held = GGMLTensor(q8_0(weight), Kind.Q8_0, weight.shape)
                layer.weight = nn.Parameter(held, requires_grad=False)
                if layer.bias is not None:
                    bias = GGMLTensor(layer.bias.detach().half(), Kind.F16, layer.bias.shape)
                    layer.bias = nn.Parameter(bias, requires_grad=False)
                layer._save_to_state_dict = sketch.__get__(layer)
                raw.add(layer.weight.untyped_storage().data_ptr())
        with pack("nodes.host").training_mode():
            weights = dict(pack("nodes.host_packed").stored(root))
            shared = {k: pack("nodes.host_packed").shared(w, "MODEL", k) for k, w in weights.items()}
            base = pack("nodes.host_bases").open_base(model, clip, vae)
            loaded = base.load().denoiser.state_dict()
        packed = {k: w.packed for k, w in shared.items() if hasattr(w, "packed")}
        errors = {
            k: float((shared[k].float() - plain[k].float()).abs().max() / plain[k].float().abs().max())
            for k in plain
        }
        report = {
            "names": sorted(set(shared) ^ set(plain)),
            "packed": len(packed),
            "kept": sum(hasattr(w, "packed") for w in loaded.values()),
            "copied": [
                k for k, p in packed.items() if next(p.buffers()).untyped_storage().data_ptr() not in raw
            ],
            "error": max(errors.values()),
            "family": base.family.name,
        }
        return {"ui": {"text": [json.dumps(report)]}}


NODES = {"ProbeGGUF": ProbeGGUF}
