"""Ranks of single modules, lengths of updates against the reference, and networks as files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.adapters import lora, network
from loragraft.trainer.adapters.attach import attach, start_from
from loragraft.trainer.adapters.files import as_saved
from loragraft.trainer.parts import Parts, Target
from loragraft.trainer.patterns import rules
from loragraft_tests.trainer import networks, tiny
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.networks import CASES, SHAPES, TARGETS, Case, at, outputs

GOLDEN = Path(__file__).parent.parent / "golden"


# ---- ranks ----


def blocks(parts: Parts) -> list[Target]:
    """Return the targets, each in a block of its own."""
    return [dataclasses.replace(t, block=number) for number, t in enumerate(TARGETS)]


def ranks(**changes: Any) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of what is trained, by path."""
    parts = networks.layers()
    settings = dataclasses.replace(CASES["lora"].settings(), **changes)
    return {m.target.path: (m.rank, m.alpha) for m in network.inject(parts, settings, blocks(parts)).modules}


def test_patterns_and_blocks_give_ranks() -> None:
    assert ranks() == dict.fromkeys(SHAPES, (4, 2.0))
    assert ranks(rules=tuple(rules(["linear=8", "lin=2", "str=0"]))) == {
        "linear": (8, 2.0),
        "wide": (4, 2.0),
        "point": (4, 2.0),
        "conv": (4, 2.0),
    }
    of_blocks = ((1, 1.0), (0, 2.0), (2, 0.0), (9, 9.0), (9, 9.0))
    assert ranks(blocks=of_blocks) == {
        "linear": (1, 1.0),
        "point": (2, 2.0),
        "conv": (4, 2.0),
        "strided": (4, 2.0),
    }
    assert ranks(conv_blocks=of_blocks, conv_dim=None) == {
        **dict.fromkeys(("linear", "wide", "point"), (4, 2.0)),
        **dict.fromkeys(("conv", "strided"), (9, 9.0)),
    }
    assert ranks(still=frozenset({0, 3})).keys() == {"wide", "point", "strided"}
    assert ranks(network_alpha=0.0)["linear"] == (4, 4.0)


def test_a_pattern_that_fits_nothing_is_refused_with_names_that_exist() -> None:
    with Refusal("LG-CFG-003", "network_reg_dims", "lora_unet_linear"):
        ranks(rules=tuple(rules(["lora_unet_linaer=8"])))


@pytest.mark.parametrize("pattern", [".?" * 40 + "Z", "(.|..)" * 20 + "Z", "(?:a|b)" * 9, "[ab]?" * 9])
def test_patterns_of_many_choices_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="more than 8 of"):
        rules([f"{pattern}=4"])


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("^(?:down|mid|up|in|out|time|a|b|c|d).*(to_q|to_k|to_v)(?:\\.|$)", "down.to_q"),
        (".*?attn[12]??.*", "x.attn1"),
        ("^.*to_q$", "x.to_q"),
        ("a\\.*", "a.."),
        (".*", "x"),
    ],
)
def test_patterns_of_few_choices_are_read(pattern: str, name: str) -> None:
    (rule,) = rules([f"{pattern}=4"])
    assert rule.fits(name)
    assert rule.fits("to_q_b") == (pattern == ".*")


def test_a_butterfly_that_cannot_be_is_refused_with_the_smallest_that_can() -> None:
    parts = networks.layers()
    parts.denoiser.linear = nn.Linear(24, 24)
    with Refusal("LG-CFG-003", "network_dim", "at least 6"):
        network.inject(parts, Case("boft", 4).settings(), TARGETS[:1])


def test_a_unit_that_does_not_divide_a_rank_is_refused() -> None:
    with Refusal("LG-CFG-003", "unit"):
        networks.injected(Case("dylora", 6, options={"unit": 4}))


# ---- lengths ----


