"""Diffusers' own Flux.1 transformer on the benchmark's weights, for the plain loop that people write.

Its query, key and value are layers of their own, so its LoRA has other matrices than ours: the first step's
loss is ours, and later ones have the same size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

TARGETS = (
    r".*\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|norm1?\.linear|norm1_context\.linear|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj"
    r"|ff_context\.net\.2|proj_mlp|proj_out)"
)


class DiffusersFlux(nn.Module):
    """Called as our transformer is, computed by diffusers'."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        width, head_dim = ours.img_in.out_features, sum(ours.axes)
        with torch.device("meta"):
            self.model: Any = FluxTransformer2DModel(
                in_channels=ours.img_in.in_features,
                num_layers=len(ours.double_blocks),
                num_single_layers=len(ours.single_blocks),
                attention_head_dim=head_dim,
                num_attention_heads=width // head_dim,
                joint_attention_dim=ours.context,
                pooled_projection_dim=ours.pooled,
                guidance_embeds=ours.guidance_in is not None,
                axes_dims_rope=ours.axes,
            )
        self.context, self.latent_channels = ours.context, ours.latent_channels
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(cut(ours.state_dict(), shapes), assign=True)
        self.model.requires_grad_(False)

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        guidance: float,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `FluxTransformer`."""
        (batch, _, height, width), device = latents.shape, latents.device
        rows, columns = height // 2, width // 2
        tokens = latents.unflatten(2, (rows, 2)).unflatten(4, (columns, 2)).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(rows, columns, 3, device=device)
        places[..., 1] = torch.arange(rows, device=device)[:, None]
        places[..., 2] = torch.arange(columns, device=device)[None]
        out = self.model(
            hidden_states=tokens.flatten(3).flatten(1, 2),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t / 1000,
            guidance=torch.full((batch,), guidance, device=device),
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            return_dict=False,
        )[0]
        image: torch.Tensor = out.view(batch, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return image.reshape(latents.shape)


def cut(ours: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return our transformer's tensors under diffusers' names: views, and one copy whose halves change."""
    from loragraft.trainer.families.names.flux_keys import BLOCKS, SWAPPED, TOP

    layers = dict(TOP)
    for theirs, (block, names) in BLOCKS.items():
        for number in sorted({int(m[1]) for k in ours if (m := re.match(rf"{block}\.(\d+)\.", k))}):
            for layer, sources in names.items():
                layers[f"{block}.{number}.{layer}"] = tuple(f"{theirs}.{number}.{s}" for s in sources)
    found: dict[str, torch.Tensor] = {}
    for layer, names_there in layers.items():
        for ending in (".weight", ".bias"):
            tensor, start = ours.get(layer + ending), 0
            if tensor is None:
                continue
            if layer == SWAPPED:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            for name in names_there:
                rows = shapes[name + ending][0]
                found[name + ending] = tensor[start : start + rows]
                start += rows
    return found
