"""SD3 and SD3.5: names and shapes at full size, what the modules compute, texts, the reference's steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import nn

from loragraft.trainer.adapters import network
from loragraft.trainer.engine.attention import restore_attention, use_attention
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.names import sd3_keys
from loragraft.trainer.families.sd3 import VERSIONS
from loragraft.trainer.families.text.t5_text import load_t5
from loragraft.trainer.families.text.tokenizers import load_tokenizer
from loragraft.trainer.objective.flow import PREDICTIONS, Flow, flow_weight
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import parity, tiny_sd3, tiny_t5
from loragraft_tests.trainer.data_folders import Refusal, golden
from loragraft_tests.trainer.sd3_models import own_transformer

GOLDEN = golden("sd3")
FULL: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "sd35_large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
    "sd35_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
    },
}
COMMON = {"sample_size": 128, "pos_embed_max_size": 192, "pooled_projection_dim": 2048}
NUM_TENSORS = {"sd3": 491, "sd35_large": 923, "sd35_medium": 665}  # as ComfyUI's model of this shape has
CAPTIONS = ["a cat", "on the mat, with a very long tail"]
UNUSED = "text_encoders.clip_l.transformer.text_projection.weight"  # SD3 takes the pooled state before it
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def full_transformer(version: str) -> nn.Module:
    """Return diffusers' model in full size, without weights."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model: nn.Module = SD3Transformer2DModel(**{**COMMON, **FULL[version]})
    return model


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the tiny tokenizers of the three encoders."""
    folders = tiny_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    clip, t5 = load_tokenizer(str(folders["clip"])), load_tokenizer(str(folders["t5"]), "t5")
    return {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}


@pytest.fixture(scope="module")
def modules() -> dict[str, dict[str, nn.Module]]:
    """Return diffusers' and transformers' tiny modules of each version."""
    return {version: tiny_sd3.random_modules(version) for version in VERSIONS}


def parts_of(
    modules: Mapping[str, nn.Module],
    tokenizers: dict[str, Any],
    version: str,
    *,
    without: tuple[str, ...] = (),
) -> Parts:
    """Load the family's parts from the modules' single file."""
    weights = tiny_sd3.single_file_weights({k: v for k, v in modules.items() if k not in without})
    family = FAMILIES[version]
    return family.load(family.split(weights), tokenizers)


# ---- names and shapes at full size ----


@pytest.mark.parametrize("version", VERSIONS)
def test_at_full_size_everything_is_read_from_the_weights_and_goes_both_ways(version: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    peer = full_transformer(version)
    weights = tiny_sd3.mmdit_weights(peer)
    assert len(weights) == NUM_TENSORS[version]
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in peer.state_dict().items()}
    model = own_transformer(weights)
    own = model.state_dict()
    config = cast(Any, model).config
    assert {k: config[k] for k in FULL[version]} == FULL[version]
    back = sd3_keys.to_authors(own)
    assert {k: own[v].shape for k, v in back.items()} == {k: v.shape for k, v in weights.items()}
    stacked = sd3_keys.from_diffusers(theirs)
    assert {k: v.shape for k, v in stacked.items()} == {k: v.shape for k, v in own.items()}
    assert FAMILIES[version].detect({sd3_keys.MMDIT_PREFIX + k: v for k, v in weights.items()})


@pytest.fixture(scope="module")
def full_texts() -> nn.ModuleDict:
    """Return the text encoders in full size, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    shapes = {"text_encoder": (768, 3072, 12), "text_encoder_2": (1280, 5120, 32)}
    with torch.device("meta"):
        found = {
            part: CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, projection_dim=width
                )
            )
            for part, (width, inner, layers) in shapes.items()
        }
        config = T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        t5 = tiny_t5.t5_file_weights(T5EncoderModel(config))
        found["text_encoder_3"] = load_t5(t5, "SD3")
    return nn.ModuleDict(found)


