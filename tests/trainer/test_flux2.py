"""FLUX.2 klein: what its transformer, texts and autoencoder compute, as diffusers and ComfyUI have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.flux2 import Flux2Klein, empirical_mu
from loragraft.trainer.families.modules.flux2_model import Flux2Transformer, flux2_config
from loragraft.trainer.families.names.flux2_keys import flux2_from_diffusers
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import comfy_peer, dit_checks, tiny_dits

LATENT = (16, 4, 3)
COMFYUI = "comfy.ldm.flux.model.Flux"
COMFYUI_ARGUMENTS = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": None,
    "context_in_dim": 3 * tiny_dits.KLEIN_TEXT,
    "hidden_size": 64,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return a tiny FLUX.2 klein."""
    return tiny_dits.klein_base(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def parts(base: api.Base) -> Parts:
    """Return its modules."""
    return base.load()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents, timesteps, and texts."""
    rng = torch.Generator().manual_seed(7)
    text = torch.randn((2, 12, 3 * tiny_dits.KLEIN_TEXT), generator=rng)
    return torch.randn((2, *LATENT), generator=rng), torch.tensor([123.4, 900.0]), text


# ---- the transformer ----


def test_the_velocity_is_diffusers(parts: Parts) -> None:
    from diffusers import Flux2KleinPipeline as Pipeline

    x, t, text = inputs()
    model = tiny_dits.random_klein()
    with torch.no_grad():
        theirs = model(
            hidden_states=Pipeline._pack_latents(x),
            timestep=t / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=Pipeline._prepare_text_ids(text),
            img_ids=Pipeline._prepare_latent_ids(x),
            return_dict=False,
        )[0]
    theirs = theirs.transpose(1, 2).reshape(x.shape)
    ours = Flux2Klein().predict(parts, x, t, (text,))
    dit_checks.check_near(ours, theirs)


@pytest.mark.comfy
def test_comfyui_computes_the_same_on_the_same_file(parts: Parts, tmp_path: Path) -> None:
    x, t, text = inputs()
    weights = {
        k.removesuffix(".scale") + ".weight"
        if k.endswith(".scale")
        else k: v  # so ComfyUI names what it read
        for k, v in dit_checks.below(tiny_dits.klein_weights()).items()
    }
    tensors = {"x": x, "timestep": t / 1000, "context": text}
    answer = comfy_peer.ask(
        tmp_path, COMFYUI, COMFYUI_ARGUMENTS, weights, tensors, [{name: name for name in tensors}]
    )
    ours = Flux2Klein().predict(parts, x, t, (text,))
    dit_checks.check_near(ours, answer.outputs[0])


# ---- texts and images ----


def test_texts_are_encoded_as_diffusers_pipeline_does(base: api.Base, parts: Parts) -> None:
    from diffusers import Flux2KleinPipeline

    tokenizer = parts.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    captions = ["a cat", "", "x" * 90]
    for length in (64, 160):
        theirs = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            tiny_dits.random_klein_text(), tokenizer, captions, max_sequence_length=length
        )
        (ours,) = dit_checks.conditioning(base, parts, captions, Reading(t5_length=length))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_long_prompt_is_read_to_its_end(parts: Parts) -> None:
    longer = Flux2Klein().reading_for(parts, ["x" * 600], Reading()).t5_length
    assert longer is not None and 600 < longer < 700
    assert Flux2Klein().reading_for(parts, ["x"], Reading()).t5_length == 512


def test_images_become_latents_as_diffusers_has_it(parts: Parts) -> None:
    from diffusers import Flux2KleinPipeline as Pipeline

    vae = tiny_dits.random_klein_vae()
    pixels = torch.rand((1, 3, 32, 64), generator=torch.Generator().manual_seed(2)) * 2 - 1
    family = Flux2Klein()
    moments = family.encode_images(parts, pixels)
    latents = family.latents(moments, torch.zeros_like(moments["mean"]))
    peer = type("Peer", (), {"vae": vae, "_patchify_latents": staticmethod(Pipeline._patchify_latents)})()
    with torch.no_grad():
        theirs = Pipeline._encode_vae_image(peer, pixels, None)
        mean = vae.bn.running_mean.view(1, -1, 1, 1)  # type: ignore[union-attr,operator]
        std = (vae.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()  # type: ignore[union-attr,operator]
        decoded = vae.decode(Pipeline._unpatchify_latents(theirs * std + mean)).sample  # type: ignore[operator]
    torch.testing.assert_close(latents, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.decode(parts, latents), decoded, atol=1e-5, rtol=1e-4)
    drawn = family.latents(moments, torch.ones_like(moments["mean"]))
    assert (drawn > latents).all()


def test_shapes_are_as_announced(base: api.Base) -> None:
    dit_checks.check_shapes(base)


def test_the_shift_of_sampling_is_diffusers() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens in (64, 1024, 4300, 4301, 9000):
        for steps in (4, 28, 50, 200):
            assert empirical_mu(tokens, steps) == pytest.approx(
                compute_empirical_mu(tokens, steps), rel=1e-12
            )
    sigmas = Flux2Klein().objective.sigmas_for(4, (512, 512))
    mu = torch.tensor(compute_empirical_mu(1024, 4)).exp()
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(sigmas[:4], mu * even / (1 + (mu - 1) * even))


# ---- names ----


def test_weights_are_shared_and_survive_the_way_there_and_back(base: api.Base) -> None:
    weights = tiny_dits.klein_weights()
    opened = api.open_base_from_weights(weights, name="x", tokenizers=base.tokenizer_folders)
    assert opened.family.name == "flux2"
    dit_checks.check_shared(opened, weights)
    again = Flux2Klein().join(Flux2Klein().split(weights))
    assert set(again) == set(weights)
    assert all(torch.equal(again[k], v) for k, v in weights.items())


def test_the_names_of_other_sources_are_read_too(base: api.Base) -> None:
    """ComfyUI holds norms as weights, Black Forest Labs two convolutions of the autoencoder elsewhere."""
    renames = {
        ".scale": ".weight",
        "vae.quant_conv.": "first_stage_model.encoder.quant_conv.",
        "vae.post_quant_conv.": "first_stage_model.decoder.post_quant_conv.",
        "vae.": "first_stage_model.",
        "qwen3_4b": "qwen3_8b",
    }
    held = {}
    for name, value in tiny_dits.klein_weights().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        held[name] = value
    held["first_stage_model.bn.num_batches_tracked"] = torch.tensor(3)
    opened = api.open_base_from_weights(held, name="x", tokenizers=base.tokenizer_folders)
    assert opened.weights_hash == base.weights_hash


def test_only_klein_is_taken_for_it() -> None:
    weights = tiny_dits.klein_weights()
    assert [name for name, family in FAMILIES.items() if family.detect(weights)] == ["flux2"]
    guided = {**weights, "model.diffusion_model.guidance_in.in_layer.weight": torch.ones(1)}
    assert not Flux2Klein().detect(guided)


def test_another_models_text_encoder_is_refused(base: api.Base) -> None:
    for text in (tiny_dits.random_klein_text(layers=20),):
        parts = tiny_dits.folder_parts(tiny_dits.random_klein(), tiny_dits.random_klein_vae(), text)
        weights = tiny_dits.single_file("flux2", parts)
        opened = api.open_base_from_weights(weights, name="x", tokenizers=base.tokenizer_folders)
        with pytest.raises(LoraGraftError) as caught:
            opened.load()
        assert caught.value.code == "LG-BASE-003" and "Qwen3 4B" in caught.value.fix


def test_an_older_diffusers_is_refused_with_the_remedy(
    base: api.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    def lacking(module: object, name: str) -> object:
        raise AttributeError(name)

    monkeypatch.delitem(diffusers.__dict__, "AutoencoderKLFlux2", raising=False)
    monkeypatch.setattr(type(diffusers), "__getattr__", lacking)
    monkeypatch.setattr(diffusers, "__version__", "0.35.2", raising=False)
    with pytest.raises(LoraGraftError) as caught:
        base.load()
    assert caught.value.code == "LG-BASE-010"
    assert "0.35.2" in caught.value.where and "diffusers>=0.36" in caught.value.fix


@pytest.mark.parametrize(
    ("width", "double", "single", "context"), [(3072, 5, 20, 7680), (4096, 8, 24, 12288)], ids=["4B", "9B"]
)
def test_the_released_models_shape_is_read_from_its_weights(
    width: int, double: int, single: int, context: int
) -> None:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=width // 128,
            joint_attention_dim=context,
            guidance_embeds=False,
        )
    read = dit_checks.check_shapes_are_read(theirs, flux2_from_diffusers, flux2_config, Flux2Transformer)
    sizes = {"width": width, "heads": width // 128, "inside": 3 * width, "channels": 128}
    assert read == {**sizes, "context": context, "double": double, "single": single}


@pytest.mark.comfy
def test_comfyui_knows_every_key_of_the_lora(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_comfyui_reads_the_lora(base, tmp_path, COMFYUI, COMFYUI_ARGUMENTS)


@pytest.mark.parametrize(("preset", "count"), [("", 20), ("attn-only", 12), ("everything", 29 + 12)])
def test_presets_name_sets_of_layers(parts: Parts, preset: str, count: int) -> None:
    assert len(Flux2Klein().targets(parts, convolutions=False, preset=preset)) == count


def test_a_diffusers_folder_is_the_same_base(base: api.Base, tmp_path: Path) -> None:
    parts = tiny_dits.folder_parts(
        tiny_dits.random_klein(), tiny_dits.random_klein_vae(), tiny_dits.random_klein_text()
    )
    dit_checks.check_folder(base, parts, tmp_path / "folder")


# ---- training and drawing ----


def test_gradients_reach_the_adapters_alone(base: api.Base) -> None:
    dit_checks.check_gradients(base, LATENT)


def test_images_are_drawn(base: api.Base) -> None:
    dit_checks.check_sampling(base)


def test_a_run_resumes_to_the_same_bytes(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_training(base, tmp_path)
