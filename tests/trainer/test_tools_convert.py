"""Names of LoRA modules in three worlds, and checkpoints as folders and single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.tools import deltas, lora_file
from loragraft.trainer.tools.architecture import architecture_of
from loragraft.trainer.tools.convert import convert_naming, naming_of, to_common
from loragraft.trainer.tools.unflatten import WORDS, flatten, unflatten
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import change, error, tiny_lora

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SETS: dict[str, dict[str, list[list[int]]]] = json.loads((GOLDEN / "lora_modules.json").read_text("utf-8"))
SETS |= json.loads((GOLDEN / "lora_modules_chroma_lumina.json").read_text("utf-8"))
SETS |= {
    name: {
        key.removesuffix(".lora_down.weight"): [shape, keys["keys"][key.replace("lora_down", "lora_up")]]
        for key, shape in keys["keys"].items()
        if key.endswith(".lora_down.weight")
    }
    for name, keys in json.loads((GOLDEN / "lora_keys.json").read_text("utf-8")).items()
    if isinstance(keys, dict)
}
ARCHITECTURES = {"sd15": "sd", "sd21": "sd2", "sdxl": "sdxl", "flux": "flux"}
ARCHITECTURES |= {"chro": "flux", "lumi": "lumina2"}  # Chroma's blocks have the names of Flux.1's


def empty_lora(name: str) -> lora_file.LoraFile:
    """Return a LoRA of these modules without values: tensors that cost no memory."""
    one = torch.zeros(1, dtype=torch.float16)
    tensors: dict[str, torch.Tensor] = {}
    for module, (down, up) in SETS[name].items():
        tensors[f"{module}.lora_down.weight"] = one.expand(down)
        tensors[f"{module}.lora_up.weight"] = one.expand(up)
        tensors[f"{module}.alpha"] = torch.tensor(float(down[0]))
    return lora_file.parse(tensors)


def modules_of(name: str) -> dict[str, tuple[int, ...]]:
    """Return the denoiser's modules in diffusers with their weights' shapes."""
    from diffusers import (
        ChromaTransformer2DModel,
        FluxTransformer2DModel,
        Lumina2Transformer2DModel,
        UNet2DConditionModel,
    )

    sdxl: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        model: torch.nn.Module = {
            "sd15": lambda: UNet2DConditionModel(cross_attention_dim=768),
            "sd21": lambda: UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True),
            "sdxl": lambda: UNet2DConditionModel(**sdxl),
            "flux": FluxTransformer2DModel,
            "chro": ChromaTransformer2DModel,
            "lumi": Lumina2Transformer2DModel,
        }[name]()
    named = dict(model.named_modules())
    return {
        n: tuple(m.weight.shape)
        for n, m in named.items()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    }


@pytest.mark.parametrize("name", SETS)
def test_every_module_has_its_name_in_diffusers_and_comes_back(name: str) -> None:
    file = empty_lora(name)
    assert architecture_of(file.modules) == ARCHITECTURES[name[:4]]
    theirs = convert_naming(file, "diffusers")
    real = modules_of(name[:4])
    for module in theirs.modules.values():
        part, _, path = module.name.partition(".")
        if part in ("unet", "transformer"):
            assert module.shape() == real[path], path
        else:
            assert path.startswith(("text_model.encoder.layers.", "encoder.block.")), module.name
    back = convert_naming(theirs, "kohya")
    assert {n: m.shape() for n, m in back.modules.items()} == {n: m.shape() for n, m in file.modules.items()}


@pytest.mark.parametrize("name", SETS)
def test_comfyuis_names_come_back_with_the_same_tensors(name: str) -> None:
    file = empty_lora(name)
    theirs = convert_naming(file, "comfyui")
    assert naming_of(theirs) == "comfyui" and naming_of(file) == "kohya"
    assert not any("_blocks_" in n for n in theirs.modules), "no underscore was taken for a dot"
    back = convert_naming(theirs, "kohya").tensors()
    assert set(back) == set(file.tensors())
    for key, tensor in file.tensors().items():
        assert back[key].data_ptr() == tensor.data_ptr(), "nothing was computed"


def test_some_names() -> None:
    cases = {
        "sd15": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
                 "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"),
        "sdxl": ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
                 "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj"),
        "flux": ("lora_unet_single_blocks_37_linear2", "diffusion_model.single_blocks.37.linear2"),
        "sd21": ("lora_te_text_model_encoder_layers_22_mlp_fc1",
                 "text_encoders.clip_h.transformer.text_model.encoder.layers.22.mlp.fc1"),
    }  # fmt: skip
    for name, (flat, dotted) in cases.items():
        full = next(key for key in SETS if key.startswith(name))
        assert dotted in convert_naming(empty_lora(full), "comfyui").modules
        assert flat in SETS[full]


@given(
    st.lists(st.sampled_from([*WORDS, "attn1", "0", "12", "ff", "net", "layers", "mlp", "fc1"]), min_size=1)
)
def test_flattening_undoes_unflattening(parts: list[str]) -> None:
    flat = flatten(".".join(parts))
    assert flatten(unflatten(flat)) == flat


def test_fluxs_joined_modules_keep_their_change() -> None:
    rng = torch.Generator().manual_seed(2)
    name = "lora_unet_single_blocks_3_linear1"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8, generator=rng),
        f"{name}.lora_up.weight": torch.randn(8 * 3 + 32, 4, generator=rng),
        f"{name}.alpha": torch.tensor(2.0),
    }
    file = lora_file.parse(tensors)
    split = convert_naming(file, "diffusers")
    assert [m.shape()[0] for m in split.modules.values()] == [8, 8, 8, 32]
    (back,) = convert_naming(split, "kohya").modules.values()
    assert back.rank == 4
    torch.testing.assert_close(change(back), change(file.modules[name]), rtol=0, atol=0)
    own = {k: v + (0.1 if ".to_k.lora_A" in k else 0) for k, v in split.tensors().items()}
    several = lora_file.parse(own)
    (back,) = convert_naming(several, "kohya").modules.values()
    assert back.rank == 16
    wanted = torch.cat([change(m) for m in several.modules.values()])
    torch.testing.assert_close(change(back), wanted, rtol=1e-6, atol=1e-6)
    (back,) = convert_naming(
        lora_file.parse({k: v for k, v in own.items() if "to_q" not in k}), "kohya"
    ).modules.values()
    torch.testing.assert_close(change(back)[8:], wanted[8:], rtol=1e-6, atol=1e-6)
    assert not change(back)[:8].any(), "what is not in the file changes nothing"


def module(name: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return a LoRA's tensors of a module with kohya's endings."""
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    return {
        f"{name}.lora_down.weight": torch.randn(down, generator=rng),
        f"{name}.lora_up.weight": torch.randn(up, generator=rng),
    }


