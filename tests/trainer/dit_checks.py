"""What every family that draws with a transformer has to hold; its tests call these on a tiny base of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.network import Adapter
from loragraft.trainer.families import FAMILIES, drawing
from loragraft.trainer.families.base import Reading, Texts
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import comfy_peer, runs, tiny
from loragraft_tests.trainer.data_folders import golden

PREFIX = "model.diffusion_model."


def below(weights: Mapping[str, torch.Tensor], prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """Return the tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def check_near(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5) -> None:
    """Hold that two results differ by rounding alone: by ``limit`` of their size."""
    assert theirs.std() > 0.1
    assert (ours - theirs).norm() / theirs.norm() < limit


def with_lora(base: api.Base, parts: Parts, rank: int = 4) -> Adapter:
    """Put a LoRA whose up tensors are not zero on everything that the family trains."""
    targets = base.family.targets(parts, convolutions=False)
    adapter = network.inject(parts, network.Settings(rank, 2.0, None, 1.0, seed=0), targets)
    rng = torch.Generator().manual_seed(3)
    for p in adapter.parameters("denoiser"):
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    return adapter


def conditioning(
    base: api.Base, parts: Parts, captions: Sequence[str], reading: Reading | None = None
) -> Texts:
    """Return captions as the denoiser sees them."""
    reading = reading or Reading()
    with torch.no_grad():
        tokens = base.family.tokenize(parts, captions, reading)
        return base.family.encode_text(parts, tokens, reading)


def check_gradients(base: api.Base, latent: tuple[int, ...]) -> None:
    """Hold that a LoRA's tensors all get a finite gradient that is not zero, and nothing else gets one."""
    parts = base.load()
    adapter = with_lora(base, parts)
    noisy, t = torch.randn(2, *latent), torch.tensor([250.0, 700.0])
    cond = conditioning(base, parts, ["a", "another one"])
    base.family.predict(parts, noisy, t, cond).square().mean().backward()
    trained = adapter.parameters("denoiser")
    assert trained
    for p in trained:
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0
    own = {id(p) for p in trained}
    for root in (parts.denoiser, parts.vae, parts.text_encoders):
        assert all(p.grad is None for p in root.parameters() if id(p) not in own)


def check_shared(base: api.Base, weights: Mapping[str, torch.Tensor]) -> None:
    """Hold that the modules' tensors are those that were given: the same memory, none of them copied."""
    parts = base.load()
    given = {v.data_ptr() for v in weights.values()}
    for name, tensor in parts.denoiser.state_dict().items():
        assert tensor.data_ptr() in given, name
    for name, tensor in parts.vae.state_dict().items():
        assert tensor.data_ptr() in given, name


