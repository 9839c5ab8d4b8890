"""Tensors made of pieces: what is a view, what is a copy, and that the way back gives the same values."""

from __future__ import annotations

import pytest
import torch

from loragraft.trainer.families.names.pieces import Piece, Pieced, share, stacked, swapped


def source() -> dict[str, torch.Tensor]:
    """Three matrices and a fused one."""
    return {
        "q": torch.arange(6.0).view(2, 3),
        "k": torch.arange(6.0, 12.0).view(2, 3),
        "qkv": torch.arange(18.0).view(6, 3),
        "b": torch.arange(4.0),
    }


def test_whole_tensors_and_slices_are_views() -> None:
    weights = source()
    made = Pieced(
        weights, {"a": "q", "b": Piece("q"), "rows": Piece("qkv", 2, 4), "t": Piece("q", transposed=True)}
    )
    assert made["a"] is weights["q"]
    for name in ("b", "t"):
        assert made[name].data_ptr() == weights["q"].data_ptr()
    assert made["rows"].data_ptr() == weights["qkv"][2:].data_ptr()
    assert torch.equal(made["rows"], weights["qkv"][2:4])
    assert torch.equal(made["t"], weights["q"].T)
    assert list(made) == ["a", "b", "rows", "t"]
    assert len(made) == 4


def test_several_pieces_are_stacked_in_their_order() -> None:
    weights = source()
    made = Pieced(weights, {"s": stacked("k", "q"), "one": (Piece("q"),)})
    assert torch.equal(made["s"], torch.cat([weights["k"], weights["q"]]))
    assert made["one"].data_ptr() == weights["q"].data_ptr()  # one piece stays a view


def test_shares_and_swapped_halves_find_the_way_back() -> None:
    weights = source()
    cut = Pieced(weights, {name: share(weights, "qkv", i, 3) for i, name in enumerate("qkv")})
    assert torch.equal(Pieced(cut, {"qkv": stacked(*"qkv")})["qkv"], weights["qkv"])
    once = Pieced(weights, {"b": swapped(weights, "b")})
    assert once["b"].tolist() == [2, 3, 0, 1]
    assert torch.equal(Pieced(once, {"b": swapped(once, "b")})["b"], weights["b"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_pieces_keep_narrow_dtypes(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in source().items()}
    made = Pieced(weights, {"s": stacked("q", "k"), "b": swapped(weights, "b")})
    assert made["s"].dtype == made["b"].dtype == dtype
    assert torch.equal(made["s"][2:].float(), weights["k"].float())


def test_a_missing_source_is_a_key_error_with_its_name() -> None:
    with pytest.raises(KeyError, match="gone"):
        Pieced(source(), {"a": Piece("gone", 0, 1)})["a"]