Q, K, V = (f"diffusion_model.layers.0.attention.to_{letter}" for letter in "qkv")


def test_names_that_others_give_are_read() -> None:
    """diffusers' paths below diffusion_model., PEFT's prefix, and no prefix at all."""
    z_image = lora_file.parse({k: v for n in (Q, K, V) for k, v in module(n, (2, 8), (8, 2)).items()})
    assert architecture_of(z_image.modules) == "z_image"
    (joined,) = to_common(z_image).modules.values()
    assert joined.name == "lora_unet_layers_0_attention_qkv" and joined.shape() == (24, 8)
    torch.testing.assert_close(change(joined), torch.cat([change(m) for m in z_image.modules.values()]))
    sd3 = module("base_model.model.transformer_blocks.20.attn.to_out.0", (2, 8), (8, 2))
    assert list(to_common(lora_file.parse(sd3)).modules) == ["lora_unet_joint_blocks_20_x_block_attn_proj"]
    qwen = module("transformer_blocks.0.img_mlp.net.2", (2, 8), (8, 2))
    (name,) = to_common(lora_file.parse(qwen)).modules
    assert name == "lora_unet_transformer_blocks_0_img_mlp_net_2"


@pytest.mark.parametrize(
    ("modules", "wanted"),
    [
        ({"lora_unet_double_blocks_0_img_mlp_0": ((2, 8), (32, 2))}, "flux"),
        ({"lora_unet_double_blocks_0_img_mlp_0": ((2, 8), (48, 2))}, "flux2"),
        ({"lora_unet_double_blocks_0_img_mlp_2": ((2, 24), (8, 2))}, "flux2"),
        ({"lora_unet_single_blocks_0_linear1": ((2, 8), (72, 2))}, "flux2"),
        ({"lora_unet_single_blocks_0_linear2": ((2, 40), (8, 2))}, "flux"),
        ({"lora_unet_single_blocks_0_linear2": ((2, 32), (8, 2))}, "flux2"),
        ({"diffusion_model.double_stream_modulation_img.lin": ((2, 8), (48, 2))}, "flux2"),
        ({"transformer.single_transformer_blocks.3.attn.to_out": ((2, 32), (8, 2))}, "flux2"),
        ({"lora_unet_distilled_guidance_layer_in_proj": ((2, 8), (8, 2))}, "chroma"),
        ({"lora_unet_layers_0_attention_qkv": ((2, 9), (15, 2))}, "lumina2"),
        ({"lora_unet_layers_0_attention_qkv": ((2, 9), (27, 2))}, "z_image"),
        ({"transformer.layers.0.feed_forward.linear_1": ((2, 9), (27, 2))}, "lumina2"),
        ({"transformer.transformer_blocks.59.attn.to_q": ((2, 9), (9, 2))}, "qwen_image"),
        ({"transformer.transformer_blocks.30.attn.to_q": ((2, 9), (9, 2))}, "sd3"),
        (
            {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": ((2, 1024), (8, 2))},
            "sd2",
        ),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": ((2, 768), (8, 2))}, "sd"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": ((2, 8), (8, 2))}, "flux"),
        ({"diffusion_model.blocks.0.self_attn.q": ((2, 8), (8, 2))}, "other"),
    ],
)
def test_an_architecture_is_told_by_names_and_shapes(
    modules: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], wanted: str
) -> None:
    tensors = {k: v for name, shapes in modules.items() for k, v in module(name, *shapes).items()}
    assert architecture_of(lora_file.parse(tensors).modules) == wanted


