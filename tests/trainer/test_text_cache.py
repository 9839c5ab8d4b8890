"""Varied captions with kept encodings: the same captions are drawn, as often, and are trained on alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.inputs import Inputs, texts
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

VARIED: list[dict[str, Any]] = [
    {"shuffle_caption": True, "keep_tokens": 1},
    {"caption_dropout_rate": 0.3, "caption_tag_dropout_rate": 0.3},
    {"enable_wildcard": True, "caption_prefix": "{red|blue|green} {cat|dog},"},
    {"token_warmup_step": 4, "token_warmup_min": 1, "caption_dropout_every_n_epochs": 2},
    {"caption_template": "a {caption}\nthe {caption}"},
]
OPTIONS: dict[str, Any] = {"network_train_unet_only": True, "max_train_steps": 7}


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Keep the captions of every micro-batch."""
    seen: list[list[str]] = []
    real = Inputs._text

    def watching(self: Inputs, captions: list[str]) -> Any:
        seen.append(captions)
        return real(self, captions)

    monkeypatch.setattr(Inputs, "_text", watching)
    return seen


@pytest.mark.parametrize("data", VARIED, ids=lambda d: next(iter(d)))
def test_kept_variants_are_those_that_are_drawn_without(
    training: runs.Training, images: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    varied = dataclasses.replace(training, train_set=runs.train_set(images, **data))
    seen = drawn(monkeypatch)
    plain = varied.events(gradient_accumulation_steps=2, **OPTIONS)
    without = [list(captions) for captions in seen]
    seen.clear()
    encoded = texts.Captions.encode
    at_steps: list[int] = []

    def counting(self: texts.Captions, *args: Any, grad: bool) -> tuple[torch.Tensor, ...]:
        at_steps.append(len(seen))
        return encoded(self, *args, grad=grad)

    monkeypatch.setattr(texts.Captions, "encode", counting)
    kept = varied.elsewhere("kept").events(
        gradient_accumulation_steps=2, cache_text_encoder_outputs=True, **OPTIONS
    )
    assert seen == without
    assert set(at_steps) == {0}, "all are encoded before the first is drawn"
    assert len(at_steps) == len({caption for captions in seen for caption in captions})
    assert len(set(map(tuple, without))) > 1
    assert runs.losses(kept) == pytest.approx(runs.losses(plain), rel=1e-5)
    (total,) = {e.total for e in runs.of(kept, api.Cached) if e.what == "captions"}
    assert total == len(at_steps)


def test_the_second_run_finds_them(training: runs.Training, images: Path) -> None:
    varied = dataclasses.replace(training, train_set=runs.train_set(images, shuffle_caption=True))
    first = varied.events(cache_text_encoder_outputs=True, **OPTIONS)
    again = varied.events(cache_text_encoder_outputs=True, output_name="again", **OPTIONS)
    assert [e.hits for e in runs.of(first, api.Cached) if e.what == "captions"][-1] == 0
    last = [e for e in runs.of(again, api.Cached) if e.what == "captions"][-1]
    assert last.hits == last.total > 4
    assert runs.losses(again) == runs.losses(first)


class Twice(SD15):
    """Reads captions otherwise with the same text encoder, as families of one T5 do."""

    name = "twice"

    def encode_text(self, *given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(2 * x for x in super().encode_text(*given))


def test_a_family_does_not_find_what_another_has_kept(training: runs.Training) -> None:
    training.finish(**OPTIONS)
    other = dataclasses.replace(training, base=dataclasses.replace(training.base, family=Twice()))
    found = [e.hits for e in runs.of(other.events(seed=1, **OPTIONS), api.Cached) if e.what == "captions"]
    assert found and not any(found)


def test_what_does_not_fit_into_memory_is_read_again(
    training: runs.Training, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied = dataclasses.replace(training, train_set=runs.train_set(images, shuffle_caption=True))
    held = varied.finish(cache_text_encoder_outputs=True, **OPTIONS)
    monkeypatch.setattr(texts, "IN_MEMORY", 0)
    read = varied.elsewhere("read").finish(cache_text_encoder_outputs=True, **OPTIONS)
    assert read.losses == held.losses


def test_a_full_disk_is_seen_before(
    training: runs.Training, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied = dataclasses.replace(training, train_set=runs.train_set(images, shuffle_caption=True))
    monkeypatch.setattr(texts, "SPARE_BYTES", 2**60)
    monkeypatch.setattr(texts, "LEAST_BYTES", 0)
    with Refusal("LG-DATA-011", "GiB", "cache_text_encoder_outputs"):
        varied.events(cache_text_encoder_outputs=True, **OPTIONS)


@pytest.mark.parametrize(
    "case", golden("captions"), ids=lambda c: f"{c['caption'][:12]} {list(c['options'])}"
)
def test_drawn_captions_have_the_references_outcomes(training: runs.Training, case: dict[str, Any]) -> None:
    """The captions of samples, whose encodings may be kept, come from the reference's set."""
    record = dataclasses.replace(training.train_set.records[0], caption=case["caption"])
    data = dataclasses.replace(training.train_set.configs[0], **case["options"])
    one = dataclasses.replace(training.train_set, records=(record,), configs=(data,))
    found = Counter(
        texts.draw_caption(one, 0, 42, case["step"], sample, case["epoch"] - 1, 1000) for sample in range(300)
    )
    assert set(found) == set(case["outcomes"])
    assert min(found.values()) > 300 / len(found) / 2


def test_runs_with_kept_variants_resume_bit_exactly(training: runs.Training, images: Path) -> None:
    varied = dataclasses.replace(
        training, train_set=runs.train_set(images, shuffle_caption=True, caption_dropout_rate=0.2)
    )
    options = {"cache_text_encoder_outputs": True, **OPTIONS}
    whole = varied.finish(**options)
    stopped = varied.elsewhere("stopped")
    stopped.stop_after(3, **options)
    assert stopped.finish(**options).lora_file.read_bytes() == whole.lora_file.read_bytes()
