"""SDXL: names, order and shapes as the reference has them, both text encoders, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.sdxl_unet import config_of
from loragraft.trainer.families.names import ldm_keys as keys
from loragraft.trainer.families.sdxl import SDXL
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import tiny_sd2, tiny_sdxl
from loragraft_tests.trainer.data_folders import Refusal, golden

FULL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
BLOCKS = {
    "time_embed_0": 0,
    "label_emb_0_2": 0,
    "input_blocks_0_0": 1,
    "input_blocks_4_1_proj_in": 5,
    "input_blocks_8_0_in_layers_2": 9,
    "middle_block_0_emb_layers_1": 10,
    "middle_block_2_out_layers_3": 12,
    "output_blocks_0_1_proj_out": 13,
    "output_blocks_5_2_conv": 18,
    "output_blocks_8_0_skip_connection": 21,
    "out_2": 22,
}
TEXTS = {"text_encoder": (768, 3072, 12, 12), "text_encoder_2": (1280, 5120, 32, 20)}


@pytest.fixture(scope="module")
def full_size() -> Parts:
    """Return SDXL's modules in full size, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    texts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL)
        for part, (width, inside, layers, heads) in TEXTS.items():
            config = CLIPTextConfig(
                hidden_size=width,
                intermediate_size=inside,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=width,
            )
            of = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            texts[part] = of(config)
    return Parts(unet, nn.Identity(), nn.ModuleDict(texts), {})


# ---- names and shapes at full size ----


def shapes_of(parts: Parts, targets: list[Any], rank: int) -> dict[str, list[list[int]]]:
    """Return the shapes of each module's down and up, by its name in a file."""
    found = {}
    for target in targets:
        out, *inside = parts.part(target.part).get_submodule(target.path).weight.shape  # type: ignore[union-attr,misc]
        found[target.key] = [[rank, *inside], [out, rank, *(1 for _ in inside[1:])]]
    return found


def test_the_lora_has_the_references_modules_in_its_order(full_size: Parts) -> None:
    """The stored list has the residual blocks' linear layers too, see the golden files' README."""
    expected = golden("lora_modules")["sdxl_lora_dim16"]
    every = SDXL().targets(full_size, convolutions=True)
    linear = shapes_of(full_size, [t for t in every if t.kind == "linear"], 16)
    assert list(linear) == list(expected)
    assert linear == expected
    of_blocks = re.compile(r"emb_layers_1|skip_connection")
    plain = SDXL().targets(full_size, convolutions=False)
    assert [t.key for t in plain] == [k for k in expected if not of_blocks.search(k)]
    assert len(plain) == 264 + 722
    assert len(every) == 264 + 788


def test_blocks_are_counted_as_in_the_reference(full_size: Parts) -> None:
    targets = SDXL().targets(full_size, convolutions=False, preset="everything")
    blocks = {t.key: t.block for t in targets}
    assert {name: blocks[f"lora_unet_{name}"] for name in BLOCKS} == BLOCKS
    assert {b for k, b in blocks.items() if k.startswith("lora_te")} == {None}
    assert SDXL().blocks is not None and len(SDXL().blocks.names) == 23  # type: ignore[union-attr]


def test_names_at_full_size_go_both_ways_and_agree_with_diffusers(full_size: Parts) -> None:
    from diffusers.loaders import single_file_utils as peer

    state: Any = full_size.denoiser.state_dict()
    there = keys.unet_to_ldm(state)
    assert len(there) == len(state) == 1680
    assert sorted(there.values()) == sorted(state)
    assert keys.unet_to_diffusers(there) == {old: new for new, old in there.items()}
    marked = {keys.UNET_PREFIX + new: torch.tensor(float(i)) for i, new in enumerate(there)}
    config: Any = full_size.denoiser.config
    theirs = peer.convert_ldm_unet_checkpoint(dict(marked), dict(config))
    ours = {old: marked[keys.UNET_PREFIX + new] for new, old in there.items()}
    assert set(theirs) == set(ours)
    assert all(theirs[k] is ours[k] for k in ours)


