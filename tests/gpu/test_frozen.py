"""Frozen layers on a GPU: captured they compute the same, and what a host shares is not copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.engine.file_formats import FILE_FORMATS
from loragraft.trainer.engine.frozen import FROZEN, freeze
from loragraft.trainer.engine.packed_tensor import unpacked
from loragraft.trainer.engine.precision import place, resolve
from loragraft.trainer.engine.storage import FORMATS
from loragraft.trainer.families import drawing
from loragraft.trainer.families.base import Reading
from loragraft_tests.trainer import quantised_files, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("storage", ["as_is", *FORMATS])
def test_a_captured_layer_is_the_eager_one(storage: str) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 32))
    body = layers.half().requires_grad_(False)
    freeze(body, torch.bfloat16, device, storage=storage)
    x = torch.randn(4, 8, 8, 8, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = body(x)
        return out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_weights_packed_in_a_file_are_unpacked_there_as_on_the_cpu(kind: str) -> None:
    device = torch.device("cuda")
    weight = quantised_files.packed_of(kind)
    with torch.device("meta"):
        body = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    body.load_state_dict({"0.weight": weight}, assign=True)
    body.requires_grad_(False)
    freeze(body, torch.float32, device)
    found = body[0].weight.cpu()  # type: ignore[operator]
    torch.testing.assert_close(found, unpacked(weight), rtol=1e-6, atol=1e-6)
    x = torch.randn(4, weight.shape[1], device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        body(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = body(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, body(x), rtol=1e-4, atol=1e-4)


def test_what_a_host_holds_on_the_gpu_is_shared_and_the_rest_is_not_brought(tmp_path: Path) -> None:
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer")
    weights = load_file(tiny.write_checkpoint(tmp_path / "tiny.safetensors"))
    held = {k: v.cuda() if k.startswith("model.") else v for k, v in weights.items()}
    addresses = {v.data_ptr() for v in held.values()}
    base = api.open_base_from_weights(held, name="x", tokenizers={"clip": tokenizer})
    parts = base.load()
    place(parts, resolve("bf16", torch.device("cuda")), owned=base.owned, text_at_every_step=False)
    assert {p.device.type for p in parts.denoiser.parameters()} == {"cuda"}
    assert all(p.data_ptr() in addresses for p in parts.denoiser.parameters() if p.ndim > 1)
    assert any(isinstance(m, FROZEN) for m in parts.denoiser.modules())
    for part in (parts.vae, parts.text_encoder):
        assert {p.device.type for p in part.parameters()} == {"cpu"}
    options: dict[str, Any] = {"size": (32, 32), "steps": 1, "reading": Reading()}
    guided = drawing.Guided(cfg=2.0)
    (image,) = drawing.sample(base.family, parts, ["zibu"], seeds=[1], guided=guided, **options)
    assert image.size == (32, 32)
    assert {p.device.type for p in parts.vae.parameters()} == {"cpu"}, "it goes back after its visit"
