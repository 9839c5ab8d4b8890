"""Every network against LyCORIS: the same weights make the same change, under the same names and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.adapters import network
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.settings.presets import PRESETS
from loragraft_tests.trainer import networks, tiny
from loragraft_tests.trainer.networks import CASES, NORMS, TARGETS, Case

modules = pytest.importorskip("lycoris.modules", reason="LyCORIS is the reference: pip install lycoris-lora")

# Our names of networks and options -> the reference's.
CLASSES = {
    "lora": "LoConModule",
    "locon": "LoConModule",
    "loha": "LohaModule",
    "lokr": "LokrModule",
    "glora": "GLoRAModule",
    "oft": "DiagOFTModule",
    "boft": "ButterflyOFTModule",
    "ia3": "IA3Module",
    "full": "FullModule",
}
WITH_REFERENCE = [name for name, case in CASES.items() if case.algo in CLASSES]


def reference(case: Case, layer: nn.Module) -> Any:
    """Return LyCORIS' module on a layer."""
    options = dict(case.options)
    return getattr(modules, CLASSES[case.algo])(
        "x",
        layer,
        1.0,
        case.rank,
        case.alpha,
        use_tucker=options.pop("use_tucker", False),
        weight_decompose=options.pop("dora_wd", False),
        wd_on_out=options.pop("wd_on_output", False),
        bypass_mode=False,
        **options,
    )


def change_of(theirs: Any, layer: nn.Module) -> torch.Tensor:
    """Return W' - W as the reference's training forward has it."""
    weight = layer.weight.detach()
    if getattr(theirs, "wd", False):
        update = theirs.get_weight(theirs.shape) if hasattr(theirs, "get_weight") else None
        update = theirs.make_weight() * theirs.scale if update is None else update
        return theirs.apply_weight_decompose(weight + update) - weight
    if hasattr(theirs, "get_weight"):  # of loha and lokr, which get_diff_weight scales twice
        return theirs.get_weight(theirs.shape)
    return theirs.get_diff_weight()[0].view(weight.shape)


def with_weights(theirs: Any, ours: network.Adapted) -> None:
    """Give the reference's module our tensors, by their names."""
    own = dict(theirs.named_parameters())
    renamed = {"diff": "weight", "diff_b": "bias"} if type(theirs).__name__ == "FullModule" else {}
    found = {renamed.get(name, name): tensor for name, tensor in ours.tensors.items()}
    assert own.keys() == found.keys()
    for name, tensor in own.items():
        assert tensor.shape == found[name].shape, name
        tensor.data.copy_(found[name].detach())


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_same_weights_make_the_same_change(name: str) -> None:
    case = CASES[name]
    plain = networks.layers().denoiser
    _, adapter = networks.injected(case)
    networks.moved(adapter)
    for m in adapter.modules:
        layer = plain.get_submodule(m.target.path)
        theirs = reference(case, layer)
        with_weights(theirs, m)
        x = networks.input_of(m.target.path)
        ours = (m.module(x) - layer(x)).detach()
        with torch.no_grad():
            change = change_of(theirs, layer)
            bias = m.tensors.get("diff_b")
            geometry = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else ()
            product = nn.functional.conv2d if geometry else nn.functional.linear
            expected = product(x, change, bias, *geometry)
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in WITH_REFERENCE if CASES[n].algo != "ia3" and n != "lokr tucker"])
def test_files_have_the_references_names_and_shapes(name: str) -> None:
    case = CASES[name]
    plain = networks.layers().denoiser
    _, adapter = networks.injected(case)
    networks.moved(adapter)
    saved = adapter.saved()
    for target in TARGETS:
        layer = plain.get_submodule(target.path)
        theirs = reference(case, layer)
        theirs.is_diff = True
        state = theirs.custom_state_dict() or theirs.state_dict()
        expected = {f"{target.key}.{k}": tuple(v.shape) for k, v in state.items()}
        found = {k: tuple(v.shape) for k, v in saved.items() if k.startswith(f"{target.key}.")}
        assert found == expected