def check_folder(base: api.Base, parts: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """Hold that a diffusers folder of the parts is the same base, with its tokenizer in it."""
    from safetensors.torch import save_file

    for part, name in base.family.folders.items():
        (folder / name).mkdir(parents=True)
        tensors = {k: v.clone() for k, v in parts[part].items() if k != "encoder.embed_tokens.weight"}
        save_file(tensors, folder / name / "model.safetensors")
    (tokenizer,) = base.tokenizer_folders.values()
    shutil.copytree(tokenizer, folder / "tokenizer")
    opened = api.open_base(folder)
    assert opened.family.name == base.family.name
    assert opened.weights_hash == base.weights_hash
    assert Path(opened.tokenizer_folders[base.family.encoders["text_encoder"]]) == folder / "tokenizer"
    opened.load()


def check_shapes(base: api.Base) -> None:
    """Hold that texts have the announced shapes, whatever they say, and an image the announced latents."""
    parts, family = base.load(), base.family
    for reading in (Reading(), Reading(t5_length=32)):
        expected = family.cond_shapes(parts, reading)
        for captions in (["a"], ["", "a somewhat longer caption, with words"]):
            cond = conditioning(base, parts, captions, reading)
            assert [tuple(x.shape[1:]) for x in cond] == [tuple(s) for s in expected]
            assert all(len(x) == len(captions) for x in cond)
    moments = family.encode_images(parts, torch.zeros(1, 3, 64, 32))
    latents = family.latents(moments, torch.zeros_like(moments["mean"]))
    assert tuple(latents.shape[1:]) == family.latent_shape(parts, 64, 32)
    assert family.decode(parts, latents).shape == (1, 3, 64, 32)


def check_comfyui_reads_the_lora(
    base: api.Base, folder: Path, model: str, arguments: Mapping[str, Any]
) -> None:
    """Hold that ComfyUI knows every key of the family's LoRA and changes its weights as the network does."""
    from safetensors.torch import save_file

    parts = base.load()
    weights = {k: v.clone() for k, v in parts.denoiser.state_dict().items()}
    adapter = with_lora(base, parts)
    file = {k: v.contiguous() for k, v in adapter.saved().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(file, folder / "made.safetensors")
    lora = folder / "made.safetensors"
    answer = comfy_peer.ask(folder / "peer", model, arguments, weights, {"x": torch.zeros(1)}, [], lora)
    assert answer.unmatched == []
    assert len(answer.weights) == len(adapter.modules) > 0
    for module in adapter.modules:
        key = module.target.key
        down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
        change = up @ down * (file[f"{key}.alpha"] / len(down))
        name = f"{module.target.path}.weight"
        torch.testing.assert_close(answer.weights[name] - weights[name], change, atol=2e-6, rtol=0)


def check_shapes_are_read(
    theirs: nn.Module, named: Callable[[Any], Any], config: Callable[[Any], dict[str, Any]], ours: Any
) -> dict[str, Any]:
    """Hold that diffusers' module, on the meta device, has the tensors of ours; return the shape read."""
    sd = named(theirs.state_dict())
    read = config(sd)
    with torch.device("meta"):
        again = ours(**read).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: sd[k].shape for k in sd}
    return read


def check_golden_modules(family: str, parts: Parts, case: str) -> None:
    """Hold that the LoRA's modules, in full size, are those of the reference trainer, shapes too."""
    expected = golden("lora_modules_chroma_lumina")[case]
    targets = FAMILIES[family].targets(parts, convolutions=False)
    found = {}
    for target in targets:
        rows, columns = parts.denoiser.get_submodule(target.path).weight.shape  # type: ignore[union-attr,misc]
        found[target.key] = [[16, columns], [rows, 16]]
    assert found == expected


def check_sampling(base: api.Base) -> None:
    """Hold that an image is drawn, the same one for the same seed, and another with another prompt."""
    parts = base.load()

    def draw(prompt: str) -> list[Any]:
        return drawing.sample(
            base.family,
            parts,
            [prompt],
            seeds=[5],
            size=(32, 64),
            steps=2,
            guided=drawing.Guided(negative="no", cfg=2.0),
            reading=Reading(),
        )

    (first,), (again,), (other,) = draw("a cat"), draw("a cat"), draw("a dog, sitting")
    assert first.size == (64, 32)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def check_training(base: api.Base, folder: Path, **settings: Any) -> None:
    """Hold that a run ends, that one stopped and resumed gives the same bytes, and that sampling runs."""
    images = tiny.write_images(folder / "images", [(64, 64), (64, 64), (64, 32)])
    buckets = {"resolution": 64, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    train_set = runs.train_set(images, **buckets)
    whole = runs.Training(
        base, train_set, api.Places(folder / "a" / "runs", folder / "a" / "loras", folder / "a" / "cache")
    )
    values = {"train_batch_size": 2, "mixed_precision": "fp32", **settings}
    end = whole.finish(**values)
    parted = whole.elsewhere("b")
    parted.stop_after(2, **values)
    resumed = parted.finish(**values)
    assert end.lora_file.read_bytes() == resumed.lora_file.read_bytes()
    from safetensors.torch import load_file

    file = load_file(end.lora_file)
    assert any(v.abs().sum() > 0 for k, v in file.items() if k.endswith("lora_up.weight"))
    assert all(k.startswith("lora_unet_") for k in file)


def metadata_of(file: Path) -> dict[str, str]:
    """Return a safetensors file's metadata."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        found: dict[str, str] = json.loads(stream.read(size))["__metadata__"]
    return found
