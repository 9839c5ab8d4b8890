"""Which precision a run computes in, and how a base model's weights are brought to it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.engine.frozen import FROZEN, freeze
from loragraft.trainer.engine.precision import Precision, place, resolve, strict, visiting
from loragraft.trainer.engine.steps import choose
from loragraft.trainer.engine.storage import FORMATS, Packed
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.base import Reading
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))])


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see two GPUs: cuda:0 without bf16, which torch would emulate there, and cuda:1 with it."""
    current = [torch.device("cuda:0")]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or current[0].index == 1

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"old card {device}")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("index", "expected"), [(0, "fp16"), (1, "bf16")])
def test_auto_takes_what_the_wished_gpu_has_without_emulation(index: int, expected: str) -> None:
    assert resolve("auto", torch.device("cuda", index)).name == expected


def test_auto_on_a_cpu_is_fp32() -> None:
    assert resolve("auto", torch.device("cpu")).name == "fp32"


@pytest.mark.parametrize(("setting", "name"), [("auto", "fused"), ("fused", "fused"), ("eager", "eager")])
def test_a_cpu_takes_fused_steps_unless_told_otherwise(setting: str, name: str) -> None:
    assert choose(setting, resolve("fp32", CPU), [adamw()])[0] == name


@pytest.mark.parametrize(
    ("precision", "name"), [("bf16", "captured"), ("fp32", "captured"), ("fp16", "eager")]
)
def test_a_gpu_takes_captured_steps_unless_a_loss_scaler_decides(precision: str, name: str) -> None:
    assert choose("auto", Precision(precision, GPU), [adamw()])[0] == name
    assert choose("eager", Precision(precision, GPU), [adamw()])[0] == "eager"


def test_captured_steps_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(LoraGraftError) as refused:
        choose("captured", resolve("fp32", CPU), [adamw()])
    assert refused.value.code == "LG-RUN-008"
    assert "CUDA graphs" in refused.value.why


def test_an_optimizer_that_cannot_be_captured_is_not() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], momentum=0.9, nesterov=True)
    assert choose("auto", resolve("fp32", GPU), [optimizer])[0] == "fused"
    with pytest.raises(LoraGraftError) as refused:
        choose("captured", resolve("fp32", GPU), [optimizer])
    assert "optimizer" in refused.value.why


def test_an_optimizer_that_looks_at_whole_tensors_takes_plain_steps() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 1.0})

    name, why = choose("auto", resolve("fp32", CPU), [adamw(), Plain()])
    assert name == "eager" and "each tensor as a whole" in why
    with pytest.raises(LoraGraftError) as refused:
        choose("fused", resolve("fp32", CPU), [Plain()])
    assert refused.value.code == "LG-RUN-008"


def test_strict_mode_leaves_the_process_as_it_was() -> None:
    def state() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark

    before = state()
    with strict(True):
        assert state() == (True, True, False)
    assert state() == before
    with pytest.raises(ValueError, match="inside"), strict(True):
        raise ValueError("inside")
    assert state() == before
    with strict(False):
        assert state() == before


@pytest.mark.usefixtures("two_gpus")
def test_bf16_is_refused_where_the_gpu_has_none() -> None:
    with Refusal("LG-RUN-002", "old card cuda:0"):
        resolve("bf16", torch.device("cuda:0"))
    assert resolve("bf16", torch.device("cuda:1")).name == "bf16"


# ---- placing the weights ----


