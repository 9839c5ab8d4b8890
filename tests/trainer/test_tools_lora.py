"""LoRA files after training: resized, merged, extracted, checked; against the reference's own results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.families.base import Reading
from loragraft.trainer.tools import bake, deltas, extract, lora_file, merge, places, resize, stream
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "resize_lora.json").read_text("utf-8"))["cases"]
Tensors = Mapping[str, torch.Tensor]


def change(module: lora_file.Module) -> torch.Tensor:
    """Return a module's change of the weight as a matrix."""
    return deltas.delta(module).flatten(1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    """Return the reference's tensors by what they are of."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(GOLDEN / "lora_tools.safetensors").items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


# ---- resize ----


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['dynamic_method'] or 'fixed'}-{c['new_rank']}")
def test_resizing_equals_the_reference(case: dict[str, Any]) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    method = case["dynamic_method"] or "fixed"
    new, report = resize.resize(
        file, api.ResizeSettings(case["new_rank"], None, method, case["dynamic_param"])
    )
    assert set(new.modules) == set(case["modules"])
    for name, wanted in case["modules"].items():
        module, old = new.modules[name], file.modules[name]
        assert (module.rank, module.alpha) == (wanted["rank"], wanted["alpha"]), name
        assert float(change(module).norm()) == pytest.approx(wanted["delta_frobenius"], rel=2e-6)
        assert error(change(module), change(old)) == pytest.approx(wanted["relative_error"], rel=1e-5)
    for told in report:
        assert told.error == pytest.approx(case["modules"][told.name]["relative_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "params", "ranks"),
    [
        ("sv_ratio", (2, 4, 8, 16), (2, 3, 4, 5)),
        ("sv_fro", (0.5, 0.8, 0.9, 0.95, 0.99), (2, 2, 3, 3, 4)),
        ("sv_cumulative", (0.5, 0.8, 0.9, 0.95, 0.99), (2, 4, 5, 6, 8)),
    ],
)
def test_the_rank_rule(method: str, params: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    values = torch.tensor([8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    assert tuple(resize.choose_rank(values, method, p, 100) for p in params) == ranks
    assert resize.choose_rank(values, method, params[-1], 3) == 3
    assert resize.choose_rank(values * 1e-8, method, params[0], 100) == 1


def test_a_resized_file_says_so_and_is_written_over_nothing(tmp_path: Path) -> None:
    source, target = GOLDEN / "resize_input.safetensors", tmp_path / "small.safetensors"
    output = api.Output(target, "fp16")
    written = api.resize_lora(source, output, api.ResizeSettings(4, 2))
    told = read_metadata(target)
    assert told["ss_training_comment"].startswith("dimension is resized from 24 to 4 (conv: 2); ")
    assert told["ss_network_dim"] == "Dynamic"
    assert "6 modules, ranks 2 to 4" in written.report
    tensors = load_file(target)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert tensors["lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight"].shape == (2, 32, 3, 3)
    with Refusal("LG-TOOL-004", "small.safetensors"):
        api.resize_lora(source, output, api.ResizeSettings(4))
    again = dataclasses.replace(output, overwrite=True)
    api.resize_lora(source, again, api.ResizeSettings(4, None, "sv_fro", 0.9))
    assert read_metadata(target)["ss_network_dim"] == "Dynamic"
    assert read_metadata(target)["sshs_model_hash"] != told["sshs_model_hash"]


def test_a_higher_rank_than_the_modules_own_keeps_it() -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    new, _ = resize.resize(file, api.ResizeSettings(64))
    for name, module in new.modules.items():
        assert module.rank == 24
        assert error(change(module), change(file.modules[name])) < 1e-6


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (api.ResizeSettings(0), "at least 1"),
        (api.ResizeSettings(4, 0), "at least 1"),
        (api.ResizeSettings(4, None, "sv", 1), "none of"),
        (api.ResizeSettings(4, None, "sv_fro"), "needs a number"),
        (api.ResizeSettings(4, None, "sv_fro", 1.5), "needs a number"),
        (api.ResizeSettings(4, None, "sv_ratio", 0.5), "above 1"),
        (api.ResizeSettings(4, None, "fixed", 0.5), "no parameter"),
    ],
)
def test_impossible_ways_to_resize(settings: api.ResizeSettings, why: str) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    with Refusal("LG-TOOL-005", why):
        resize.resize(file, settings)


def other_types() -> dict[str, torch.Tensor]:
    """Return a LoHa, a LoKr and a full module, each on a convolution or a linear layer."""
    rng = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    conv, linear = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in"
    return {
        f"{conv}.hada_w1_a": drawn(8, 2),
        f"{conv}.hada_w1_b": drawn(2, 4 * 9),
        f"{conv}.hada_w2_a": drawn(8, 2),
        f"{conv}.hada_w2_b": drawn(2, 4 * 9),
        f"{conv}.alpha": torch.tensor(1.0),
        f"{linear}.lokr_w1": drawn(2, 3),
        f"{linear}.lokr_w2_a": drawn(5, 2),
        f"{linear}.lokr_w2_b": drawn(2, 4),
        f"{linear}.alpha": torch.tensor(4.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.diff": drawn(6, 5),
    }


def test_other_types_are_resized_as_what_they_change() -> None:
    t = other_types()
    file = lora_file.parse(t)
    new, _ = resize.resize(file, api.ResizeSettings(8))
    conv, linear, full = file.modules
    kron = torch.kron(t[f"{linear}.lokr_w1"], t[f"{linear}.lokr_w2_a"] @ t[f"{linear}.lokr_w2_b"]) * 2
    hada = (t[f"{conv}.hada_w1_a"] @ t[f"{conv}.hada_w1_b"]) * (
        t[f"{conv}.hada_w2_a"] @ t[f"{conv}.hada_w2_b"]
    )
    assert new.modules[conv].shape() == (8, 4, 3, 3)
    for name, wanted in ((conv, hada / 2), (linear, kron), (full, t[f"{full}.diff"])):
        assert error(change(new.modules[name]), wanted) < 1e-5, name


@pytest.mark.parametrize("naming", api.NAMINGS)
def test_every_naming_is_resized(naming: str) -> None:
    file = lora_file.read_lora(GOLDEN / "resize_input.safetensors")
    from loragraft.trainer.tools.convert import convert_naming, to_common

    named = convert_naming(file, naming)
    new, _ = resize.resize(named, api.ResizeSettings(8))
    wanted, _ = resize.resize(file, api.ResizeSettings(8))
    for name, module in to_common(new).modules.items():
        assert error(change(module), change(wanted.modules[name])) < 1e-5


# ---- what is no LoRA ----


def test_files_that_are_no_loras(tmp_path: Path) -> None:
    with Refusal("LG-TOOL-001", "first_stage"):
        lora_file.parse({"first_stage_model.x": torch.ones(2, 2)})
    with Refusal("LG-TOOL-001", "no tensors"):
        lora_file.parse({})
    with Refusal("LG-TOOL-002", "lora_unet_a"):
        lora_file.parse({"lora_unet_a.lora_down.weight": torch.ones(2, 3)})
    with Refusal("LG-TOOL-002", "lora_unet_a"):
        lora_file.parse(
            {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 4)}
        )
    dora = {
        "lora_unet_a.lora_down.weight": torch.ones(2, 3),
        "lora_unet_a.lora_up.weight": torch.ones(4, 2),
        "lora_unet_a.dora_scale": torch.ones(4, 1),
    }
    with Refusal("LG-TOOL-003", "DoRA"):
        resize.resize(lora_file.parse(dora), api.ResizeSettings(1))


def test_alphas_that_diffusers_declares_count() -> None:
    tensors = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 3),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(4, 2),
    }
    told = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 6}}
    (module,) = lora_file.parse(tensors, {"lora_adapter_metadata": json.dumps(told)}).modules.values()
    assert module.scale == 3
    (module,) = lora_file.parse(tensors, {"lora_adapter_metadata": "{"}).modules.values()
    assert module.scale == 1


# ---- LoRA with LoRA ----


def as_file(tensors: Tensors, name: str = "x", **metadata: str) -> lora_file.LoraFile:
    return lora_file.parse(tensors, metadata, name=name)


def test_adding_factors_equals_the_reference(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_b"])]
    new = merge.merge_loras(files, [0.7, -0.4], api.MergeSettings("add")).tensors()
    assert set(new) == set(golden["added"])
    for name, tensor in golden["added"].items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-6, atol=1e-7)


def test_concat_is_exact_and_has_the_references_ranks(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_c"])]
    new = merge.merge_loras(files, [0.7, -0.4], api.MergeSettings("concat"))
    theirs = as_file(golden["concat"])
    for name, module in new.modules.items():
        wanted = 0.7 * change(files[0].modules[name]) - 0.4 * change(files[1].modules[name])
        assert error(change(module), wanted) < 1e-6
        assert module.rank == theirs.modules[name].rank == 10


def test_svd_is_not_worse_than_the_reference(golden: dict[str, Any]) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_c"])]
    exact = merge.merge_loras(files, [0.7, 0.4], api.MergeSettings("concat"))
    new = merge.merge_loras(files, [0.7, 0.4], api.MergeSettings("svd", 5, 5))
    theirs = as_file(golden["svd"])
    for name, module in new.modules.items():
        wanted = change(exact.modules[name])
        mine, reference = (error(change(m), wanted) for m in (module, theirs.modules[name]))
        assert module.rank == theirs.modules[name].rank == 5
        assert mine <= reference + 1e-6
        # the reference cuts large values off as well, which the result is better without


def test_the_merged_file_tells_its_sources(golden: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "c.safetensors"]
    for path, name in zip(paths, ("lora_a", "lora_c"), strict=True):
        save_file(golden[name], path, {"ss_v2": "False", "ss_base_model_version": "sd_v1"})
    target = tmp_path / "m.safetensors"
    api.merge_lora(paths, [1, 0.5], api.Output(target), api.MergeSettings())
    told = read_metadata(target)
    assert told["ss_network_dim"] == "10" and told["ss_base_model_version"] == "sd_v1"
    assert json.loads(told["loragraft_merged"])["ratios"] == [1, 0.5]
    assert told["modelspec.merged_from"] == "a, c"


def test_loras_that_do_not_belong_together(golden: dict[str, Any]) -> None:
    a, c = as_file(golden["lora_a"]), as_file(golden["lora_c"])
    with Refusal("LG-TOOL-009", "different ranks"):
        merge.merge_loras([a, c], [1, 1], api.MergeSettings("add"))
    with Refusal("LG-TOOL-009", "sd_v2"):
        merge.merge_loras(
            [
                as_file(golden["lora_a"], ss_base_model_version="sd_v1"),
                as_file(golden["lora_b"], ss_base_model_version="sd_v2"),
            ],
            [1, 1],
            api.MergeSettings(),
        )
    other = {
        k: torch.ones(7, 9) if k.endswith("fc1.lora_down.weight") else v for k, v in golden["lora_a"].items()
    }
    other = {k: torch.ones(40, 7) if k.endswith("fc1.lora_up.weight") else v for k, v in other.items()}
    with Refusal("LG-TOOL-009", "fc1"):
        merge.merge_loras([a, as_file(other)], [1, 1], api.MergeSettings())


@pytest.mark.parametrize(
    ("ratios", "settings", "why"),
    [
        ([1], api.MergeSettings(), "2 LoRAs and 1 ratios"),
        ([1, float("nan")], api.MergeSettings(), "no number"),
        ([1, 1], api.MergeSettings("sum"), "none of"),
        ([1, 1], api.MergeSettings("svd"), "needs a rank"),
        ([1, 1], api.MergeSettings("concat", 4), "takes no rank"),
    ],
)
def test_impossible_ways_to_merge(
    golden: dict[str, Any], ratios: list[float], settings: api.MergeSettings, why: str
) -> None:
    files = [as_file(golden["lora_a"]), as_file(golden["lora_b"])]
    with Refusal("LG-TOOL-005", why):
        merge.merge_loras(files, ratios, settings)


# ---- into a checkpoint, and out of two ----

LDM = {
    "unet/mid_block.attentions.0": "model.diffusion_model.middle_block.1",
    "unet/mid_block.resnets.0.conv1": "model.diffusion_model.middle_block.0.in_layers.2",
    "text/": "cond_stage_model.transformer.",
}


def as_checkpoint(path: Path, weights: Tensors) -> Path:
    """Write the toy model's weights under single-file names, with a first convolution that marks a U-Net."""
    named = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 1, 1, 1)}
    for name, tensor in weights.items():
        old = next(prefix for prefix in LDM if name.startswith(prefix))
        named[LDM[old] + name[len(old) :]] = tensor
    save_file({k: v.contiguous() for k, v in named.items()}, path, {"modelspec.title": "toy", "format": "pt"})
    return path


