"""Lumina 2: what its transformer, texts and autoencoder compute, as diffusers, ComfyUI and kohya have it."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.lumina2 import SYSTEM_PROMPT, Lumina2
from loragraft.trainer.families.modules.lumina2_model import Lumina2Transformer, lumina2_config
from loragraft.trainer.families.names.lumina2_keys import lumina2_from_diffusers
from loragraft.trainer.families.text.sentence_pieces import keep_pieces
from loragraft.trainer.families.text.tokenizers import load_tokenizer
from loragraft.trainer.objective.flow_times import Times, drawn_level
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import comfy_peer, dit_checks, tiny_dits

LATENT = (16, 8, 6)
FULL_SIZE = {
    "width": 2304,
    "heads": 24,
    "groups": 8,
    "inside": 9216,
    "channels": 64,
    "context": 2304,
    "time": 1024,
    "layers": 26,
    "refiners": 2,
}
COMFYUI = "comfy.ldm.lumina.model.NextDiT"
COMFYUI_ARGUMENTS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "ffn_dim_multiplier": 4.0,
    "qk_norm": True,
    "cap_feat_dim": tiny_dits.GEMMA_TEXT,
    "axes_dims": [8, 8, 8],
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return a tiny Lumina 2."""
    return tiny_dits.lumina_base(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def parts(base: api.Base) -> Parts:
    """Return its modules."""
    return base.load()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents, timesteps, and texts."""
    rng = torch.Generator().manual_seed(7)
    text = torch.randn((2, 12, tiny_dits.GEMMA_TEXT), generator=rng)
    return torch.randn((2, *LATENT), generator=rng), torch.tensor([123.4, 900.0]), text


# ---- the transformer ----


def test_padded_texts_of_a_batch_give_what_diffusers_gives_for_each_alone(parts: Parts) -> None:
    """The authors' clock runs from noise to image, and their velocity is image - noise."""
    x, t, text = inputs()
    model, lengths = tiny_dits.random_lumina(), (5, 12)
    seen = torch.arange(12) < torch.tensor(lengths)[:, None]
    ours = Lumina2().predict(parts, x, t, (text, seen.float()))
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        with torch.no_grad():
            theirs = -model(
                hidden_states=x[one],
                timestep=1 - t[one] / 1000,
                encoder_hidden_states=text[one, :length],
                encoder_attention_mask=torch.ones((1, length), dtype=torch.long),
                return_dict=False,
            )[0]
        dit_checks.check_near(ours[one], theirs)


@pytest.mark.comfy
def test_comfyui_computes_the_same_on_the_same_file(parts: Parts, tmp_path: Path) -> None:
    x, t, text = inputs()
    tensors = {"x": x, "timesteps": t / 1000, "context": text}
    answer = comfy_peer.ask(
        tmp_path,
        COMFYUI,
        COMFYUI_ARGUMENTS,
        dit_checks.below(tiny_dits.lumina_weights()),
        tensors,
        [{**{name: name for name in tensors}, "num_tokens": 12}],
    )
    ours = Lumina2().predict(parts, x, t, (text, torch.ones(2, 12)))
    dit_checks.check_near(ours, answer.outputs[0])


# ---- texts and images ----


def test_texts_are_encoded_as_diffusers_pipeline_does(base: api.Base, parts: Parts) -> None:
    from diffusers import Lumina2Pipeline

    captions = ["a cat", "some other words", "x" * 90]
    tokenizer = parts.tokenizer.__class__.from_pretrained(base.tokenizer_folders["gemma"])
    transformer: Any = None
    pipeline = Lumina2Pipeline.__new__(Lumina2Pipeline)
    pipeline.register_modules(
        text_encoder=tiny_dits.random_gemma(), tokenizer=tokenizer, transformer=transformer
    )
    tokenizer.padding_side = "right"
    system = SYSTEM_PROMPT.removesuffix(" <Prompt Start> ")
    text, mask, none, none_mask = pipeline.encode_prompt(
        captions,
        negative_prompt="",
        system_prompt=system,
        max_sequence_length=200,
        device=torch.device("cpu"),
    )
    ours, seen = dit_checks.conditioning(base, parts, captions, Reading(t5_length=200))
    torch.testing.assert_close(ours, text, atol=1e-6, rtol=1e-6)
    assert torch.equal(seen, mask.float())
    ours, seen = dit_checks.conditioning(base, parts, [""], Reading(t5_length=200))
    torch.testing.assert_close(ours, none[:1], atol=1e-6, rtol=1e-6)
    assert torch.equal(seen, none_mask[:1].float()) and seen.sum() == 1


def test_the_system_prompt_is_diffusers() -> None:
    import inspect

    from diffusers import Lumina2Pipeline

    source = inspect.getsource(Lumina2Pipeline.__init__)
    assert f'"{SYSTEM_PROMPT.removesuffix(" <Prompt Start> ")}"' in source


def test_gemmas_cap_on_the_logits_of_attention_counts(base: api.Base) -> None:
    """Only the plain implementation has it; other releases of transformers would choose one without."""
    parts = base.load()
    for layer in cast(Any, parts.text_encoder).layers:
        layer.self_attn.q_proj.weight.data = 100 * layer.self_attn.q_proj.weight.data
    capped = dit_checks.conditioning(base, parts, ["a cat"], Reading(t5_length=200))[0]
    for layer in cast(Any, parts.text_encoder).layers:
        layer.self_attn.attn_logit_softcapping = None
    free = dit_checks.conditioning(base, parts, ["a cat"], Reading(t5_length=200))[0]
    assert (capped - free).abs().max() > 1e-3


def test_a_caption_with_a_system_prompt_of_its_own_keeps_it(parts: Parts) -> None:
    tokens = [
        Lumina2().tokenize(parts, [text], Reading())[1].sum() for text in ("You draw. <Prompt Start> a", "a")
    ]
    assert tokens[0] == 1 + len("You draw. <Prompt Start> a") and tokens[1] == 1 + len(SYSTEM_PROMPT) + 1


def test_a_long_prompt_is_read_to_its_end(parts: Parts) -> None:
    longer = Lumina2().reading_for(parts, ["x" * 300], Reading()).t5_length
    assert longer is not None and longer % 64 == 0
    assert 0 <= longer - (1 + len(SYSTEM_PROMPT) + 300) < 64
    assert Lumina2().reading_for(parts, [""], Reading()).t5_length == 64


def test_images_become_latents_as_diffusers_has_it(parts: Parts) -> None:
    vae = tiny_dits.random_vae()
    pixels = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(2)) * 2 - 1
    moments = Lumina2().encode_images(parts, pixels)
    with torch.no_grad():
        theirs = (vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611  # type: ignore[operator]
        decoded = vae.decode(theirs / 0.3611 + 0.1159).sample  # type: ignore[operator]
    latents = Lumina2().latents(moments, torch.zeros_like(moments["mean"]))
    torch.testing.assert_close(latents, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(Lumina2().decode(parts, latents), decoded, atol=1e-5, rtol=1e-5)


def test_shapes_are_as_announced(base: api.Base) -> None:
    dit_checks.check_shapes(base)


# ---- names ----


def test_weights_are_shared_and_survive_the_way_there_and_back(base: api.Base) -> None:
    weights = tiny_dits.lumina_weights()
    unread = {"model.diffusion_model.norm_final.weight": torch.ones(96)}
    opened = api.open_base_from_weights({**weights, **unread}, name="x", tokenizers=base.tokenizer_folders)
    assert opened.family.name == "lumina2"
    dit_checks.check_shared(opened, weights)
    again = Lumina2().join(Lumina2().split(weights))
    assert set(again) == set(weights)
    assert all(torch.equal(again[k], v) for k, v in weights.items())


def test_the_names_agree_with_diffusers_own_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    weights = dit_checks.below(tiny_dits.lumina_weights())
    # it knows the split of query, key and value of the released width alone
    weights = {k: v for k, v in weights.items() if ".attention.qkv." not in k}
    theirs = convert_lumina2_to_diffusers(dict(weights))
    folder = tiny_dits.random_lumina().state_dict()
    assert {k for k in folder if not k.rpartition(".")[0].endswith((".to_q", ".to_k", ".to_v"))} == set(
        theirs
    )
    assert all(torch.equal(folder[k], v) for k, v in theirs.items())


def test_only_lumina_is_taken_for_it() -> None:
    weights = tiny_dits.lumina_weights()
    assert [name for name, family in FAMILIES.items() if family.detect(weights)] == ["lumina2"]
    assert not Lumina2().detect(
        {**weights, "model.diffusion_model.clip_text_pooled_proj.0.weight": torch.ones(1)}
    )


def test_the_released_models_shape_is_read_from_its_weights() -> None:
    from diffusers import Lumina2Transformer2DModel

    with torch.device("meta"):
        theirs = Lumina2Transformer2DModel(cap_feat_dim=2304)
    read = dit_checks.check_shapes_are_read(
        theirs, lumina2_from_diffusers, lumina2_config, Lumina2Transformer
    )
    assert read == FULL_SIZE


def test_the_lora_has_the_references_modules() -> None:
    with torch.device("meta"):
        denoiser = Lumina2Transformer(**FULL_SIZE)
    parts = Parts(denoiser, torch.nn.Module(), torch.nn.ModuleDict(), {})
    dit_checks.check_golden_modules("lumina2", parts, "lumina2_dim16")


@pytest.mark.comfy
def test_comfyui_knows_every_key_of_the_lora(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_comfyui_reads_the_lora(base, tmp_path, COMFYUI, COMFYUI_ARGUMENTS)


def test_a_diffusers_folder_is_the_same_base(base: api.Base, tmp_path: Path) -> None:
    parts = tiny_dits.folder_parts(
        tiny_dits.random_lumina(), tiny_dits.random_vae(), tiny_dits.random_gemma()
    )
    dit_checks.check_folder(base, parts, tmp_path / "folder")


def sentence_pieces(*, more: str = "") -> bytes:
    """Return a small SentencePiece model with Gemma's numbers of special tokens."""
    library = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    texts = ["a cat sits on a mat", "the dog and the cat", SYSTEM_PROMPT, more]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5),
        model_writer=stream,
        vocab_size=80,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return stream.getvalue()


def test_the_tokenizer_that_a_file_holds_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ComfyUI's files of Gemma 2; its folder stays, so that the base can be loaded again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    held = torch.frombuffer(bytearray(sentence_pieces()), dtype=torch.uint8)
    name = "text_encoders.gemma2_2b.transformer.spiece_model"
    file = tmp_path / "lumina.safetensors"
    save_file({**tiny_dits.lumina_weights(), name: held}, file)
    base = api.open_base(file)
    parts, again = base.load(), api.open_base(file)
    assert base.tokenizer_folders == again.tokenizer_folders
    assert base.tokenizer_folders["gemma"].startswith(str(tmp_path / "temporary"))
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_proto=bytes(held.numpy()))
    ids, mask = Lumina2().tokenize(parts, ["a dog", ""], Reading(t5_length=120))
    assert ids[0, : int(mask[0].sum())].tolist() == [2, *plain.encode(SYSTEM_PROMPT + "a dog")]
    assert ids[1].tolist() == [2] + [0] * 119 and mask[1].sum() == 1


def test_a_kept_tokenizer_that_was_changed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = keep_pieces(b"model")
    (folder / "tokenizer.model").write_bytes(b"other")
    assert keep_pieces(b"model") == folder
    assert (folder / "tokenizer.model").read_bytes() == b"model"
    assert keep_pieces(b"more") != folder


def test_without_the_package_a_tokenizer_model_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(LoraGraftError) as caught:
        load_tokenizer(str(tmp_path), "gemma")
    assert caught.value.code == "LG-BASE-007" and "pip install sentencepiece" in caught.value.fix


# ---- training and drawing ----


def test_gradients_reach_the_adapters_alone(base: api.Base) -> None:
    dit_checks.check_gradients(base, LATENT)


def test_images_are_drawn(base: api.Base) -> None:
    dit_checks.check_sampling(base)


def test_a_run_resumes_to_the_same_bytes(base: api.Base, tmp_path: Path) -> None:
    dit_checks.check_training(base, tmp_path)


# ---- noise levels ----


def test_noise_levels_are_drawn_by_the_images_size_as_the_reference_recommends() -> None:
    """Even numbers, moved by diffusers' own shift for Lumina 2: the reference trainer's nextdit_shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for side in (512, 1024):
        tokens = (side // 16) ** 2
        draws = torch.rand(1, generator=torch.Generator().manual_seed(4))
        expected = scheduler.time_shift(calculate_shift(tokens), 1.0, draws)
        ours = drawn_level(Times("nextdit_shift"), torch.Generator().manual_seed(4), tokens)
        torch.testing.assert_close(ours, expected)