def floats(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


def casting(module: nn.Module) -> int:
    """Count the layers that bring their weight at each use."""
    return sum(isinstance(m, FROZEN) for m in module.modules())


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_on_a_cpu_what_steps_use_is_converted_once(base: api.Base, name: str, owned: bool) -> None:
    parts, precision = base.load(), resolve(name, CPU)
    assert place(parts, precision, owned=owned) == []
    assert parts.dtype == precision.dtype
    for part in (parts.denoiser, parts.text_encoder):
        assert floats(part) == {precision.dtype}, "norms too"
        assert casting(part) == 0


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_no_step_uses_keeps_its_storage(base: api.Base, name: str) -> None:
    parts = base.load()
    files = {p.data_ptr() for p in parts.text_encoder.parameters()}
    place(parts, resolve(name, CPU), owned=True, text_at_every_step=False)
    for part in (parts.text_encoder, parts.vae):
        matrices = [p for p in part.parameters() if p.ndim > 1]
        assert {p.dtype for p in matrices} == {torch.float16}
    vectors = {p.dtype for p in parts.vae.parameters() if p.ndim == 1}
    assert vectors == {torch.float32}, "fp16 overflows in it"
    embeddings = [p for n, p in parts.text_encoder.named_parameters() if "embedding" in n]
    assert embeddings and {p.data_ptr() for p in embeddings} <= files, "it is the file's own memory"
    ids = base.family.tokenize(parts, ["zibu"], Reading(75))[0]
    assert base.family.encode_text(parts, (ids,), Reading(clip_skip=1))[0].dtype == parts.dtype
    moments = base.family.encode_images(parts, torch.zeros(1, 3, 16, 16))
    assert {m.dtype for m in moments.values()} == {torch.float32}


def test_shared_weights_on_an_accelerator_stay_as_they_are(base: api.Base) -> None:
    """The device without memory stands in for one: what is shared must not be copied there."""
    device = torch.device("meta")
    for owned, copied in ((False, False), (True, True)):
        parts = base.load()
        parts.denoiser.to(device)
        parts.text_encoder.to(device)
        place(parts, resolve("bf16", device), owned=owned)
        for part in (parts.denoiser, parts.text_encoder):
            matrices = {p.dtype for p in part.parameters() if p.ndim > 1}
            assert matrices == {torch.bfloat16 if copied else torch.float16}
            assert (casting(part) == 0) is copied
            assert {p.dtype for p in part.parameters() if p.ndim == 1} == {torch.bfloat16}


def test_in_fp32_the_storage_changes_no_bit(base: api.Base) -> None:
    found = []
    for often in (True, False):
        parts = base.load()
        place(parts, resolve("fp32", CPU), owned=True, text_at_every_step=often)
        if not often:
            assert casting(parts.text_encoder) and casting(parts.vae)
        with torch.no_grad():
            ids = base.family.tokenize(parts, ["zibu, blue"], Reading(75))[0]
            cond = base.family.encode_text(parts, (ids,), Reading(clip_skip=2))[0]
            mean = base.family.encode_images(parts, torch.linspace(-1, 1, 768).view(1, 3, 16, 16))["mean"]
        found.append((cond, mean))
    plain = base.load()
    plain.vae.float()
    plain.text_encoder.float()
    with torch.no_grad():
        mean = base.family.encode_images(plain, torch.linspace(-1, 1, 768).view(1, 3, 16, 16))["mean"]
        tokens = base.family.tokenize(plain, ["zibu, blue"], Reading())
        (cond,) = base.family.encode_text(plain, tokens, Reading(clip_skip=2))
    for one in found:
        assert torch.equal(one[0], cond) and torch.equal(one[1], mean)


@pytest.mark.parametrize("storage", FORMATS)
def test_a_packed_base_trains_and_says_what_it_lost(base: api.Base, storage: str) -> None:
    expected, _ = gradients(base, "fp32", seed=1)
    found, lines = gradients(base, "fp32", seed=1, storage=storage)
    assert len(lines) == 1 and lines[0].startswith(f"base_storage {storage}: ")
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {"fp8": 0.3, "int8": 0.1, "nf4": 0.8}[storage]


def test_a_packed_base_keeps_its_first_and_last_layers_whole(base: api.Base) -> None:
    parts = base.load()
    place(parts, resolve("fp32", CPU), owned=True, storage="nf4")
    packed = {path.split(".")[0] for path, m in parts.denoiser.named_modules() if isinstance(m, Packed)}
    assert packed == {"down_blocks", "mid_block", "up_blocks"}
    assert not any(isinstance(m, Packed) for part in (parts.vae, parts.text_encoder) for m in part.modules())


# ---- visits to the device ----


class Transfers:
    """Copies in memory that stand in for transfers to a GPU; after ``room`` of them it is full."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int = 1000) -> None:
        self.made = 0

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.made == room:
                raise torch.OutOfMemoryError("full")
            self.made += 1
            return tensor.clone()

        patch.setattr(torch.Tensor, "to", to)


def guest() -> nn.Module:
    """Return a module with all that is placed: plain, shared, cast and packed weights, and a buffer."""
    tree = nn.ModuleDict({"plain": nn.Linear(64, 64), "packed": nn.Linear(64, 64), "norm": nn.LayerNorm(4)})
    tree["cast"] = nn.Sequential(nn.Conv2d(2, 2, 1).half(), nn.Embedding(3, 4).half())
    tree["again"] = tree["plain"]
    tree["norm"].register_buffer("ids", torch.arange(3), persistent=False)
    tree.requires_grad_(False)
    freeze(tree, torch.float32, CPU, storage="nf4", skip=("plain", "again", "norm", "cast"))
    freeze(tree, torch.float32, CPU)
    assert casting(tree) == 3
    return tree


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor that a module's layers refer to, whether registered or not, each once."""
    found = {}
    for path, layer in module.named_modules():
        for held in (layer._parameters, layer._buffers, vars(layer)):
            found |= {f"{path}.{k}": v for k, v in held.items() if isinstance(v, torch.Tensor)}
    return found


def places(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors(module).items()}


@pytest.mark.parametrize("which", ["layers", "vae", "text_encoder"])
def test_a_visit_takes_everything_once_and_comes_home_without_a_copy(
    base: api.Base, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    if which == "layers":
        module = guest()
    else:
        parts = base.load()
        place(parts, resolve("bf16", CPU), text_at_every_step=False)
        module = getattr(parts, which)
    home, objects = places(module), list(map(id, module.parameters()))
    values = {k: v.clone() for k, v in tensors(module).items()}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="inside"):
        transfers = Transfers(patch)
        with visiting(module, GPU):
            away = places(module)
            assert not [k for k in home if away[k] == home[k]], "all of it is there"
            assert all(torch.equal(v, values[k]) for k, v in tensors(module).items())
            assert transfers.made == len(set(home.values()))
            raise ValueError("inside")
    assert places(module) == home, "the very memory, so nothing was copied"
    assert transfers.made == len(set(home.values()))
    assert list(map(id, module.parameters())) == objects


def test_a_visit_that_finds_no_room_leaves_all_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    module = guest()
    home = places(module)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        transfers = Transfers(patch, room=3)
        with visiting(module, GPU):
            pytest.fail("there was no room")
    assert transfers.made == 3 and places(module) == home


def test_a_visit_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(512, 512).requires_grad_(False)
    with monkeypatch.context() as patch:
        Transfers(patch)
        with visiting(module, GPU):
            copy = StorageWeakRef(module.weight.untyped_storage())
    gc.collect()
    assert copy.expired()


# ---- explicit half precision ----


def gradients(base: api.Base, how: str, seed: int, storage: str = "as_is") -> tuple[torch.Tensor, list[str]]:
    """Return all LoRA gradients of one batch, float64, and what `place` said.

    ``how`` is a precision, fp64, or autocast: half weights and float32 norms under bf16 autocast.
    """
    parts, context, lines = base.load(), nullcontext(), []
    if how == "fp64":
        parts.denoiser.double()
        parts.dtype = torch.float64
    elif how == "autocast":
        for module in parts.denoiser.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.float()
        context = torch.autocast("cpu", torch.bfloat16)  # type: ignore[assignment]
    else:
        lines = place(parts, resolve(how, CPU), owned=True, storage=storage)
    settings = network.Settings(8, 4.0, 8, 4.0, seed, text_encoder=False)
    adapter = network.inject(parts, settings, base.family.targets(parts, convolutions=True))
    trained = adapter.parameters("denoiser")
    rng = torch.Generator().manual_seed(seed)
    for parameter in trained:  # up tensors start at zero, which would hide what down tensors get
        if not parameter.any():
            parameter.data.normal_(0, 0.02, generator=rng)
    noisy, noise = (torch.randn(2, 4, 16, 16, generator=rng) for _ in range(2))
    cond = torch.randn(2, 77, tiny.TEXT, generator=rng)
    t = torch.randint(0, 1000, (2,), generator=rng)
    with context:
        pred = base.family.predict(parts, noisy, t, (cond,))
    (pred.to(torch.float64 if how == "fp64" else torch.float32) - noise).square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None]), lines


@pytest.mark.slow
def test_explicit_bf16_is_as_near_to_fp64_as_autocast(tmp_path: Path, tokenizer: Path) -> None:
    errors: dict[str, float] = {"autocast": 0.0, "bf16": 0.0}
    for seed in range(3):
        file = tiny.write_checkpoint(tmp_path / f"{seed}.safetensors", seed=seed)
        base = api.open_base(file, tokenizer=tokenizer)
        exact, _ = gradients(base, "fp64", seed)
        for how in errors:
            errors[how] += float((gradients(base, how, seed)[0] - exact).norm() / exact.norm())
    assert errors["bf16"] <= 1.25 * errors["autocast"], errors


def test_fp16_computes_on_a_cpu(base: api.Base) -> None:
    exact, _ = gradients(base, "fp64", seed=0)
    found, _ = gradients(base, "fp16", seed=0)
    assert float((found - exact).norm() / exact.norm()) < 0.05
