"""A copy of a host's module on the same weights, of plain layers, so that a LoRA can be put into it.

ComfyUI's own layers cast their weights as its loader decided; in the copy they are torch's, and the trainer
decides. The host's module is read, never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

# A layer derived from one of these computes the same, but for the casts.
PLAIN: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding),
)
HOSTS = "comfy.ops"  # the module whose layers these are


def shadow(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of ``module`` whose parameters and buffers are ``weights``, by their names; frozen.

    Tensors without an entry (buffers that no state dict holds) are copied.
    """
    held = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    memo: dict[int, object] = {}
    for name, tensor in held.items():
        if name in weights:
            is_parameter = isinstance(tensor, nn.Parameter)
            own = weights[name]
            memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if is_parameter else own
        else:
            memo[id(tensor)] = tensor.detach().clone()
    copied = copy.deepcopy(module, memo)
    for layer in copied.modules():
        plain = next((kind for kind in PLAIN if isinstance(layer, kind)), None)
        if plain is not None and type(layer) is not plain and type(layer).__module__ == HOSTS:
            layer.__class__ = plain
    return copied.requires_grad_(False).train(False)
