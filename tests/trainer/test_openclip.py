"""OpenCLIP's text encoders: names both ways at full size, which rows are whose, and the projection's side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loragraft.trainer.families.names.pieces import Pieced
from loragraft.trainer.families.text.openclip import from_hf, named_by_hf, to_hf
from loragraft_tests.trainer import tiny_sdxl

SIZES = {"clip_h": (1024, 4096, 24, 16), "clip_g": (1280, 5120, 32, 20)}
PREFIX = "conditioner.embedders.1.model."


def full_size(kind: str) -> Any:
    """Return an OpenCLIP text encoder's module in transformers, in full size, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width, inside, layers, heads = SIZES[kind]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=inside,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config)


@pytest.fixture(scope="module")
def second() -> torch.nn.Module:
    """Return the tiny second text encoder."""
    return tiny_sdxl.random_modules()["text_encoder_2"]


@pytest.fixture(scope="module")
def openclip(second: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return its weights with OpenCLIP's names."""
    return tiny_sdxl.openclip_weights(second.state_dict(), PREFIX)


@pytest.mark.parametrize("kind", SIZES)
def test_names_and_shapes_at_full_size_go_both_ways(kind: str) -> None:
    hf = {k: v for k, v in full_size(kind).state_dict().items() if not k.endswith("position_ids")}
    there = Pieced(hf, from_hf(hf))
    width, layers = SIZES[kind][0], SIZES[kind][2]
    assert len(there) == 12 * layers + 5
    last = f"transformer.resblocks.{layers - 1}."
    assert there[f"{last}attn.in_proj_weight"].shape == (3 * width, width)
    assert there["positional_embedding"].shape == (77, width)
    prefixed = {PREFIX + k: there[k] for k in there} | {PREFIX + "logit_scale": torch.empty(())}
    back = Pieced(prefixed, to_hf(prefixed, PREFIX))
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in hf.items()}


def test_values_come_back_and_are_views_on_the_way_here(
    second: torch.nn.Module, openclip: dict[str, torch.Tensor]
) -> None:
    here = Pieced(openclip, to_hf(openclip, PREFIX))
    own = second.state_dict()
    assert set(here) == {k for k in own if not k.endswith("position_ids")}
    storages = {v.untyped_storage().data_ptr() for v in openclip.values()}
    for name, weight in here.items():
        assert torch.equal(weight, own[name]), name
        assert weight.untyped_storage().data_ptr() in storages, name
    again = Pieced(here, from_hf(here))
    assert set(again) == {k.removeprefix(PREFIX) for k in openclip} - {"logit_scale"}
    assert all(torch.equal(again[k], openclip[PREFIX + k]) for k in again)


def test_names_agree_with_diffusers_own_converter(
    second: torch.nn.Module, openclip: dict[str, torch.Tensor]
) -> None:
    from diffusers.loaders import single_file_utils as peer

    theirs = peer.convert_open_clip_checkpoint(second, dict(openclip), PREFIX)
    ours = Pieced(openclip, to_hf(openclip, PREFIX))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_layer_computes_what_openclips_own_layer_does(
    second: torch.nn.Module, openclip: dict[str, torch.Tensor]
) -> None:
    """OpenCLIP's block written with torch's attention, which takes the joined matrix as it is."""
    body: Any = second.text_model
    layer, width = f"{PREFIX}transformer.resblocks.1.", tiny_sdxl.POOLED
    w = {k.removeprefix(layer): v for k, v in openclip.items() if k.startswith(layer)}
    x = torch.randn((2, 9, width), generator=torch.Generator().manual_seed(1))
    attention = torch.nn.MultiheadAttention(width, width // 64, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in w.items() if k.startswith("attn.")})
    h = F.layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
    future = torch.full((9, 9), -math.inf).triu(1)
    y = x + attention(h, h, h, need_weights=False, attn_mask=future)[0]
    h = F.layer_norm(y, (width,), w["ln_2.weight"], w["ln_2.bias"])
    h = F.gelu(F.linear(h, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
    expected = y + F.linear(h, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    found = body.encoder.layers[1](x, future[None, None])
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


def test_the_projection_multiplies_from_the_other_side(
    second: torch.nn.Module, openclip: dict[str, torch.Tensor]
) -> None:
    state = torch.randn((3, tiny_sdxl.POOLED), generator=torch.Generator().manual_seed(2))
    theirs = state @ openclip[PREFIX + "text_projection"]
    ours: Any = second.text_projection
    torch.testing.assert_close(ours(state), theirs)


def test_names_of_hosts_and_folders_are_taken_as_they_are() -> None:
    prefix = "text_encoders.clip_g.transformer."
    plain = ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.bias", "final_layer_norm.bias")
    host = [f"{prefix}text_model.{k}" for k in plain] + [f"{prefix}text_projection.weight"]
    odd = [f"{prefix}text_model.embeddings.position_ids", "text_encoders.clip_g.logit_scale", "other.weight"]
    whole = {f"text_model.{k}" for k in plain} | {"text_projection.weight"}
    assert set(named_by_hf([*host, *odd], prefix)) == whole
    folder = [*plain, "text_projection.weight"]  # as transformers 5 may write it
    assert set(named_by_hf(folder)) == whole