def test_merging_into_a_checkpoint_equals_the_reference(golden: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = as_checkpoint(tmp_path / "base.safetensors", golden["base"])
    wanted = load_file(as_checkpoint(tmp_path / "wanted.safetensors", golden["merged"]))
    target = tmp_path / "merged.safetensors"
    loras = [(as_file(golden["lora_a"], "a"), 0.8), (as_file(golden["lora_c"], "c"), -0.5)]
    bake.merge_into_checkpoint(checkpoint, loras, target)
    found = load_file(target)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    told = read_metadata(target)
    assert told["modelspec.title"] == "toy" and told["modelspec.merged_from"] == "base, a, c"


def test_extracting_equals_the_reference(golden: dict[str, Any], tmp_path: Path) -> None:
    original = as_checkpoint(tmp_path / "a.safetensors", golden["base"])
    tuned = as_checkpoint(tmp_path / "b.safetensors", golden["tuned"])
    new, report = extract.extract_lora(original, tuned, api.ExtractSettings(4, 3))
    theirs = as_file(golden["extracted"])
    assert set(new.modules) == set(theirs.modules)
    for name, module in new.modules.items():
        assert (module.rank, module.alpha) == (theirs.modules[name].rank, theirs.modules[name].alpha)
        assert error(change(module), change(theirs.modules[name])) < 1e-4, name
    for told in report:
        exact = _difference(golden, told.name)
        assert told.error == pytest.approx(error(change(new.modules[told.name]), exact), rel=1e-4)
    unclamped, _ = extract.extract_lora(original, tuned, api.ExtractSettings(40, 40, 1.0))
    for name, module in unclamped.modules.items():
        assert error(change(module), _difference(golden, name)) < 1e-5


def _difference(golden: dict[str, Any], name: str) -> torch.Tensor:
    keys = {
        ("lora_unet_" if k.startswith("unet/") else "lora_te_") + k[5:-7].replace(".", "_"): k
        for k in golden["base"]
    }
    return (golden["tuned"][keys[name]] - golden["base"][keys[name]]).flatten(1)


def test_the_same_text_encoder_is_left_out_and_the_same_model_refused(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    original = as_checkpoint(tmp_path / "a.safetensors", golden["base"])
    weights = {k: golden["tuned" if k.startswith("unet/") else "base"][k] for k in golden["base"]}
    tuned = as_checkpoint(tmp_path / "b.safetensors", weights)
    output = api.Output(tmp_path / "x.safetensors")
    written = api.extract_lora_file(original, tuned, output, api.ExtractSettings())
    assert "text encoders are the same" in written.report
    assert all(name.startswith("lora_unet_") for name in load_file(output.path))
    with Refusal("LG-TOOL-012", "a.safetensors"):
        extract.extract_lora(original, original, api.ExtractSettings())
    odd = tmp_path / "odd.safetensors"
    save_file({"w": torch.ones(2)}, odd)
    with Refusal("LG-TOOL-013", "odd.safetensors"):
        extract.extract_lora(original, odd, api.ExtractSettings())
    for settings in (
        api.ExtractSettings(0),
        api.ExtractSettings(1, None, 0),
        api.ExtractSettings(1, None, 1, -1),
    ):
        with Refusal("LG-TOOL-005", "extracted"):
            extract.extract_lora(original, tuned, settings)


def test_a_merged_checkpoint_predicts_as_the_lora_does(
    base: api.Base, checkpoint: Path, tmp_path: Path
) -> None:
    lora = tiny_lora(base, tmp_path)
    target = tmp_path / "merged.safetensors"
    output = api.Output(target, "fp32")
    seen: list[tuple[int, int]] = []
    api.merge_checkpoint(checkpoint, [(lora, 0.8)], output, tell=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == len(load_file(checkpoint))
    from loragraft.trainer.tools.sample import merge_into_modules

    merged = api.open_base(target, tokenizer=Path(base.tokenizer_folders["clip"])).load()
    ours = base.load()
    merge_into_modules(base.family, ours, [(lora_file.read_lora(lora), 0.8)])
    plain = base.load()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    outs = []
    for parts in (merged, ours, plain):
        for module in (parts.denoiser, parts.text_encoder):
            module.float()
        with torch.no_grad():
            tokens = base.family.tokenize(parts, ["zibu"], Reading())
            (cond,) = base.family.encode_text(parts, tokens, Reading())
            outs.append(base.family.predict(parts, x, t, (cond,)))
    assert error(outs[0], outs[1]) < 1e-5
    assert error(outs[2], outs[1]) > 1e-2


def tiny_lora(base: api.Base, folder: Path) -> Path:
    """Write a LoRA with random tensors for every layer of the tiny model that is trained."""
    rng = torch.Generator().manual_seed(8)
    parts = base.load()
    tensors: dict[str, torch.Tensor] = {}
    for target in base.family.targets(parts, convolutions=True):
        root: Any = parts.denoiser if target.part == "denoiser" else parts.text_encoder
        out, fan_in, *kernel = root.get_submodule(target.path).weight.shape
        tensors[f"{target.key}.lora_down.weight"] = torch.randn(4, fan_in, *kernel, generator=rng) * 0.1
        tensors[f"{target.key}.lora_up.weight"] = (
            torch.randn(out, 4, *(1 for _ in kernel), generator=rng) * 0.1
        )
        tensors[f"{target.key}.alpha"] = torch.tensor(2.0)
    path = folder / "tiny_lora.safetensors"
    save_file(tensors, path, {"ss_clip_skip": "1"})
    return path


def test_checkpoints_that_cannot_take_a_lora(golden: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = as_checkpoint(tmp_path / "base.safetensors", golden["base"])
    file = as_file(golden["lora_a"], "a")
    target = tmp_path / "x.safetensors"
    with Refusal("LG-TOOL-010", "lora_unet_up"):
        tensors = {k.replace("_mid_block_", "_up_blocks_9_"): v for k, v in golden["lora_a"].items()}
        bake.merge_into_checkpoint(checkpoint, [(as_file(tensors), 1)], target)
    with Refusal("LG-TOOL-010", "another shape"):
        tensors = {k: v[:8] if k.endswith("to_q.lora_up.weight") else v for k, v in golden["lora_a"].items()}
        bake.merge_into_checkpoint(checkpoint, [(as_file(tensors), 1)], target)
    with Refusal("LG-TOOL-011", "too large"):
        small = {k: v.half() for k, v in golden["base"].items()}
        bake.merge_into_checkpoint(as_checkpoint(tmp_path / "h.safetensors", small), [(file, 1e6)], target)
    with Refusal("LG-TOOL-011", "float8"):
        packed = {k: v.to(torch.float8_e4m3fn) for k, v in golden["base"].items()}
        bake.merge_into_checkpoint(as_checkpoint(tmp_path / "8.safetensors", packed), [(file, 1)], target)
    assert not target.exists() and not list(tmp_path.glob("*.tmp*"))
    for loras, output, precision in (
        ([], target, "same"),
        ([(file, 0.0)], target, "same"),
        ([(file, 1.0)], target, "int8"),
    ):
        with Refusal("LG-TOOL-005", "cannot be merged"):
            bake.merge_into_checkpoint(checkpoint, loras, output, precision=precision)
    with Refusal("LG-TOOL-005", "replace the checkpoint"):
        bake.merge_into_checkpoint(checkpoint, [(file, 1)], checkpoint, overwrite=True)
    for path in (tmp_path / "none.safetensors", tmp_path / "x.ckpt"):
        with Refusal("LG-TOOL-008", path.name):
            stream.open_weights(path)


def test_a_dora_is_merged_by_its_lengths(golden: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = as_checkpoint(tmp_path / "base.safetensors", golden["base"])
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    lengths = torch.linspace(0.5, 2, 16)
    tensors = {k: v for k, v in golden["lora_a"].items() if k.startswith(name)} | {
        f"{name}.dora_scale": lengths[:, None]
    }
    bake.merge_into_checkpoint(checkpoint, [(as_file(tensors), 1.0)], tmp_path / "x.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "x.safetensors")[key].norm(dim=1), lengths)


def test_places_of_openclip_and_flux() -> None:
    d = 4
    sd2 = {
        "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight": torch.arange(3.0 * d * d).view(
            3 * d, d
        )
    }
    found = places.places_in(sd2)
    (weight,) = sd2.values()
    for third, letter in enumerate("qkv"):
        place = found[f"lora_te_text_model_encoder_layers_3_self_attn_{letter}_proj"]
        assert torch.equal(place.rows(weight), weight[third * d : third * d + d])
    flux = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.7.linear1.weight", "img_in.bias"]
    for prefix in ("", "model.diffusion_model."):
        assert (
            places.places_in([prefix + k for k in flux])["lora_unet_single_blocks_7_linear1"].key
            == prefix + flux[1]
        )


# ---- check ----


def test_what_a_check_says(base: api.Base, tmp_path: Path) -> None:
    path = tiny_lora(base, tmp_path)
    found = api.check_lora(path)
    assert found.good and found.zero == () and found.expected_zero == 0
    first = found.rows[0]
    tensor = load_file(path)[first.key]
    assert first.mean == pytest.approx(float(tensor.abs().mean()))
    assert first.minimum == float(tensor.abs().min()) and first.norm == pytest.approx(float(tensor.norm()))
    file = lora_file.read_lora(path)
    for name, norm in found.changes.items():
        assert norm == pytest.approx(float(change(file.modules[name]).norm()), rel=1e-4)

    tensors = load_file(path)
    last = [k for k in tensors if "encoder_layers_1_" in k and k.endswith("lora_up.weight")]
    untouched = {k: torch.zeros_like(v) if k in last else v for k, v in tensors.items()}
    save_file(untouched, path)
    assert len(last) == 6
    found = api.check_lora(path, clip_skip=2)
    assert found.good and found.zero == tuple(last) and "clip_skip 2" in found.remarks[1]
    assert not api.check_lora(path, clip_skip=1).good
    assert api.check_lora(path).expected_zero is None

    save_file({k: v * float("nan") if k == last[0] else v for k, v in tensors.items()}, path)
    found = api.check_lora(path, clip_skip=1)
    assert not found.good and found.not_finite == (last[0],)
    save_file({k: v * (0 if "lora_up" in k else 1) for k, v in tensors.items()}, path)
    assert "never trained" in api.check_lora(path, clip_skip=1).remarks[1]


def test_a_tiny_checkpoint_is_told_from_others(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "x.safetensors")
    keys = stream.open_weights(path)
    shapes = {key: tuple(keys[key].shape) for key in keys}
    plain = places.trained_in(keys, shapes, convolutions=False)
    more = places.trained_in(keys, shapes, convolutions=True)
    assert set(plain) < set(more)
    assert not any("_resnets_" in name or "samplers" in name for name in plain)
