"""Embeddings of words trained along: only their rows change, and files that webui and ComfyUI read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.adapters.files import read_metadata
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.text.words import add_words, word_rows
from loragraft.trainer.inputs.words import Words, _use
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

ONE: dict[str, Any] = {"train_embeddings": ["zibu=red*3"], "embedding_lr": 0.05, "max_train_steps": 4}


def embedding_file(finished: api.Finished, word: str = "zibu") -> Any:
    return finished.lora_file.with_name(f"{finished.lora_file.stem}-{word}.safetensors")


def first_rows(base: api.Base, text: str) -> torch.Tensor:
    return word_rows(base.load(), text)


# ---- tokens ----


def test_a_word_becomes_its_own_tokens_wherever_it_stands(base: api.Base) -> None:
    parts = base.load()
    plain = base.family.tokenize(parts, ["a , blue", "zibus blue"], Reading(75))[0]
    size = len(parts.tokenizer)
    parts.words["zibu"] = (size, size + 1)
    captions = ["a ZIBU, blue", "zibus blue", "zibu zibu", "(zibu:1.2)"]
    (ids,) = base.family.tokenize(parts, captions, Reading())
    assert [i for i in ids[0, 0].tolist() if i < size] == plain[0, 0].tolist()[: 77 - 2]
    assert torch.equal(ids[1], plain[1]), "part of another word is no placeholder"
    assert ids[2, 0, 1:5].tolist() == [size, size + 1, size, size + 1]
    ids, weights = base.family.tokenize(parts, ["a (zibu:1.2)"], Reading(75, weighted=True))
    assert weights[0].tolist() == pytest.approx([1, 1, 1.2, 1.2, *[1] * 73])
    assert ids[0, 0, 2:4].tolist() == [size, size + 1]


def test_words_that_are_cut_off_end_the_caption(base: api.Base) -> None:
    parts = base.load()
    size = len(parts.tokenizer)
    parts.words["zibu"] = tuple(range(size, size + 60))
    ids = base.family.tokenize(parts, ["zibu zibu"], Reading(75))[0][0, 0].tolist()
    assert ids == [size - 2, *range(size, size + 60), *range(size, size + 15), size - 1]


# ---- what is trained ----


def test_only_the_words_rows_change(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = Words.__init__

    def watching(self: Words, base: Any, parts: Any, *args: Any) -> None:
        real(self, base, parts, *args)
        seen.update(words=self, parts=parts, before={k: v.clone() for k, v in self.vectors.items()})
        state = parts.text_encoder.state_dict()
        seen["base"] = {k: v.clone() for k, v in state.items() if "rows" not in k and "lora" not in k}

    monkeypatch.setattr(Words, "__init__", watching)
    training.events(network_train_unet_only=True, **ONE)
    after = seen["parts"].text_encoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in seen["base"].items())
    rows = seen["words"].vectors["zibu"]
    assert rows.shape == (3, 64)
    changed = (rows.detach() - seen["before"]["zibu"]).abs().amax(dim=1)
    assert bool((changed > 1e-3).all())


def test_embeddings_begin_where_they_are_told(training: runs.Training) -> None:
    tiny_rate = {**ONE, "embedding_lr": 1e-8, "max_train_steps": 1}
    entries = ["zibu=red*5", "blue"]
    finished = training.finish(**{**tiny_rate, "train_embeddings": entries})
    red = first_rows(training.base, "red")
    found = load_file(embedding_file(finished))["emb_params"]
    torch.testing.assert_close(found, red[torch.arange(5) % len(red)], rtol=0, atol=1e-6)
    everything = first_rows(training.base, "")
    drawn = load_file(embedding_file(finished, "blue"))["emb_params"]
    assert drawn.shape == (1, 64)
    assert 0.5 < drawn.std() / everything.std() < 1.5
    as_many = training.elsewhere("as many").finish(**{**tiny_rate, "train_embeddings": ["zibu=red"]})
    assert load_file(embedding_file(as_many))["emb_params"].shape == red.shape


def test_a_words_gradient_is_that_of_its_place(base: api.Base) -> None:
    """The encoder with further rows gives what it gives with these rows in its own table."""
    parts, plain = base.load(), base.load()
    for each in (parts, plain):
        each.text_encoder.float()
    rows = torch.nn.Parameter(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    add_words(parts, {"zibu": rows})
    ids = base.family.tokenize(parts, ["a zibu b"], Reading(75))[0]
    cond = base.family.encode_text(parts, (ids,), Reading(clip_skip=1))[0]
    body = getattr(plain.text_encoder, "text_model", plain.text_encoder)
    whole = torch.cat([body.embeddings.token_embedding.weight.detach(), rows.detach()])
    body.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(whole, freeze=False)
    table = body.embeddings.token_embedding.weight
    expected = base.family.encode_text(plain, (ids,), Reading(clip_skip=1))[0]
    assert torch.equal(cond, expected)
    cond.square().sum().backward()
    expected.square().sum().backward()
    assert rows.grad is not None
    assert table.grad is not None
    torch.testing.assert_close(rows.grad, table.grad[-2:])


def test_words_teach_more_than_none(training: runs.Training) -> None:
    """With the same draws, a trained embedding lowers the loss that the LoRA alone reaches."""
    options = {"max_train_steps": 12, "network_train_unet_only": True, "unet_lr": 1e-6}
    without = runs.losses(training.events(**options))
    words = {"train_embeddings": ["zibu=zibu"], "embedding_lr": 0.05}
    with_words = runs.losses(training.elsewhere("words").events(**options, **words))
    assert with_words[0] == pytest.approx(without[0], rel=1e-5), "it begins at the word's own tokens"
    assert sum(with_words[6:]) < sum(without[6:])


# ---- files ----


def test_the_way_to_use_it_is_one_that_comfyui_reads() -> None:
    assert _use("mine-zibu") == ", where a prompt calls it embedding:mine-zibu"
    renamed = _use("my old<lora-zibu")
    assert renamed == " as my_old_lora-zibu.safetensors, where a prompt calls it embedding:my_old_lora-zibu"


def test_embeddings_have_a_folder_of_their_own_where_there_is_one(training: runs.Training) -> None:
    places = dataclasses.replace(training.places, embeddings=training.places.runs.parent / "words")
    finished = dataclasses.replace(training, places=places).finish(
        output_name="mine", publish_checkpoints=True, save_every_n_steps=2, **ONE
    )
    assert not list(finished.lora_file.parent.glob("*zibu*"))
    found = sorted(file.name for file in (places.runs.parent / "words").iterdir())
    assert found == ["mine-step00000002-zibu.safetensors", "mine-zibu.safetensors"]


def test_the_file_is_what_comfyui_and_webui_read(training: runs.Training) -> None:
    finished = training.finish(output_name="mine", **ONE)
    file = embedding_file(finished)
    assert file.name == "mine-zibu.safetensors"
    tensors = load_file(file)
    assert list(tensors) == ["emb_params"]
    assert tensors["emb_params"].dtype == torch.float32
    assert tensors["emb_params"].shape == (3, 64)
    texts = read_metadata(file)
    assert texts["loragraft_run"] == read_metadata(finished.lora_file)["loragraft_run"]
    lines = runs.only(training.elsewhere("b").events(**ONE), api.Planned).lines
    assert any("embedding:x-zibu" in line for line in lines)
    assert any("eager steps" in line and "embeddings of words" in line for line in lines)


def test_a_file_of_others_is_left(training: runs.Training) -> None:
    training.places.loras.mkdir(parents=True)
    theirs = training.places.loras / "x-zibu.safetensors"
    theirs.write_bytes(b"theirs")
    finished = training.finish(**ONE)
    assert theirs.read_bytes() == b"theirs"
    assert finished.lora_file.with_name("x-zibu_2.safetensors").exists()


def test_resuming_gives_the_same_bytes(training: runs.Training) -> None:
    whole = training.finish(**ONE)
    stopped = training.elsewhere("stopped")
    stopped.stop_after(2, **ONE)
    again = stopped.finish(**ONE)
    assert again.losses == whole.losses
    assert again.lora_file.read_bytes() == whole.lora_file.read_bytes()
    assert embedding_file(again).read_bytes() == embedding_file(whole).read_bytes()
    embedding_file(again).unlink()
    assert embedding_file(stopped.finish(**ONE)).read_bytes() == embedding_file(whole).read_bytes()


# ---- refusals ----


def test_a_word_that_no_caption_has_is_refused(training: runs.Training) -> None:
    with Refusal("LG-CFG-004", "zobi", "caption_prefix"):
        training.events(train_embeddings=["zobi"], max_train_steps=1)


def test_fused_steps_are_refused(training: runs.Training) -> None:
    with Refusal("LG-RUN-008", "embeddings"):
        training.events(engine="fused", **ONE)


def test_runs_side_by_side_are_refused(training: runs.Training) -> None:
    jobs = [runs.settings(output_name=name, **ONE) for name in "ab"]
    events = api.train_together(
        training.base, [(training.train_set, job) for job in jobs], places=training.places, device="cpu"
    )
    with Refusal("LG-RUN-010", "train_embeddings"):
        list(events)


def test_validation_and_samples_know_the_words(training: runs.Training, images: Any) -> None:
    kept_out = runs.train_set(images, validation_split=0.25)
    events = dataclasses.replace(training, train_set=kept_out).events(
        sample_prompts=["zibu"], sample_every_n_steps=2, **ONE
    )
    assert len(runs.of(events, api.Sampled)) == 2
    assert not runs.of(events, api.Note)