def test_full_size_shapes_are_read_from_the_weights(full_size: Parts) -> None:
    from diffusers import UNet2DConditionModel

    state: Any = full_size.denoiser.state_dict()
    found = config_of(state)
    assert found == {**found, **{k: v for k, v in FULL.items() if k != "sample_size"}}
    with torch.device("meta"):
        again = UNet2DConditionModel(**found).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(
    "shape",
    [
        {  # SSD-1B
            "transformer_layers_per_block": [1, [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 3], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        {"mid_block_type": None, "layers_per_block": 1},  # KOALA
    ],
    ids=["SSD-1B", "KOALA"],
)
def test_distilled_models_are_read_too(shape: dict[str, Any], tmp_path: Path, tokenizer: Path) -> None:
    modules = tiny_sdxl.random_modules(**shape)
    weights = tiny_sdxl.single_file_weights(modules)
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "x.safetensors")
    base = api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)
    parts = base.load()
    x, t, hidden = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, tiny_sdxl.CONTEXT)
    pooled, sizes = torch.randn(2, tiny_sdxl.POOLED), torch.full((2, 6), 64.0)
    found = base.family.predict(parts, x, t, (hidden, pooled), sizes)
    added = {"text_embeds": pooled, "time_ids": sizes}
    unet: Any = modules["unet"]
    assert torch.equal(found, unet(x, t, hidden, added_cond_kwargs=added).sample)
    assert base.family.targets(parts, convolutions=True)


# ---- one file and back ----


def test_a_file_is_taken_apart_shared_and_put_together(sdxl_file: Path, tokenizer: Path) -> None:
    weights = load_file(sdxl_file)
    storages = {v.untyped_storage().data_ptr() for v in weights.values()}
    base = api.open_base_from_weights(weights, name="x", tokenizers={"clip": str(tokenizer)})
    parts, modules = base.load(), tiny_sdxl.random_modules()
    loaded = {"unet": parts.denoiser, "vae": parts.vae, **parts.text_encoders}
    for name, module in loaded.items():
        own = modules[name].state_dict()
        assert set(module.state_dict()) == set(own)
        for key, value in module.state_dict().items():
            assert torch.equal(value, own[key]), (name, key)
            assert value.untyped_storage().data_ptr() in storages, (name, key)
    again = base.family.join(base.state_dicts)
    assert set(weights) - set(again) == {"conditioner.embedders.1.model.logit_scale"}
    assert all(torch.equal(again[k], weights[k]) for k in again)


def test_a_hosts_names_and_a_folders_are_the_same_base(
    sdxl: api.Base, sdxl_file: Path, tmp_path: Path, tokenizer: Path
) -> None:
    weights = load_file(sdxl_file)
    host = {k: v for k, v in weights.items() if not k.startswith("conditioner.")}
    parts = sdxl.state_dicts
    for part, kind in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        host |= {f"text_encoders.{kind}.transformer.{k}": v for k, v in parts[part].items()}
    host |= {"text_encoders.clip_l.transformer.text_projection.weight": torch.eye(64)}
    held = api.open_base_from_weights(host, name="x", tokenizers={"clip": str(tokenizer)})
    assert held.family.name == "sdxl"
    assert held.weights_hash == sdxl.weights_hash
    folder = api.open_base(tiny_sdxl.write_folder(tmp_path / "folder"), tokenizer=None)
    assert folder.family.name == "sdxl"
    assert folder.weights_hash == sdxl.weights_hash


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_exactly_one_family_knows_a_file(name: str, weights: dict[str, torch.Tensor]) -> None:
    files = {
        "sd15": lambda: weights,
        "sd2": lambda: tiny_sd2.single_file_weights(tiny_sd2.random_modules()),
        "sdxl": lambda: tiny_sdxl.single_file_weights(tiny_sdxl.random_modules()),
    }
    assert [family.name for family in FAMILIES.values() if family.detect(files[name]())] == [name]


def with_first_channels(channels: int) -> dict[str, torch.Tensor]:
    return {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}


CONTEXT_KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
LABEL_KEY = "model.diffusion_model.label_emb.0.0.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (with_first_channels(9), "inpainting"),
        (with_first_channels(8), "InstructPix2Pix"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "Playground"),
        ({"edm_vpred.sigma_max": torch.tensor(80.0)}, "CosXL"),
        ({CONTEXT_KEY: torch.zeros(64, 1280), LABEL_KEY: torch.zeros(128, 2560)}, "refiner"),
        ({CONTEXT_KEY: torch.zeros(64, 1024), LABEL_KEY: torch.zeros(128, 2048)}, "unCLIP"),
        ({"model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": torch.zeros(32)}, "Video"),
    ],
)
def test_relatives_are_refused_by_name(
    changes: dict[str, torch.Tensor], named: str, sdxl_file: Path, tmp_path: Path, tokenizer: Path
) -> None:
    save_file(load_file(sdxl_file) | changes, tmp_path / "x.safetensors")
    with Refusal("LG-BASE-004", named, "SDXL"):
        api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("marks", "velocity", "terminal"),
    [((), None, None), (("v_pred",), True, None), (("v_pred", "ztsnr"), True, True)],
)
def test_a_file_tells_what_it_predicts(
    marks: tuple[str, ...], velocity: Any, terminal: Any, tmp_path: Path, tokenizer: Path
) -> None:
    path = tiny_sdxl.write_checkpoint(tmp_path / "x.safetensors", **{m: torch.zeros(0) for m in marks})
    base = api.open_base(path, tokenizer=tokenizer)
    assert (base.velocity, base.zero_terminal) == (velocity, terminal)


