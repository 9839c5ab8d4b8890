"""Emphasis in captions: the reference's pieces, tokens and weights, and what training sees of them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer import api
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.text.clip_tokens import in_chunks
from loragraft.trainer.families.text.emphasis import emphasise, parse_emphasis
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import golden

REFERENCE = golden("emphasis")


@pytest.mark.parametrize("case", REFERENCE["pieces"], ids=lambda c: c["caption"])
def test_pieces_and_weights_equal_the_reference(case: dict[str, Any]) -> None:
    found = parse_emphasis(case["caption"]) or [("", 1.0)]
    assert [text for text, _ in found] == [text for text, _ in case["pieces"]]
    assert [w for _, w in found] == pytest.approx([w for _, w in case["pieces"]], rel=1e-12)


def test_what_is_no_number_is_text() -> None:
    """The reference stops with an error there."""
    assert parse_emphasis("(a:1.2.3) b") == [("a:1.2.3", 1.1), (" b", 1.0)]
    assert parse_emphasis("(a:) b") == [("a:", 1.1), (" b", 1.0)]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ()[]:\\.1-", max_size=30))
def test_no_letter_is_lost(caption: str) -> None:
    found = parse_emphasis(caption)
    letters = [c for c in caption if c in "ab "]
    assert [c for text, _ in found for c in text if c in "ab "] == letters
    assert all(a[1] != b[1] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    "case", REFERENCE["encoded"], ids=lambda c: f"{c['caption'][:9]} {c['max_token_length']}"
)
def test_tokens_and_weights_equal_the_reference(base: api.Base, case: dict[str, Any]) -> None:
    parts, length = base.load(), case["max_token_length"]
    ids, weights = base.family.tokenize(parts, [case["caption"]], Reading(length, weighted=True))
    assert ids[0].tolist() == case["ids"]
    assert weights[0].tolist() == pytest.approx(case["factor"], rel=1e-4)
    cond = torch.ones(1, length + 2, 3)
    assert torch.equal(emphasise(cond, weights, keep_mean=False), weights[..., None].expand(1, -1, 3))


def test_captions_without_emphasis_are_tokenized_as_ever(base: api.Base) -> None:
    parts = base.load()
    for caption in ("zibu, tag 1, blue", "", "a " * 100):
        for length in (75, 150):
            ids, weights = base.family.tokenize(parts, [caption], Reading(length, weighted=True))
            assert torch.equal(ids, base.family.tokenize(parts, [caption], Reading(length))[0])
            assert torch.equal(weights, torch.ones(1, length + 2))


@pytest.mark.parametrize("count", [0, 3, 74, 75, 76, 149, 150, 151])
def test_chunks_are_cut_as_the_library_pads_and_truncates(count: int) -> None:
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    ids, length = list(range(10, 10 + count)), 150
    whole = [1, *ids[:length], 2]
    whole += [2] * (length + 2 - len(whole))
    expected = [[1, *whole[i : i + 75], whole[-1]] for i in (1, 76)]
    assert in_chunks(tokenizer, ids, length).tolist() == expected


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, (0, 0)), (3, (3, 0)), (74, (74, 0)), (75, (75, 0)), (76, (75, 1)), (150, (75, 75))],
)
def test_chunks_with_openclips_padding_have_an_end_each(count: int, words: tuple[int, int]) -> None:
    """As the reference cuts them where end and padding are two tokens."""
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    ids = list(range(10, 10 + count))
    expected = [[1, *ids[i * 75 : i * 75 + own], 2, *[0] * (75 - own)] for i, own in enumerate(words)]
    assert in_chunks(tokenizer, ids, 150, 0).tolist() == expected


def test_the_mean_is_kept_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    cond, weights = torch.randn(2, 5, 4) + 0.5, torch.rand(2, 5) + 0.5
    kept = emphasise(cond, weights, keep_mean=True)
    torch.testing.assert_close(kept.mean(dim=(1, 2)), cond.mean(dim=(1, 2)))
    plain = emphasise(cond, weights, keep_mean=False)
    torch.testing.assert_close(kept / plain, (kept / plain)[:, :1, :1].expand_as(kept), rtol=1e-4, atol=1e-4)
    assert emphasise(cond.bfloat16(), weights, keep_mean=True).dtype == torch.bfloat16


@pytest.fixture
def weighted(training: runs.Training, tmp_path: Path) -> runs.Training:
    """Return runs on captions with emphasis."""
    folder = tiny.write_images(tmp_path / "weighted", [(32, 32)] * 3)
    for i, caption in enumerate(["(zibu:1.5), blue", "zibu, [blue]", "(zibu), \\(x\\)"]):
        (folder / f"image{i}.txt").write_text(caption, encoding="utf-8")
    return dataclasses.replace(training, train_set=runs.train_set(tmp_path / "weighted"))


@pytest.mark.parametrize("keep_mean", [False, True])
def test_kept_emphasis_equals_emphasis_at_each_step(weighted: runs.Training, keep_mean: bool) -> None:
    """An encoder that is trained at a rate near 0 is encoded at each step, one that is not is kept."""
    options = {"max_train_steps": 3, "weighted_captions": True, "weighted_captions_keep_mean": keep_mean}
    kept = runs.losses(weighted.events(network_train_unet_only=True, **options))
    each = runs.losses(weighted.elsewhere("each").events(text_encoder_lr=1e-12, **options))
    assert each == pytest.approx(kept, rel=1e-5)
    unweighted = {"max_train_steps": 3, "network_train_unet_only": True}
    assert runs.losses(weighted.elsewhere("plain").events(**unweighted)) != pytest.approx(kept, rel=1e-6)
