"""T5 as a text encoder: its shape and weights, its tokens and their mask, and fp16's range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.frozen import freeze
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.text import t5_text
from loragraft.trainer.families.text.tokenizers import load_tokenizer
from loragraft_tests.trainer import tiny_t5

CAPTIONS = ["a cat", "on the mat, with a very long tail"]
SHARED_TOKENIZER = Path(os.environ.get("LORAGRAFT_TOKENIZERS", "tokenizers")) / "t5"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the tiny T5 tokenizer."""
    return load_tokenizer(str(tiny_t5.write_t5_tokenizer(tmp_path_factory.mktemp("t5"))), "t5")


@pytest.fixture
def reference() -> Any:
    """Return transformers' own encoder."""
    return tiny_t5.random_t5()


def test_tokens_are_cut_and_padded_to_a_length_with_their_mask(tokenizer: Any) -> None:
    ids, mask = t5_text.t5_tokens(tokenizer, CAPTIONS, 12)
    assert ids.shape == mask.shape == (2, 12)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[0].tolist() == [*(tiny_t5.PIECES.index(c) for c in "▁a▁cat"), 1, 0, 0, 0, 0, 0]
    assert mask[0].tolist() == [1] * 7 + [0] * 5
    assert ids[1, -1] == 1, "what is cut still ends with the end token"
    assert bool(mask[1].all())
    assert t5_text.t5_longest(tokenizer, CAPTIONS) == len(CAPTIONS[1]) + 2


def test_it_computes_what_transformers_does(reference: Any) -> None:
    weights = tiny_t5.t5_file_weights(reference)
    encoder = t5_text.load_t5(weights, "Flux.1")
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    for given in (None, mask):
        expected = reference(input_ids=ids, attention_mask=given).last_hidden_state
        torch.testing.assert_close(t5_text.encode_t5(encoder, ids, given), expected, rtol=1e-6, atol=1e-6)


def test_the_weights_are_shared_and_frozen(reference: Any) -> None:
    weights = tiny_t5.t5_file_weights(reference)
    encoder: Any = t5_text.load_t5(weights, "Flux.1")
    at = {name: tensor.data_ptr() for name, tensor in encoder.state_dict().items()}
    assert at.pop(t5_text.EMBEDDING) == weights[t5_text.SHARED].data_ptr()
    assert at == {name: tensor.data_ptr() for name, tensor in weights.items()}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.encoder.embed_tokens is encoder.shared


def test_files_of_a_whole_t5_and_other_names_are_read(reference: Any) -> None:
    weights = tiny_t5.t5_file_weights(reference)
    embedding = weights.pop(t5_text.SHARED)
    whole = {**weights, t5_text.EMBEDDING: embedding, "decoder.final_layer_norm.weight": torch.ones(1)}
    read = t5_text.t5_weights({**whole, "lm_head.weight": torch.ones(1)})
    assert sorted(read) == sorted([*weights, t5_text.SHARED])
    assert read[t5_text.SHARED] is embedding
    other = torch.zeros(1)
    assert (
        t5_text.t5_weights({t5_text.SHARED: embedding, t5_text.EMBEDDING: other})[t5_text.SHARED] is embedding
    )
    assert len(t5_text.t5_weights({})) == 0


def test_an_incomplete_encoder_is_refused(reference: Any) -> None:
    weights = tiny_t5.t5_file_weights(reference)
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    with pytest.raises(LoraGraftError, match="LG-BASE-003") as caught:
        t5_text.load_t5(weights, "Flux.1")
    assert "block.1.layer.1.DenseReluDense.wo" in str(caught.value)
    with pytest.raises(LoraGraftError, match="LG-BASE-003"):
        t5_text.load_t5({"shared.weight": torch.ones(4, 4)}, "Flux.1")


def test_a_tokenizer_with_too_many_entries_is_refused(tokenizer: Any, reference: Any) -> None:
    t5_text.check_t5_tokenizer(tokenizer, reference)
    reference.shared = nn.Embedding(len(tokenizer) - 1, 4)
    with pytest.raises(LoraGraftError, match="LG-BASE-006"):
        t5_text.check_t5_tokenizer(tokenizer, reference)


def test_values_beyond_fp16_come_through(reference: Any) -> None:
    """T5-XXL's feed-forward layers reach more than 65504: in fp16 the others' share would be lost."""
    with torch.no_grad():
        for block in reference.encoder.block:
            layers = block.layer[-1].DenseReluDense
            for layer, factor in ((layers.wi_0, 30.0), (layers.wi_1, 30.0), (layers.wo, 200.0)):
                layer.weight *= factor
    ids = torch.randint(3, 90, (2, 9))
    exact = reference(input_ids=ids).last_hidden_state
    largest = []
    for block in reference.encoder.block:
        block.register_forward_hook(lambda m, a, out: largest.append(out[0].abs().max().item()))
    reference(input_ids=ids)
    assert max(largest) > 70000, "the test model is beyond fp16"
    weights = {k: v.half() for k, v in tiny_t5.t5_file_weights(reference).items()}
    encoder = t5_text.load_t5(weights, "Flux.1")
    freeze(encoder, torch.float16, None)
    states = t5_text.encode_t5(encoder, ids)
    assert states.dtype == torch.float16
    assert torch.nn.functional.cosine_similarity(states.float(), exact, dim=-1).min() > 0.999


def test_the_feed_forward_layer_is_exact_in_other_dtypes() -> None:
    layer = t5_text.GatedFeedForward(8, 16)
    x = torch.randn(2, 3, 8)
    gated = cast(torch.Tensor, nn.functional.gelu(layer.wi_0(x), approximate="tanh") * layer.wi_1(x))
    assert torch.equal(layer(x), layer.wo(gated))
    half = layer.half()(x.half())
    assert half.dtype == torch.float32


@pytest.mark.skipif(not SHARED_TOKENIZER.is_dir(), reason="no T5 tokenizer: set LORAGRAFT_TOKENIZERS")
def test_t5s_own_tokenizer_reads_as_the_reference_does() -> None:
    """The ids of google/t5-v1_1-xxl, as the reference trainer prints them."""
    tokenizer = load_tokenizer(str(SHARED_TOKENIZER), "t5")
    ids, mask = t5_text.t5_tokens(tokenizer, ["a photo of a zibu cat", ""], 12)
    assert ids[0].tolist() == [3, 9, 1202, 13, 3, 9, 3686, 3007, 1712, 1, 0, 0]
    assert mask[0].tolist() == [1] * 10 + [0] * 2
    assert ids[1].tolist() == [1] + [0] * 11