# ---- text ----


@pytest.mark.parametrize("caption", ["zibu, blue", "", "abcdefgh" * 20])
def test_text_is_encoded_as_diffusers_pipeline_encodes_it(
    caption: str, sdxl: api.Base, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = tiny_sdxl.write_folder(tmp_path_factory.mktemp("pipeline"))
    modules = {k: v.cpu() for k, v in tiny_sdxl.random_modules().items()}
    tokenizers = {name: api_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")}
    tokenizers["tokenizer_2"].pad_token_id = 0
    pipe = StableDiffusionXLPipeline(**modules, **tokenizers, scheduler=None)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        parts, reading = sdxl.load(), Reading()
        found = sdxl.family.encode_text(parts, sdxl.family.tokenize(parts, [caption], reading), reading)
    torch.testing.assert_close(found[0], hidden)
    torch.testing.assert_close(found[1], pooled)


def api_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def test_long_captions_are_cut_and_padded_for_each_encoder(sdxl: api.Base) -> None:
    """As the reference does it: OpenCLIP's chunks end in an end token only where words fill them."""
    parts = sdxl.load()
    letters = "abcdefghij" * 8
    first, second = sdxl.family.tokenize(parts, [letters, ""], Reading(max_token_length=150))
    start, end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    one = {c: parts.tokenizer.convert_tokens_to_ids(c) for c in "abcdefghij"}
    body = [one[c] for c in letters[:-1]] + [parts.tokenizer.convert_tokens_to_ids("j</w>")]
    assert first[0].tolist() == [[start, *body[:75], end], [start, *body[75:], *[end] * 71]]
    assert second[0].tolist() == [[start, *body[:75], end], [start, *body[75:], end, *[0] * 70]]
    assert second[1].tolist() == [[start, end, *[0] * 75]] * 2
    assert first[1].tolist() == [[start, *[end] * 76]] * 2


def test_the_conditioning_of_chunks_is_joined_and_pooled_from_the_first(sdxl: api.Base) -> None:
    parts = sdxl.load()
    reading = Reading(max_token_length=150)
    tokens = sdxl.family.tokenize(parts, ["zibu " * 30, "x"], reading)
    hidden, pooled = sdxl.family.encode_text(parts, tokens, reading)
    assert [hidden.shape[1:], pooled.shape[1:]] == sdxl.family.cond_shapes(parts, reading)
    one_by_one = [
        sdxl.family.encode_text(parts, tuple(ids[:, c : c + 1] for ids in tokens), Reading())
        for c in range(2)
    ]
    (first, own), (last, _) = one_by_one
    inside = torch.cat([first[:, :1], first[:, 1:-1], last[:, 1:-1], last[:, -1:]], dim=1)
    torch.testing.assert_close(hidden, inside, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, own, rtol=1e-5, atol=1e-5)


def test_emphasis_reaches_both_encoders_and_leaves_the_pooled_state(sdxl: api.Base) -> None:
    parts, reading = sdxl.load(), Reading(weighted=True)
    tokens = sdxl.family.tokenize(parts, ["a (b:1.5)"], reading)
    assert [x.shape for x in tokens] == [(1, 1, 77), (1, 77)] * 2
    hidden, pooled = sdxl.family.encode_text(parts, tokens, reading)
    plain, same = sdxl.family.encode_text(parts, (tokens[0], tokens[2]), Reading())
    ratio = hidden / plain
    torch.testing.assert_close(pooled, same)
    weights = tokens[1]
    assert weights[0, :4].tolist() == [1, 1, 1.5, 1]
    torch.testing.assert_close(ratio, weights[..., None].expand_as(ratio), rtol=1e-4, atol=1e-4)