@pytest.mark.parametrize("case", GOLDEN["modules"])
def test_a_lora_has_exactly_the_references_modules(
    case: str, full_texts: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, version = GOLDEN["modules"][case], case.removesuffix("_default")
    everything = "emb_dims" in stored["network_args"]
    texts = full_texts if everything else nn.ModuleDict({k: full_texts[k] for k in ENCODERS[:2]})
    parts = Parts(
        own_transformer(tiny_sd3.mmdit_weights(full_transformer(version))), nn.Identity(), texts, {}
    )
    targets = FAMILIES[version].targets(parts, convolutions=False, preset="everything" if everything else "")
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.empty(shape, device="meta"))
    settings = network.Settings(stored["dim"], stored["alpha"], stored["dim"], stored["alpha"], seed=0)
    adapter = network.inject(parts, settings, targets)
    network.remove(parts, adapter)
    lines = [f"{m.target.key} {list(m.low.down.shape)} {list(m.low.up.shape)}" for m in adapter.modules]
    missing = [line for line in stored.get("lines", ()) if line not in lines]
    assert missing == []
    assert len(lines) == stored["count"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == stored["sha256"]


# ---- what the modules compute ----


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_the_model_computes_what_diffusers_does(
    version: str, backend: str, modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    parts = parts_of(modules[version], tokenizers, version)
    assert not any(t.is_meta for m in (parts.denoiser, parts.vae, parts.text_encoders) for t in tensors_in(m))
    x, hidden, pooled = torch.randn(2, 16, 8, 12), torch.randn(2, 20, 32), torch.randn(2, 24)
    t = torch.tensor([137.5, 811.0])
    expected = modules[version]["transformer"](x, hidden, pooled, t, return_dict=False)[0]
    installed = use_attention(parts.denoiser, backend)
    assert installed == ((3 if version == "sd35_medium" else 2), None)
    found = FAMILIES[version].predict(parts, x, t, (hidden, pooled))
    restore_attention(parts.denoiser)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0 if backend == "sdpa" else 2e-6)
    torch.testing.assert_close(found, FAMILIES[version].predict(parts, x, t, (hidden, pooled)))


def tensors_in(module: nn.Module) -> list[torch.Tensor]:
    """Return all parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_are_shared_and_come_back_as_they_were(
    version: str, modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, weights = FAMILIES[version], tiny_sd3.single_file_weights(modules[version])
    assert [name for name, each in FAMILIES.items() if each.detect(weights)] == [version]
    state_dicts = family.split(weights)
    joined = family.join(state_dicts)
    del weights[UNUSED]
    assert {k: v.data_ptr() for k, v in joined.items()} == {k: v.data_ptr() for k, v in weights.items()}
    parts = family.load(state_dicts, tokenizers)
    pointers = {v.data_ptr() for v in weights.values()}
    for module in (parts.denoiser, parts.vae, parts.text_encoders):
        assert all(p.data_ptr() in pointers and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_holds_the_same_model(version: str, modules: dict[str, dict[str, nn.Module]]) -> None:
    family = FAMILIES[version]
    single = family.split(tiny_sd3.single_file_weights(modules[version]))
    parts = {part: modules[version][folder].state_dict() for part, folder in family.folders.items()}
    folder = family.from_folder(parts)
    assert list(folder) == list(single)
    for part, sd in single.items():
        assert sorted(folder[part]) == sorted(sd)
        for name in sd:
            assert torch.equal(folder[part][name], sd[name]), name


def test_latents_are_shifted_and_scaled(
    modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, parts = FAMILIES["sd3"], parts_of(modules["sd3"], tokenizers, "sd3")
    pixels, noise = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 16, 4, 6)
    peer = cast(Any, modules["sd3"]["vae"])
    posterior = peer.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise - 0.0609) * 1.5305
    latents = family.latents(family.encode_images(parts, pixels), noise)
    torch.testing.assert_close(latents, expected)
    assert family.latent_shape(parts, 32, 48) == tuple(latents.shape[1:])
    unscaled = latents / 1.5305 + 0.0609
    torch.testing.assert_close(family.decode(parts, latents), peer.decode(unscaled).sample)
    with Refusal("LG-CFG-004", "256"):
        family.latent_shape(parts, 128, 272)


# ---- texts ----


def by_hand(
    modules: Mapping[str, nn.Module], tokenizers: dict[str, Any], mask_t5: bool
) -> list[torch.Tensor]:
    """Encode as the reference trainer does, which has all encoders."""
    hidden, pooled = [], []
    for part in ENCODERS[:2]:
        tokenizer = tokenizers[part]
        rows = tokenizer(CAPTIONS, max_length=77, padding="max_length", truncation=True).input_ids
        if part == "text_encoder_2":
            rows = [row[: row.index(tokenizer.eos_token_id) + 1] for row in rows]
            rows = [row + [0] * (77 - len(row)) for row in rows]
        out = modules[part](torch.tensor(rows), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    read = tokenizers["text_encoder_3"](
        CAPTIONS, max_length=256, padding="max_length", truncation=True, return_tensors="pt"
    )
    mask = read.attention_mask if mask_t5 else None
    t5 = modules["text_encoder_3"](read.input_ids, attention_mask=mask).last_hidden_state
    clip = torch.cat(hidden, dim=-1)
    clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return [torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)]


@pytest.mark.parametrize("mask", [False, True])
def test_the_conditioning_is_the_references(
    mask: bool, modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, parts = FAMILIES["sd3"], parts_of(modules["sd3"], tokenizers, "sd3")
    reading = Reading(mask_padding=mask)
    cond = family.encode_text(parts, family.tokenize(parts, CAPTIONS, reading), reading)
    for found, expected in zip(cond, by_hand(modules["sd3"], tokenizers, mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("without", "places"),
    [
        (("text_encoder",), 77 + 256),
        (("text_encoder_2",), 77 + 256),
        (("text_encoder_3",), 77),
        (("text_encoder", "text_encoder_2"), 256),
        (("text_encoder", "text_encoder_3"), 77),
    ],
)
def test_what_missing_encoders_leave(
    without: tuple[str, ...],
    places: int,
    modules: dict[str, dict[str, nn.Module]],
    tokenizers: dict[str, Any],
) -> None:
    """As in ComfyUI: zeros where the other CLIP is there, and no places at all where there is no state."""
    family = FAMILIES["sd3"]
    whole = parts_of(modules["sd3"], tokenizers, "sd3")
    parts = parts_of(modules["sd3"], tokenizers, "sd3", without=without)
    reading = Reading()
    expected, pooled = family.encode_text(whole, family.tokenize(whole, CAPTIONS, reading), reading)
    cond = family.encode_text(parts, family.tokenize(parts, CAPTIONS, reading), reading)
    if "text_encoder" in without:
        expected[:, :77, :8], pooled[:, :8] = 0, 0
    if "text_encoder_2" in without:
        expected[:, :77, 8:], pooled[:, 8:] = 0, 0
    has_clip, has_t5 = not {*ENCODERS[:2]} <= {*without}, "text_encoder_3" not in without
    expected = expected[:, 0 if has_clip else 77 : None if has_t5 else 77]
    torch.testing.assert_close(cond[0], expected)
    torch.testing.assert_close(cond[1], pooled)
    assert family.cond_shapes(parts, reading) == [tuple(x.shape[1:]) for x in cond] == [(places, 32), (24,)]


def test_long_captions_are_read_whole(
    modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, parts = FAMILIES["sd3"], parts_of(modules["sd3"], tokenizers, "sd3")
    long = ["x" * 100, "y" * 300]
    reading = family.reading_for(parts, long, Reading(t5_length=77))
    assert (reading.max_token_length, reading.t5_length) == (300, 302)
    tokens = family.tokenize(parts, long, reading)
    assert [tuple(x.shape) for x in tokens] == [(2, 4, 77), (2, 4, 77), (2, 302)]
    end, pad = tokenizers["text_encoder"].eos_token_id, 0
    assert tokens[0][0, 1, 26:].tolist() == [end] * 51
    assert tokens[1][0, 1, 26:].tolist() == [end] + [pad] * 50
    assert tokens[1][0, 0, -1] == end
    cond = family.encode_text(parts, tokens, reading)
    assert (
        family.cond_shapes(parts, reading)
        == [tuple(x.shape[1:]) for x in cond]
        == [(4 * 77 + 302, 32), (24,)]
    )
    short = Reading(t5_length=302)
    first = family.encode_text(parts, family.tokenize(parts, long, short), short)
    torch.testing.assert_close(cond[0][:, :77], first[0][:, :77])
    torch.testing.assert_close(cond[1], first[1])


# ---- refusals ----


def test_encoders_that_do_not_fit_are_refused(
    modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, own = FAMILIES["sd3"], modules["sd3"]
    with Refusal("LG-BASE-003", "all missing"):
        parts_of(own, tokenizers, "sd3", without=ENCODERS)
    swapped = {**own, "text_encoder": own["text_encoder_2"]}
    with Refusal("LG-BASE-003", "16 and 16", "24"):
        parts_of(swapped, tokenizers, "sd3")
    weights = tiny_sd3.single_file_weights(own)
    projection = "text_encoders.clip_g.transformer.text_projection.weight"
    with Refusal("LG-BASE-003", "text_projection"):
        family.load(family.split({k: v for k, v in weights.items() if k != projection}), tokenizers)
    wide = tiny_sd3.random_modules("sd3", joint_attention_dim=64)
    with Refusal("LG-BASE-003", "32", "64"):
        parts_of(wide, tokenizers, "sd3")


def test_unknown_and_missing_weights_are_refused(
    modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, weights = FAMILIES["sd3"], tiny_sd3.single_file_weights(modules["sd3"])
    name = "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
    with Refusal("LG-BASE-003", "missing", "transformer_blocks.1.ff.net.0.proj.weight"):
        family.load(family.split({k: v for k, v in weights.items() if k != name}), tokenizers)
    more = {"model.diffusion_model.context_processor.layers.0.attn.qkv.weight": torch.ones(1)}
    with Refusal("LG-BASE-003", "unknown", "context_processor"):
        family.load(family.split({**weights, **more}), tokenizers)
    positions = "model.diffusion_model.pos_embed"
    with Refusal("LG-BASE-003", "square"):
        family.load(family.split({**weights, positions: weights[positions][:, 1:]}), tokenizers)


def test_presets_of_u_nets_are_refused(
    modules: dict[str, dict[str, nn.Module]], tokenizers: dict[str, Any]
) -> None:
    family, parts = FAMILIES["sd35_medium"], parts_of(modules["sd35_medium"], tokenizers, "sd35_medium")
    for preset in ("ia3", "unet-convblock-only"):
        with Refusal("LG-CFG-004", preset):
            family.targets(parts, convolutions=False, preset=preset)
    attention = [t.path for t in family.targets(parts, convolutions=False, preset="attn-only")]
    assert "transformer_blocks.0.attn2.to_qkv" in attention
    assert not any("ff" in path or "mlp" in path or "norm" in path for path in attention)
    whole = family.targets(parts, convolutions=False, preset="everything")
    assert [t.key for t in whole if t.kind == "conv"] == ["lora_unet_x_embedder_proj"]
    assert {t.block for t in whole if t.path in ("proj_out", "context_embedder")} == {None}
    only = family.targets(parts, convolutions=False, preset="unet-only")
    assert {t.part for t in only} == {"denoiser"}
    assert {t.block for t in only} == {0, 1}


# ---- a step ----


def formula_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a frozen tensor of the stored steps."""
    if len(shape) > 1:
        return parity.base_weight(name, shape)
    return float(".ln_" in name) + parity.uniform(name, shape, 0.125)


@pytest.mark.parametrize("case", GOLDEN["steps"], ids=lambda case: f"{case['version']}-{case['scheme']}")
def test_loss_and_gradients_of_a_step_are_the_references(case: dict[str, Any]) -> None:
    """The reference compares images, x_s - s v with x, and weighs them: our "denoised"."""
    family, flow = FAMILIES[case["version"]], Flow()
    shapes = {k: tuple(v.shape) for k, v in tiny_sd3.mmdit_weights(transformer_of(case["version"])).items()}
    model = own_transformer({name: formula_weight(f"sd3/{name}", shape) for name, shape in shapes.items()})
    parts = Parts(model, nn.Identity(), nn.ModuleDict({}), {})
    adapter = network.inject(
        parts, network.Settings(4, 2.0, None, 1.0, 0), family.targets(parts, convolutions=False)
    )
    adapter.load_state_dict(
        {
            name: value if name.endswith("alpha") else parity.uniform(f"sd3/{name}", tuple(value.shape), 0.05)
            for name, value in adapter.state_dict().items()
        }
    )
    latents, noise = (
        parity.uniform("sd3/latents", (2, 16, 8, 12), 2.0),
        parity.uniform("sd3/noise", (2, 16, 8, 12), 1.7),
    )
    cond = parity.uniform("sd3/context", (2, 20, 32), 1.5), parity.uniform("sd3/pooled", (2, 24), 1.5)
    t = torch.tensor([137.0, 811.0])
    noisy = flow.add_noise(latents, noise, t)
    predicted, wanted = PREDICTIONS[family.defaults["model_prediction_type"]]
    out = predicted(family.predict(parts, noisy, t, cond), noisy, flow.level(t, noisy))
    each = (out - wanted(latents, noise)).square().mean(dim=(1, 2, 3))
    weight = flow_weight("none" if case["scheme"] == "uniform" else case["scheme"], t / 1000)
    each = each if weight is None else each * weight
    torch.testing.assert_close(each, torch.tensor(case["losses"]), rtol=1e-5, atol=0)
    each.mean().backward()
    found = {
        f"{m.target.key}.lora_{side}.weight": projections(f"{m.target.key}.lora_{side}.weight", p.grad)
        for m in adapter.modules
        for side, p in (("down", m.low.down), ("up", m.low.up))
    }
    assert sorted(found) == sorted(case["gradients"])
    for name, stored in case["gradients"].items():
        size = stored[0]
        assert found[name] == pytest.approx(stored, rel=1e-4, abs=1e-4 * size), name


def transformer_of(version: str) -> nn.Module:
    """Return the tiny model for its shapes."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model: nn.Module = SD3Transformer2DModel(**{**tiny_sd3.SHAPE, **tiny_sd3.VERSIONS[version]})
    return model


def projections(name: str, gradient: Any) -> list[float]:
    """Return a gradient's norm and two projections on signs."""
    flat = gradient.double().flatten()
    signs = (parity.uniform(f"{name}/sign{i}", (flat.numel(),)).double().sign() for i in (0, 1))
    return [flat.norm().item(), *((sign * flat).sum().item() for sign in signs)]
