"""The tensor cache: what changed has another key, and what is damaged is never returned."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loragraft.trainer import safefile
from loragraft.trainer.data import cache as cache_module
from loragraft.trainer.data.cache import TensorCache, key_of
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer.data_folders import Refusal

KEY = key_of(name="x")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, 8, 6, generator=generator),
        "half": torch.randn(3, 5, generator=generator).to(torch.float16),
        "brain": torch.randn(7, generator=generator).to(torch.bfloat16),
        "ids": torch.arange(11),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
    }


def equal(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor]) -> bool:
    return (
        a is not None
        and a.keys() == b.keys()
        and all(
            a[name].dtype == b[name].dtype
            and a[name].shape == b[name].shape
            and torch.equal(a[name], b[name])
            for name in b
        )
    )


# ---- keys ----

# All that an encoded image or caption depends on.
INGREDIENTS: dict[str, Any] = {
    "pixels": "sha of the file",
    "caption": "a, b",
    "bucket": (512, 512),
    "resized": (683, 512),
    "flip": False,
    "vae": "hash of weights",
    "text_encoder": "hash of weights",
    "dtype": "fp16",
    "max_token_length": 75,
    "clip_skip": 1,
    "mask": None,
    "scale": 0.18215,
}
CHANGED: dict[str, Any] = {
    "pixels": "sha of the filf",
    "caption": "a, b ",
    "bucket": (512, 576),
    "resized": (512, 683),
    "flip": True,
    "vae": "Hash of weights",
    "text_encoder": "",
    "dtype": "bf16",
    "max_token_length": 150,
    "clip_skip": 2,
    "mask": "a mask",
    "scale": 0.182150000000001,
}


def test_every_ingredient_is_in_the_key() -> None:
    base = key_of(**INGREDIENTS)
    keys = {base} | {key_of(**INGREDIENTS | {name: CHANGED[name]}) for name in INGREDIENTS}
    assert len(keys) == 13 == len(INGREDIENTS) + 1
    assert key_of(**dict(reversed(INGREDIENTS.items()))) == base, "order of names"
    assert key_of(**INGREDIENTS | {"bucket": [512, 512]}) == base, "list or tuple"
    assert len(base) == 64
    without = {name: value for name, value in INGREDIENTS.items() if name != "mask"}
    assert key_of(**without) != base


def test_the_codes_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = key_of(**INGREDIENTS)
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert key_of(**INGREDIENTS) != base


def test_values_of_different_types_differ() -> None:
    values: list[Any] = [1, 1.0, True, "1", None, "None", [1], [[1]], {"a": 1}, {"a": "1"}, "", [], {}]
    assert len({key_of(x=value) for value in values}) == len(values)
    assert key_of(a="b", c="d") != key_of(a="bc", d="")


@pytest.mark.parametrize("value", [Path("x"), torch.float32, {1: 2}, b"x", {1, 2}, [object()]])
def test_only_plain_values_make_a_key(value: Any) -> None:
    with pytest.raises(TypeError, match="cache key"):
        key_of(x=value)


# ---- the store ----


def test_what_is_put_is_got(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert equal(cache.get(KEY), tensors())
    assert equal(TensorCache(tmp_path / "cache").get(cache.key_of(name="x")), tensors())
    assert cache.get(key_of(name="y")) is None
    cache.put(KEY, tensors(1))
    assert equal(cache.get(KEY), tensors(1))
    assert cache.notes == []
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [f"{KEY}.safetensors"]
    with safe_open(files[0], "pt") as file:
        assert set(file.metadata()) == {"checksum", "key"}


def test_views_are_stored_as_they_look(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    base = torch.arange(24.0).reshape(4, 6)
    cache.put(KEY, {"t": base.T, "part": base[1:3, ::2], "grad": torch.ones(2, requires_grad=True)})
    assert equal(cache.get(KEY), {"t": base.T.contiguous(), "part": base[1:3, ::2], "grad": torch.ones(2)})


def damaged(data: bytes, number: int, rng: random.Random) -> bytes:
    """Return the file cut short, with flipped bits, with zeros in it, or with something appended."""
    kind = number % 4
    changed = bytearray(data)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        start = rng.randrange(len(data))
        changed[start : start + 64] = bytes(len(changed[start : start + 64]))
    else:
        changed += rng.randbytes(rng.randrange(1, 20))
    return bytes(changed)


@pytest.mark.parametrize("num_files", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_never_a_wrong_answer(tmp_path: Path, num_files: int) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())
    path = next(tmp_path.rglob("*.safetensors"))
    good, rng = path.read_bytes(), random.Random("damage")
    rebuilt = 0
    for number in range(num_files):
        path.write_bytes(damaged(good, number, rng))
        found = cache.get(KEY)
        assert found is None or equal(found, tensors()), number
        rebuilt += found is None
    assert rebuilt > 0.8 * num_files
    assert len(cache.notes) == rebuilt
    assert path.name in cache.notes[0] and "made anew" in cache.notes[0]
    cache.put(KEY, tensors())
    assert equal(cache.get(KEY), tensors())


def test_a_file_under_another_name_is_not_taken(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    other = key_of(name="y")
    for content in (tensors(), {}):
        cache.put(KEY, content)
        (tmp_path / other[:2]).mkdir(exist_ok=True)
        path = tmp_path / KEY[:2] / f"{KEY}.safetensors"
        path.replace(tmp_path / other[:2] / f"{other}.safetensors")
        assert cache.get(other) is None
    assert len(cache.notes) == 2


def test_a_file_without_checksum_is_not_taken(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    safefile.write_safetensors(tmp_path / KEY[:2] / f"{KEY}.safetensors", tensors())
    assert cache.get(KEY) is None
    assert len(cache.notes) == 1


def test_an_unreadable_entry_is_noted(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    (tmp_path / KEY[:2] / f"{KEY}.safetensors").mkdir(parents=True)
    assert cache.get(KEY) is None
    assert "cannot be read" in cache.notes[0]


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        cache = TensorCache(tmp_path)
        for turn in range(15):
            cache.put(KEY, tensors())
            if not equal(cache.get(KEY), tensors()):
                wrong.append(f"{number} {turn} {cache.notes}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((safefile.os, "fsync", full) if call == "fsync" else (safefile, "replace", full)))
        with Refusal("LG-DATA-011", "No space left", "the disk is full", "free some space"):
            cache.put(KEY, tensors(1))
    assert equal(cache.get(KEY), tensors()), "the old entry is still whole"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EINVAL, errno.ENOENT])
def test_another_error_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(safefile, "replace", fails)
    with pytest.raises(LoraGraftError) as caught:
        TensorCache(tmp_path).put(KEY, tensors())
    assert caught.value.code == "LG-DATA-011" and os.strerror(number) in caught.value.where
    assert caught.value.why == "nothing can be written there." and "space" not in caught.value.fix


def test_leftovers_of_a_killed_process_are_swept_after_a_day(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())
    old, young = (tmp_path / KEY[:2] / f"{KEY}.safetensors.tmp-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    day_ago = time.time() - cache_module.LEFTOVER_AFTER_S - 60
    os.utime(old, (day_ago, day_ago))
    TensorCache(tmp_path)
    assert not old.exists() and young.exists()
    assert equal(cache.get(KEY), tensors())