@pytest.mark.parametrize("name", ["lora", "lora rank-stabilised", "dylora"])
def test_long_updates_are_shortened_as_kohya_does(name: str) -> None:
    """Both matrices by the square root of max / |dW|, and the figures that it logs."""
    _, adapter = networks.injected(CASES[name])
    networks.moved(adapter)
    before = {m.target.path: networks.weight_of(m) - m.module.base.weight for m in adapter.modules}  # type: ignore[operator]
    downs = {m.target.path: m.share.saved(m.module.base)[lora.DOWN].clone() for m in adapter.modules}
    norms = {path: change.norm().item() for path, change in before.items()}
    largest = 1.0001 * sorted(norms.values())[2]
    adapter.limit_norms(largest)
    for m in adapter.modules:
        path = m.target.path
        change = networks.weight_of(m) - m.module.base.weight  # type: ignore[operator]
        ratio = min(1.0, largest / norms[path])
        torch.testing.assert_close(change, before[path] * ratio, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.share.saved(m.module.base)[lora.DOWN], downs[path] * math.sqrt(ratio))
    after = [min(norm, largest) for norm in norms.values()]
    assert adapter.lengths is not None
    assert adapter.lengths.scaled == 2
    assert adapter.lengths.mean == pytest.approx(sum(after) / len(after), rel=1e-5)
    assert adapter.lengths.largest == pytest.approx(largest, rel=1e-5)


# ---- the reference's own numbers ----

REFERENCE = json.loads((GOLDEN / "network.json").read_text(encoding="utf-8"))
THREE = {
    "linear": lambda: nn.Linear(12, 8),
    "point": lambda: nn.Conv2d(12, 8, 1),
    "conv": lambda: nn.Conv2d(12, 8, 3, padding=1),
}