def test_metadata_tell_what_names_do_not() -> None:
    attention = lora_file.parse(module("lora_unet_double_blocks_0_img_attn_proj", (2, 8), (8, 2)))
    for version, wanted in (("", "flux"), ("chroma", "chroma"), ("flux2", "flux2"), ("sd_v1", "flux")):
        assert architecture_of(attention.modules, {"ss_base_model_version": version}) == wanted


def test_parts_that_cannot_be_joined() -> None:
    lumina2 = "transformer.layers.0.attn.to_q"
    with Refusal("LG-TOOL-006", "without"):
        to_common(lora_file.parse(module(lumina2, (2, 9), (9, 2))))
    lokr = {f"{n}.lokr_w{i}": torch.ones(2, 2) for n in (Q, K, V) for i in (1, 2)}
    with Refusal("LG-TOOL-003", "LoKr"):
        to_common(lora_file.parse(lokr))
    twice = {**module("lora_unet_layers_0_attention_qkv", (2, 8), (24, 2)), **module(Q, (2, 8), (8, 2))}
    with Refusal("LG-TOOL-007", "two names"):
        to_common(lora_file.parse(twice))


def test_a_model_that_only_its_host_knows() -> None:
    file = lora_file.parse(module("diffusion_model.blocks.0.self_attn.q", (2, 8), (8, 2)))
    assert list(to_common(file).modules) == ["lora_unet_blocks_0_self_attn_q"]
    assert convert_naming(file, "comfyui") is file
    assert list(convert_naming(file, "kohya").modules) == ["lora_unet_blocks_0_self_attn_q"]
    with Refusal("LG-TOOL-006", "blocks_0"):
        convert_naming(file, "diffusers")


def test_names_that_have_no_place() -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 2),
        "lora_unet_a.lora_up.weight": torch.ones(2, 1),
    }
    with Refusal("LG-TOOL-006", "lora_unet_a"):
        convert_naming(lora_file.parse(tensors), "comfyui")
    with Refusal("LG-TOOL-005", "naming"):
        convert_naming(lora_file.parse(tensors), "webui")
    loha = {
        f"lora_unet_mid_block_attentions_0_proj_in.hada_w{i}_{c}": torch.ones(2, 2)
        for i in (1, 2)
        for c in "ab"
    }
    with Refusal("LG-TOOL-003", "LoHa"):
        convert_naming(lora_file.parse(loha), "diffusers")
    assert (
        "diffusion_model.middle_block.1.proj_in.hada_w1_a"
        in convert_naming(lora_file.parse(loha), "comfyui").tensors()
    )
    flat, dotted = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    twice = {f"{n}.lora_{e}.weight": torch.ones(2, 2) for n in (flat, dotted) for e in ("down", "up")}
    with Refusal("LG-TOOL-007", "two names"):
        to_common(lora_file.parse(twice))


def test_old_diffusers_names_are_read() -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    tensors = {f"{name}.down.weight": torch.ones(1, 2), f"{name}.up.weight": torch.ones(2, 1)}
    (module,) = to_common(lora_file.parse(tensors)).modules
    assert module == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize("precision", ["fp32", "same"])
