"""Drawings and captions of the embedded demo: functions of a seed, and files within their limits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer.demo import creatures, draw
from loragraft.trainer.demo.make_dataset import FILES, write_dataset

DEMO = Path(draw.__file__).parent


def test_scene_is_a_function_of_its_seed() -> None:
    one, two = (draw.random_scene(np.random.default_rng(5), (56, 72)) for _ in range(2))
    assert one == two
    assert draw.draw_scene(one).tobytes() == draw.draw_scene(two).tobytes()
    assert draw.draw_scene(one).size == (72, 56)


def test_captions_name_everything_in_both_styles() -> None:
    scene = draw.Scene("circle", "red", "blue", "striped", "large", 0, 0)
    assert draw.tag_caption(scene) == "large red circle, striped, top left, blue background"
    sentence = "a large striped red circle at the top left on a blue background"
    assert draw.sentence_caption(scene) == sentence
    words = set(draw.caption_words())
    for form in range(2):
        assert set(draw.sentence_caption(scene, form).split()) <= words


def test_held_out_combinations_are_never_in_training() -> None:
    held, kept = set(draw.all_combos(True)), set(draw.all_combos(False))
    assert not held & kept
    assert len(held) >= 50
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = draw.random_scene(rng, combos=sorted(kept))
        assert (scene.shape, scene.color, scene.background) not in held
    # Every shape and every colour must still be met in training.
    assert {c[0] for c in kept} == set(draw.SHAPES)
    assert {c[1] for c in kept} == {c[2] for c in kept} == set(draw.COLORS)


def test_unknown_shape_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="circle"):
        draw.shape_mask("blob", (0, 0, 8, 8), (8, 8))


def test_creatures_differ_in_name_and_parts() -> None:
    seeds = (creatures.HERO_SEED, *creatures.OTHER_SEEDS, *creatures.MORE_SEEDS)
    cast = [creatures.creature(seed) for seed in seeds]
    assert len({who.name for who in cast}) == len(cast)
    assert len({(who.body, who.top, who.tones) for who in cast}) == len(cast)


def test_dataset_is_deterministic_and_mixed(tmp_path: Path) -> None:
    one, two = write_dataset(tmp_path / "a", 21), write_dataset(tmp_path / "b", 21)
    files = sorted(p.name for p in one.iterdir())
    assert files == sorted(p.name for p in two.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert one.name == f"4_{creatures.creature(21).name}"
    assert {f[2] for f in FILES} == {"png", "jpg", "webp"}


def test_committed_dataset_is_the_hero() -> None:
    name = creatures.creature(creatures.HERO_SEED).name
    folder = DEMO / "dataset" / f"4_{name}"
    images = sorted(p for p in folder.iterdir() if p.suffix in {".png", ".jpg", ".webp"})
    assert 12 <= len(images) <= 20
    sizes = set()
    for path in images:
        with Image.open(path) as image:
            sizes.add(image.size)
            assert all(64 <= side <= 128 for side in image.size)
        caption = path.with_suffix(".txt").read_text("utf-8").strip()
        assert caption.startswith(f"{name}, ")
        assert caption.endswith(" background")
    assert len(sizes) >= 6


def test_base_and_dataset_fit_in_16_mb() -> None:
    files = [p for part in ("base", "dataset") for p in (DEMO / part).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 16_000_000


def test_quality_meets_the_bar_and_belongs_to_the_file() -> None:
    facts = json.loads((DEMO / "base" / "quality.json").read_text("utf-8"))
    base = (DEMO / "base" / facts["file"]).read_bytes()
    assert hashlib.sha256(base).hexdigest() == facts["sha256"]
    held_out = facts["held_out"]
    assert held_out["prompts"] >= 200
    assert held_out["right_shape"] >= 0.9
    assert held_out["right_colors"] >= 0.9
    assert facts["checker_on_drawn"] >= 0.98
    assert facts["recogniser_on_drawn"] >= 0.98
