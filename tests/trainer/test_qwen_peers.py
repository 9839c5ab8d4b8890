"""Qwen-Image and Z-Image beside ComfyUI's and diffusers' own, on the same tensors; LoRA files; runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.z_image_model import ZImageTransformer
from loragraft.trainer.families.qwen_image import CHAT as QWEN_CHAT
from loragraft.trainer.families.qwen_image import QwenImage
from loragraft.trainer.families.text.qwen_text import chat_tokens, qwen_config
from loragraft.trainer.families.text.tokenizers import KINDS, load_tokenizer
from loragraft.trainer.families.z_image import CHAT as Z_CHAT
from loragraft.trainer.families.z_image import ZImage
from loragraft.trainer.parts import Parts
from loragraft_tests.comfyui.harness import python
from loragraft_tests.trainer import comfy_peer, dit_checks, networks
from loragraft_tests.trainer import tiny_qwen as tiny

QWEN_IMAGE = "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel"
QWEN_IMAGE_SHAPE = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": tiny.CONTEXT,
    "axes_dims_rope": (4, 14, 14),
}
Z_IMAGE = "comfy.ldm.lumina.model.NextDiT"
# ComfyUI embeds times in 256 channels, so that the model is as wide.
Z_IMAGE_SHAPE = {
    "in_channels": 16,
    "dim": 256,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 8,
    "multiple_of": 1,
    "ffn_dim_multiplier": 1.0,
    "qk_norm": True,
    "cap_feat_dim": 48,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
CAPTIONS = ["a cat", "", "(red:1.2) [hat], {braces}", " leading space, 日本"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def qwen_base(tokenizer: str) -> api.Base:
    weights = tiny.qwen_image_file(tiny.qwen_image_modules())
    return api.open_base_from_weights(weights, name="x", tokenizers={"qwen": tokenizer})


@pytest.fixture(scope="module")
def z_base(tokenizer: str) -> api.Base:
    weights = tiny.z_image_file(tiny.z_image_modules())
    return api.open_base_from_weights(weights, name="x", tokenizers={"qwen": tokenizer})


@pytest.fixture
def wide_z() -> Parts:
    """Return a Z-Image that is wide enough for ComfyUI."""
    torch.manual_seed(2)
    shape = {"channels": 64, "context": 48, "time": 256, "time_inside": 256}
    depth = {"layers": 2, "noise_refiners": 1, "context_refiners": 1}
    denoiser = tiny.shaken(ZImageTransformer(width=256, heads=8, inside=256, **shape, **depth))
    return Parts(denoiser, nn.Module(), nn.ModuleDict(), {})


def given(context: int, length: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    # Of an odd number of rows the middle one is at 0 for ComfyUI, the next one for diffusers and Qwen-Image.
    x = torch.randn(2, 16, 8, 12, generator=drawn)
    return {
        "x": x,
        "video": x[:, :, None].clone(),
        "time": torch.tensor([0.4333, 0.0127]),
        "text": torch.randn(2, length, context, generator=drawn),
    }


# ---- ComfyUI ----


@pytest.mark.comfy
def test_comfyui_computes_the_same_with_qwen_image_and_reads_its_lora(
    qwen_base: api.Base, tmp_path: Path
) -> None:
    parts, tensors = qwen_base.load(), given(tiny.CONTEXT, 9)
    mask = torch.ones(2, 9)
    with torch.no_grad():
        ours = QwenImage().predict(parts, tensors["x"], 1000 * tensors["time"], (tensors["text"], mask))
    call = {"x": "video", "timestep": "time", "context": "text"}
    weights = dict(parts.denoiser.state_dict())
    answer = comfy_peer.ask(tmp_path, QWEN_IMAGE, QWEN_IMAGE_SHAPE, weights, tensors, [call])
    torch.testing.assert_close(ours, answer.outputs[0][:, :, 0], atol=5e-6, rtol=1e-5)
    dit_checks.check_comfyui_reads_the_lora(qwen_base, tmp_path / "lora", QWEN_IMAGE, QWEN_IMAGE_SHAPE)


@pytest.mark.comfy
@pytest.mark.parametrize("length", [9, 32, 40])
def test_comfyui_computes_the_same_with_z_image_and_reads_its_lora(
    wide_z: Parts, tmp_path: Path, length: int
) -> None:
    tensors = given(48, length)
    padded = torch.nn.functional.pad(tensors["text"], (0, 0, 0, 64 - length))
    mask = (torch.arange(64) < length).expand(2, -1)
    family = ZImage()
    with torch.no_grad():
        ours = family.predict(wide_z, tensors["x"], 1000 * tensors["time"], (padded, mask))
    call = {"x": "x", "timesteps": "time", "context": "text", "num_tokens": length}
    weights = dict(wide_z.denoiser.state_dict())
    answer = comfy_peer.ask(tmp_path, Z_IMAGE, Z_IMAGE_SHAPE, weights, tensors, [call])
    # ComfyUI's norms of queries and keys add another epsilon, 1.2e-7 for 1e-5
    torch.testing.assert_close(ours, answer.outputs[0], atol=2e-5, rtol=1e-4)


@pytest.mark.comfy
def test_comfyui_knows_every_key_of_z_images_lora(wide_z: Parts, tmp_path: Path) -> None:
    class Base:
        family = ZImage()

        def load(self) -> Parts:
            return wide_z

    dit_checks.check_comfyui_reads_the_lora(Base(), tmp_path, Z_IMAGE, Z_IMAGE_SHAPE)  # type: ignore[arg-type]


@pytest.mark.comfy
def test_comfyui_reads_captions_and_pictures_as_we_do(
    qwen_base: api.Base, z_base: api.Base, comfyui: Path, tmp_path: Path
) -> None:
    parts, z_parts = qwen_base.load(), z_base.load()
    drawn = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 250, (1, 21), generator=drawn)
    pixels = torch.rand(1, 3, 32, 48, generator=drawn) * 2 - 1
    latents = torch.randn(1, 16, 4, 6, generator=drawn)
    texts = {"qwen2": parts.text_encoder, "qwen3": z_parts.text_encoder}
    weights = {f"{k}.{name}": v for k, m in texts.items() for name, v in m.state_dict().items()}
    file = tiny.qwen_image_file(tiny.qwen_image_modules())
    weights |= {k: v for k, v in file.items() if k.startswith("vae.")}
    weights |= {"ids": ids, "pixels": pixels, "latents": latents}
    known = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    known += ("num_attention_heads", "num_key_value_heads")
    shapes = {k: qwen_config(m.state_dict()) for k, m in texts.items()}
    vae = {"dim": 8, "z_dim": 16, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    job = {k: {name: shape[name] for name in known} for k, shape in shapes.items()}
    (tmp_path / "job.json").write_text(
        json.dumps({**job, "captions": CAPTIONS, "vae": vae}), encoding="utf-8"
    )
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "weights.safetensors")
    child = Path(__file__).with_name("comfy_qwen_child.py")
    done = subprocess.run(
        [python(), str(child), str(comfyui), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]

    tokens = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    real = load_tokenizer(str(comfyui / KINDS["qwen"].in_comfyui), "qwen")
    for name, chat in (("qwen_image", QWEN_CHAT), ("z_image", Z_CHAT)):
        ours, mask = chat_tokens(real, CAPTIONS, Reading(t5_length=64), chat)
        hidden = chat.hides(real)
        for row, seen, theirs in zip(ours, mask, tokens[name], strict=True):
            assert row[: hidden + int(seen.sum())].tolist() == theirs

    found = load_file(tmp_path / "results.safetensors")
    seen = torch.ones(1, 21)
    with torch.no_grad():
        last = QwenImage().encode_text(parts, (ids, seen), Reading(t5_length=21))[0]
        before = ZImage().encode_text(z_parts, (ids, seen), Reading(t5_length=21))[0]
        moments = QwenImage().encode_images(parts, pixels)
        encoded = QwenImage().latents(moments, torch.zeros_like(moments["mean"]))
        decoded = QwenImage().decode(parts, latents)
    torch.testing.assert_close(last, found["qwen2"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(before, found["qwen3"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(encoded, found["encoded"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, found["decoded"].clamp(-1, 1), atol=1e-5, rtol=1e-5)


# ---- diffusers ----


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_diffusers_reads_the_lora_with_the_same_effect(
    qwen_base: api.Base, z_base: api.Base, name: str, tmp_path: Path
) -> None:
    import diffusers

    base = {"qwen_image": qwen_base, "z_image": z_base}[name]
    pipeline: Any = getattr(diffusers, {"qwen_image": "QwenImagePipeline", "z_image": "ZImagePipeline"}[name])
    theirs: Any = {"qwen_image": tiny.random_qwen_image, "z_image": tiny.random_z_image}[name]()
    parts = base.load()
    x, t = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(4)), torch.tensor([600.0])
    cond, mask = dit_checks.conditioning(base, parts, ["zibu"], Reading(t5_length=64))

    @torch.no_grad()
    def of_diffusers() -> torch.Tensor:
        length = int(mask.sum())
        if name == "z_image":
            out = theirs([x[0][:, None]], (1000 - t) / 1000, [cond[0, :length]], return_dict=False)[0]
            return -out[0][None, :, 0]
        packed = pipeline._pack_latents(x, 1, 16, 8, 6)
        out = theirs(
            packed,
            timestep=t / 1000,
            encoder_hidden_states=cond[:, :length],
            img_shapes=[[(1, 4, 3)]],
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(out, 64, 48, 8)[:, :, 0]

    plain = of_diffusers()
    adapter = dit_checks.with_lora(base, parts)
    save_file({k: v.contiguous() for k, v in adapter.saved().items()}, tmp_path / "lora.safetensors")
    converted = pipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    converted = converted[0] if isinstance(converted, tuple) else converted
    pipeline.load_lora_into_transformer(converted, transformer=theirs, adapter_name="tiny")
    with torch.no_grad():
        ours = base.family.predict(parts, x, t, (cond, mask))
    found = of_diffusers()
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-4)


# ---- runs ----


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_gradients_reach_the_adapters_alone(qwen_base: api.Base, z_base: api.Base, name: str) -> None:
    dit_checks.check_gradients({"qwen_image": qwen_base, "z_image": z_base}[name], (16, 8, 6))


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_shapes_are_as_announced(qwen_base: api.Base, z_base: api.Base, name: str) -> None:
    dit_checks.check_shapes({"qwen_image": qwen_base, "z_image": z_base}[name])


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_images_are_drawn(qwen_base: api.Base, z_base: api.Base, name: str) -> None:
    dit_checks.check_sampling({"qwen_image": qwen_base, "z_image": z_base}[name])


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_a_run_resumes_to_the_same_bytes(
    qwen_base: api.Base, z_base: api.Base, name: str, tmp_path: Path
) -> None:
    dit_checks.check_training({"qwen_image": qwen_base, "z_image": z_base}[name], tmp_path)


@pytest.mark.comfy
def test_comfyui_changes_root_mean_square_norms_as_we_do(wide_z: Parts, tmp_path: Path) -> None:
    """With train_norm: each norm's own effect, and its weight as ComfyUI changes it."""
    weights = {k: v.clone() for k, v in wide_z.denoiser.state_dict().items()}
    targets = [t for t in ZImage().targets(wide_z, convolutions=False, norms=True) if t.kind == "norm"]
    adapter = network.inject(wide_z, network.Settings(4, 2.0, None, 1.0, 0, norms=True), targets)
    networks.moved(adapter)
    save_file({k: v.contiguous() for k, v in adapter.saved().items()}, tmp_path / "lora.safetensors")
    answer = comfy_peer.ask(
        tmp_path / "peer",
        Z_IMAGE,
        Z_IMAGE_SHAPE,
        weights,
        {"x": torch.zeros(1)},
        [],
        tmp_path / "lora.safetensors",
    )
    assert answer.unmatched == [] and len(answer.weights) == len(targets) == 12
    for m in adapter.modules:
        changed = answer.weights[f"{m.target.path}.weight"]
        x = torch.randn(3, changed.shape[0], generator=torch.Generator().manual_seed(1))
        expected = torch.nn.functional.rms_norm(x, changed.shape, changed, 1e-5)
        torch.testing.assert_close(m.module(x), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(m.module(x), m.module.base(x))
    network.remove(wide_z, adapter)


# ---- files and folders ----


def pieces(name: str) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """Return a tiny base as one file's tensors and as diffusers' modules."""
    if name == "qwen_image":
        modules = tiny.qwen_image_modules()
        return tiny.qwen_image_file(modules), modules
    modules = tiny.z_image_modules()
    return tiny.z_image_file(modules), modules


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_three_files_make_the_base_that_one_makes(
    qwen_base: api.Base, z_base: api.Base, name: str, tokenizer: str, tmp_path: Path
) -> None:
    weights, _ = pieces(name)
    beginnings = {"transformer": "model.diffusion_model.", "vae": "vae.", "text": "text_encoders."}
    for file, prefix in beginnings.items():
        inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if file == "text":
            inside = {k.partition(".transformer.")[2]: v for k, v in inside.items()}
        save_file({k: v.contiguous() for k, v in inside.items()}, tmp_path / f"{file}.safetensors")
    base = api.open_base(
        tmp_path / "transformer.safetensors",
        vae=tmp_path / "vae.safetensors",
        text_encoders=[tmp_path / "text.safetensors"],
        tokenizer=tokenizer,
    )
    assert base.family.name == name
    assert base.weights_hash == {"qwen_image": qwen_base, "z_image": z_base}[name].weights_hash


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_a_diffusers_folder_makes_the_same_base(
    qwen_base: api.Base, z_base: api.Base, name: str, tmp_path: Path
) -> None:
    classes = {
        "qwen_image": ("QwenImagePipeline", "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"),
        "z_image": ("ZImagePipeline", "ZImageTransformer2DModel", "AutoencoderKL"),
    }[name]
    index: dict[str, Any] = {"_class_name": classes[0], "transformer": ["diffusers", classes[1]]}
    index |= {"vae": ["diffusers", classes[2]], "text_encoder": ["transformers", "Qwen"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for part, module in pieces(name)[1].items():
        (tmp_path / part).mkdir()
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(dict(module.state_dict()), tmp_path / part / f"{file}.safetensors")
    tiny.write_qwen_tokenizer(tmp_path / "tokenizer")
    base = api.open_base(tmp_path)
    assert base.family.name == name
    assert base.weights_hash == {"qwen_image": qwen_base, "z_image": z_base}[name].weights_hash
    base.load()