def test_diffusers_loads_what_is_converted(base: api.Base, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    source = tiny_lora(base, tmp_path)
    target = tmp_path / "peft.safetensors"
    api.convert_lora(source, api.Output(target, precision), "diffusers")
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in load_file(target))
    unet, vae, text = tiny.random_modules()
    pipe = StableDiffusionPipeline(
        vae, text, base.load().tokenizer, unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path), weight_name=target.name, adapter_name="x")
    found = {f"lora_unet_{flatten(n)}": m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    for n, m in text.named_modules():
        if isinstance(m, BaseTunerLayer):
            found[f"lora_te_{flatten(n if n.startswith('text_model.') else f'text_model.{n}')}"] = m
    ours = lora_file.read_lora(source).modules
    assert set(found) == set(ours)
    for name, layer in found.items():
        assert error(layer.get_delta_weight("x").flatten(1), change(ours[name])) < 1e-5, name


def test_a_file_converted_and_back_makes_the_same_change(base: api.Base, tmp_path: Path) -> None:
    source = tiny_lora(base, tmp_path)
    path = source
    for naming in ("diffusers", "comfyui", "kohya"):
        following = tmp_path / f"{naming}.safetensors"
        api.convert_lora(path, api.Output(following), naming)
        path = following
    first, last = lora_file.read_lora(source), lora_file.read_lora(path)
    assert set(first.modules) == set(last.modules)
    for name, module in first.modules.items():
        assert error(deltas.delta(last.modules[name]), deltas.delta(module)) < 1e-6
        assert torch.equal(module.tensors["down"], last.modules[name].tensors["down"])


# ---- checkpoints ----


def equal(a: Path, b: Path) -> None:
    x, y = load_file(a), load_file(b)
    assert set(x) == set(y)
    assert all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def test_a_checkpoint_becomes_a_folder_and_comes_back(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    folder, back = tmp_path / "model", tmp_path / "back.safetensors"
    assert api.convert_checkpoint(checkpoint, folder, tokenizer=tokenizer) == []
    api.convert_checkpoint(folder, back)
    equal(checkpoint, back)
    again = tmp_path / "again"
    api.convert_checkpoint(back, again, tokenizer=tokenizer)
    for file in folder.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()
    with Refusal("LG-TOOL-004", "model"):
        api.convert_checkpoint(checkpoint, folder, tokenizer=tokenizer)
    with Refusal("LG-TOOL-005", ".safetensors"):
        api.convert_checkpoint(folder, tmp_path / "x.ckpt")


def test_diffusers_opens_the_folder(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "model"
    api.convert_checkpoint(checkpoint, folder, tokenizer=tokenizer)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    ours = api.open_base(folder).load()
    for mine, theirs in ((ours.denoiser, pipe.unet), (ours.vae, pipe.vae)):
        wanted = theirs.state_dict()
        assert all(torch.equal(wanted[k], v.to(wanted[k].dtype)) for k, v in mine.state_dict().items())
    image = pipe("zibu", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_another_vae_and_what_a_folder_has_no_place_for(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    other = tiny.write_checkpoint(tmp_path / "other.safetensors", seed=5)
    weights = load_file(checkpoint) | {"betas": torch.ones(3)}
    file = tmp_path / "more.safetensors"
    save_file(weights, file)
    lines = api.convert_checkpoint(file, tmp_path / "f", tokenizer=tokenizer, vae=other)
    assert lines == ["Not in the folder: betas"]
    api.convert_checkpoint(tmp_path / "f", tmp_path / "x.safetensors")
    found, wanted = load_file(tmp_path / "x.safetensors"), load_file(other)
    vae = [k for k in wanted if k.startswith("first_stage_model.")]
    assert vae and all(torch.equal(found[k], wanted[k]) for k in vae)
    assert torch.equal(
        found["model.diffusion_model.out.2.weight"], weights["model.diffusion_model.out.2.weight"]
    )
    api.convert_checkpoint(tmp_path / "f", tmp_path / "y.safetensors", vae=checkpoint)
    equal(tmp_path / "y.safetensors", checkpoint)
    with Refusal("LG-BASE-002", "more.safetensors"):
        save_file({"x": torch.ones(1)}, file)
        api.convert_checkpoint(tmp_path / "f", tmp_path / "z.safetensors", vae=file)