def wave(*shape: int, k: float) -> torch.Tensor:
    """Return the numbers that the reference was given."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * k).sin().float().view(shape)


def three(case: Case, ups: tuple[float, ...]) -> network.Adapter:
    """Return a network on three layers with the weights that the reference was given."""
    module = nn.Module()
    for name, make in THREE.items():
        layer = make()
        layer.weight.data, layer.bias.data = wave(*layer.weight.shape, k=0.9), torch.zeros(8)
        setattr(module, name, layer.requires_grad_(False))
    parts = tiny.parts_of(module, nn.Identity(), nn.Identity())
    adapter = network.inject(parts, case.settings(), [t for t in TARGETS if t.path in THREE])
    for m, height in zip(adapter.modules, ups, strict=True):
        saved = m.share.saved(m.module.base)
        down = wave(*saved[lora.DOWN].shape, k=0.7) * 0.3
        up = wave(*saved[lora.UP].shape, k=1.3) * height
        if isinstance(m.share, lora.LowRank):
            m.share.down.data, m.share.up.data = down, up
        else:
            m.share.load(down, up)  # type: ignore[attr-defined]
    return adapter


@pytest.mark.parametrize("limit", ["0.2", "1.0", "2.0"])
def test_lengths_are_the_references(limit: str) -> None:
    adapter, expected = three(CASES["lora"], (0.05, 0.25, 0.45)), REFERENCE["max_norm"][limit]
    adapter.limit_norms(float(limit))
    lengths = adapter.lengths
    assert lengths is not None and lengths.scaled == expected["scaled"]
    assert lengths.mean == pytest.approx(expected["mean"], rel=1e-6)
    assert lengths.largest == pytest.approx(expected["largest"], rel=1e-6)
    sums = {m.target.path: m.low.up.abs().sum().item() for m in adapter.modules}
    assert sums == pytest.approx(expected["up_sums"], rel=1e-6)


@pytest.mark.parametrize("turn", [0, 1])
def test_dylora_adds_what_the_reference_adds(turn: int) -> None:
    adapter = three(Case("dylora", 4, 2.0, {"unit": 2}), (0.2, 0.2, 0.2))
    for m in adapter.modules:
        path = m.target.path
        x = wave(2, 5, 12, k=0.31) if path == "linear" else wave(2, 12, 5, 4, k=0.31)
        adapter.select()
        whole = m.module(x) - m.module.base(x)
        for step in range(20):  # until the block's turn comes
            at(adapter, step)
            added = (m.module(x) - m.module.base(x)).detach()
            if torch.allclose(added, whole * math.sqrt(2 / (turn + 1)), atol=1e-4):
                break
        found = [added.sum().item(), added.abs().sum().item()]
        assert found == pytest.approx(REFERENCE["dylora"][path][str(turn)], rel=1e-4, abs=1e-4)


def test_short_updates_stay_bit_for_bit() -> None:
    _, adapter = networks.injected(CASES["lora"])
    networks.moved(adapter, by=1e-3)
    before = {k: v.clone() for k, v in adapter.saved().items()}
    adapter.limit_norms(100.0)
    assert all(torch.equal(v, before[k]) for k, v in adapter.saved().items())


# ---- beginning from a file ----


@pytest.mark.parametrize("name", [name for name in CASES if name != "lokr tucker"])
def test_a_run_begins_where_a_file_ended(name: str) -> None:
    _, first = networks.injected(CASES[name])
    networks.moved(first)
    expected = outputs(first)
    _, second = networks.injected(CASES[name])
    lines = start_from(second, first.saved(), "old.safetensors", takes_ranks=False)
    assert lines == [f"starts from old.safetensors: {len(SHAPES)} modules"]
    for path, out in outputs(second).items():
        torch.testing.assert_close(out, expected[path], rtol=1e-5, atol=2e-5)


def test_a_file_with_other_ranks_or_alphas_is_refused_by_name() -> None:
    _, first = networks.injected(CASES["lora"])
    for other in (Case("lora", 8), Case("lora", 4, 4.0), Case("loha"), CASES["dora"]):
        _, second = networks.injected(other)
        with Refusal("LG-CFG-004", "lora_unet_linear.", "rank 4, alpha 2", "dim_from_weights"):
            start_from(second, first.saved(), "old.safetensors", takes_ranks=False)


def test_a_file_with_tensors_of_other_modules_is_refused_by_name() -> None:
    _, first = networks.injected(CASES["lora"])
    tensors = first.saved()
    tensors["lora_unet_elsewhere.lora_up.weight"] = torch.zeros(1)
    _, second = networks.injected(CASES["lora"])
    with Refusal("LG-SAVE-006", "lora_unet_elsewhere.lora_up.weight"):
        start_from(second, tensors, "old.safetensors", takes_ranks=False)


def test_modules_that_the_file_lacks_start_from_nothing_and_are_counted() -> None:
    _, first = networks.injected(CASES["lora"])
    networks.moved(first)
    tensors = {k: v for k, v in first.saved().items() if "conv" not in k}
    _, second = networks.injected(CASES["lora"])
    lines = start_from(second, tensors, "old.safetensors", takes_ranks=False)
    assert lines[1] == "1 modules are not in old.safetensors and start from nothing"
    assert not second.modules[3].low.up.any() and second.modules[0].low.up.any()


# ---- as a file ----


def test_factors_of_channels_keep_their_precision() -> None:
    _, adapter = networks.injected(CASES["dora"])
    saved = as_saved(adapter.saved(), "fp16")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in saved.items()}
    assert kinds == {"dora_scale": torch.float32, "alpha": torch.float16, "weight": torch.float16}


def test_broken_files_of_every_network_are_refused() -> None:
    """A tensor of another shape, or one that is missing, makes no network."""
    for name, case in CASES.items():
        _, adapter = networks.injected(case)
        tensors = adapter.saved()
        for key in [k for k in tensors if k.startswith("lora_unet_linear.") and not k.endswith(".alpha")]:
            lacking = {k: v for k, v in tensors.items() if k != key}
            for broken in ({**tensors, key: torch.zeros(3, 5)}, lacking):
                parts = networks.layers()
                whole = {"lora_unet_linear.diff_b", "lora_unet_linear.dora_scale", "lora_unet_linear.rescale"}
                if key in whole and key not in broken:
                    continue  # what is left is a whole network of another kind
                with Refusal("LG-SAVE-006", "lora_unet_linear."):
                    attach(parts, broken, TARGETS)
                assert not any(hasattr(m, "runs") for m in parts.denoiser.modules()), name


@pytest.mark.parametrize(("dim", "mib"), [(128, 144.0), (64, 72.0), (32, 36.0), (8, 9.0)])
def test_sizes_of_files_follow_the_rule_of_thumb(dim: int, mib: float) -> None:
    """SD1.5 in fp16: 1.125 MiB a rank. The reference's own file has 18,874,632 numbers at rank 32."""
    keys = json.loads((GOLDEN / "lora_keys.json").read_text(encoding="utf-8"))["sd15_lora_dim32"]["keys"]
    count = sum(math.prod(shape) for shape in keys.values())
    assert count == 18_874_632
    scaled = sum(math.prod(shape) * (dim // 8) // 4 if shape else 1 for shape in keys.values())
    assert 2 * scaled / 2**20 == pytest.approx(mib, rel=0.001)