@pytest.mark.parametrize("name", ["lora", "lora rank-stabilised", "loha", "lokr", "lokr whole", "glora"])
def test_the_saved_alpha_is_the_references(name: str) -> None:
    case = CASES[name]
    _, adapter = networks.injected(case)
    for m in adapter.modules:
        theirs = reference(case, networks.layers().denoiser.get_submodule(m.target.path))
        ours = adapter.saved()[f"{m.target.key}.alpha"]
        assert float(ours) == pytest.approx(float(theirs.state_dict()["alpha"]))


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_tensors_start_as_the_references_do(name: str) -> None:
    """Zero where the reference's are zero, and elsewhere of the same spread."""
    case = CASES[name]
    torch.manual_seed(5)
    wide = nn.Linear(384, 512)
    theirs = reference(case, wide)
    parts = networks.layers()
    parts.denoiser.linear = wide.requires_grad_(False)
    (m,) = network.inject(parts, case.settings(), TARGETS[:1]).modules
    own = {k: v for k, v in theirs.named_parameters() if k not in ("weight", "bias") or case.algo == "ia3"}
    for key, tensor in own.items():
        ours, expected = m.tensors[key].detach(), tensor.detach()
        assert bool(ours.any()) == bool(expected.any()), key
        if ours.any() and ours.numel() > 200 and not torch.equal(ours, torch.ones_like(ours)):
            assert ours.std() == pytest.approx(expected.std().item(), rel=0.15), key
            assert ours.abs().max() == pytest.approx(expected.abs().max().item(), rel=0.5), key
    if "dora_wd" in dict(case.options):
        scale = m.tensors["dora_scale"].detach()
        torch.testing.assert_close(scale, theirs.dora_scale.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", NORMS, ids=lambda t: t.path)
def test_normalisation_layers_change_as_the_references(target: Any) -> None:
    plain = networks.layers().denoiser
    parts = networks.layers()
    (m,) = network.inject(parts, CASES["lora"].settings(), [target]).modules
    networks.moved(network.Adapter([m], m.module.rows))
    layer = plain.get_submodule(target.path)
    theirs = modules.NormModule("x", layer)
    assert {k: v.shape for k, v in theirs.named_parameters()} == {k: v.shape for k, v in m.tensors.items()}
    for key, tensor in theirs.named_parameters():
        tensor.data.copy_(m.tensors[key].detach())
    theirs.apply_to()
    x = networks.input_of(target.path)
    torch.testing.assert_close(m.module(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr both", "lokr tucker", "oft"])
def test_long_updates_are_shortened_as_in_the_reference(name: str) -> None:
    case = CASES[name]
    plain = networks.layers().denoiser
    for target in TARGETS:
        parts = networks.layers()
        (m,) = network.inject(parts, case.settings(), [target]).modules
        adapter = networks.moved(network.Adapter([m], m.module.rows), by=1.0)
        theirs = reference(case, plain.get_submodule(target.path))
        with_weights(theirs, m)
        before = {k: v.detach().clone() for k, v in m.tensors.items()}
        scaled, norm = theirs.apply_max_norm(0.5, torch.device("cpu"))
        adapter.limit_norms(0.5)
        lengths = adapter.lengths
        assert lengths is not None and bool(scaled) and lengths.scaled == 1
        assert lengths.mean == lengths.largest == pytest.approx(float(norm), rel=1e-4)
        after = theirs.custom_state_dict() or theirs.state_dict()
        for key, tensor in m.tensors.items():
            torch.testing.assert_close(tensor.detach(), after[key].detach(), rtol=1e-4, atol=1e-6)
        assert any(not torch.equal(before[k], v.detach()) for k, v in m.tensors.items())


OTHER_MODELS = ("TimestepEmbedding", "Block", "PatchEmbed")  # classes of theirs that diffusers' U-Net has too


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("ia3", "everything")])
def test_presets_are_the_references_sets_in_its_order(name: str, norms: bool) -> None:
    from lycoris.config import PRESET
    from lycoris.kohya import LycorisNetworkKohya

    unet, vae, text = tiny.random_modules()
    preset = dict(PRESET[name])
    preset["unet_target_module"] = [c for c in preset["unet_target_module"] if c not in OTHER_MODELS]
    if name == "attn-only":  # written for kohya's own U-Net, whose class of attention is called otherwise
        preset["unet_target_module"] = ["Attention"]
    LycorisNetworkKohya.apply_preset(preset)
    theirs = LycorisNetworkKohya(text, unet, 1.0, 4, 4, train_norm=norms, network_module="lora")
    expected = [m.lora_name for m in (*theirs.text_encoder_loras, *theirs.unet_loras)]
    large = PRESETS[name].convolutions
    found = SD15().targets(tiny.parts_of(unet, vae, text), convolutions=False, preset=name, norms=norms)
    ours = [t.key for t in found if large or t.kind != "conv"]
    assert [k.replace("text_model_", "") for k in ours] == [k.replace("text_model_", "") for k in expected]


def test_ia3_trains_keys_values_and_the_inputs_of_the_second_layer() -> None:
    """The paper's places, which LyCORIS' preset of this name lists too."""
    unet, vae, text = tiny.random_modules()
    found = SD15().targets(tiny.parts_of(unet, vae, text), convolutions=False, preset="ia3")
    endings = {t.path.rpartition(".")[2] for t in found}
    assert endings == {"to_k", "to_v", "2", "k_proj", "v_proj", "fc2"}
    modules = {name for name, m in (*unet.named_modules(), *text.named_modules()) if isinstance(m, nn.Linear)}
    wanted = {
        n for n in modules if n.endswith((".to_k", ".to_v", ".ff.net.2", ".k_proj", ".v_proj", ".mlp.fc2"))
    }
    assert {t.path for t in found} == wanted
