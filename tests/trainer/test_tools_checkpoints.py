"""LoRAs merged into a checkpoint and extracted from two, against the reference's own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.families.base import Reading
from loragraft.trainer.tools import bake, extract, lora_file, places, stream
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import Tensors, as_file, change, error, golden_tensors, tiny_lora


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    """Return the reference's tensors by what they are of."""
    return golden_tensors()


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
