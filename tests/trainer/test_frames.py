"""Which frames become pictures, what tells them apart, and what they are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from loragraft.trainer.data.extract import extract_frames
from loragraft.trainer.data.frame_checks import SceneDetector, dhash, hamming, sharpness
from loragraft.trainer.data.frames import FrameSettings, check_settings, clock
from loragraft.trainer.data.images import load_upright
from loragraft.trainer.data.video_files import bases, frame_name
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture
from loragraft_tests.trainer.video_frames import ALL, seconds, stamps, write_trip
from loragraft_tests.trainer.videos import close, corners, encode, quarters, scene


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the video of three scenes."""
    return write_trip(tmp_path_factory.mktemp("clips"))


# ---- which frames ----


def test_every_n_frames(clip: Path, tmp_path: Path) -> None:
    dataset = extract_frames(clip, tmp_path, dataclasses.replace(ALL, every_n_frames=30))
    assert stamps(dataset) == seconds(0, 1, 2)
    assert [record.name for record in dataset.records] == [f"trip_{stamp}.png" for stamp in seconds(0, 1, 2)]


def test_thirty_is_the_default(clip: Path, tmp_path: Path) -> None:
    assert stamps(extract_frames(clip, tmp_path, FrameSettings(skip_blurred=False))) == seconds(0, 1, 2)


def test_counting_starts_at_start(clip: Path, tmp_path: Path) -> None:
    chosen = dataclasses.replace(ALL, every_n_frames=10, start=1.5, end=2.5)
    assert stamps(extract_frames(clip, tmp_path, chosen)) == seconds(1.5, 55 / 30, 65 / 30)


@pytest.mark.parametrize("every", [0.5, 0.7, 1.0])
def test_every_s_seconds_goes_by_the_files_times(tmp_path: Path, every: float) -> None:
    times = [0, 40, 80, 500, 540, 1390, 1400, 2100, 3600, 3610, 3640]  # a changing rate
    path = encode(tmp_path / "v.mp4", [scene(n) for n in range(len(times))], times_ms=times)
    chosen = dataclasses.replace(ALL, mode="every_n_seconds", every_n_seconds=every)
    expected, due = [], 0.0
    for time in times:
        if time / 1000 >= due - 1e-6:
            expected.append(time / 1000)
            while due <= time / 1000 + 1e-6:
                due += every
    assert stamps(extract_frames(path, tmp_path / "out", chosen)) == seconds(*expected)


def test_key_frames(clip: Path, tmp_path: Path) -> None:
    dataset = extract_frames(clip, tmp_path, dataclasses.replace(ALL, mode="key_frames"))
    assert stamps(dataset) == seconds(0, 25 / 30, 50 / 30, 75 / 30)


def test_scene_changes(clip: Path, tmp_path: Path) -> None:
    dataset = extract_frames(clip, tmp_path, dataclasses.replace(ALL, mode="scene_changes"))
    assert stamps(dataset) == seconds(0, 1, 70 / 30)


def test_a_maximum_is_said(clip: Path, tmp_path: Path) -> None:
    dataset = extract_frames(clip, tmp_path, dataclasses.replace(ALL, max_frames=5))
    assert len(dataset.records) == 5
    assert "stopped at max_frames at 0:00.167" in "\n".join(dataset.lines)
    exact = extract_frames(clip, tmp_path / "exact", dataclasses.replace(ALL, max_frames=90))
    assert len(exact.records) == 90 and "stopped" not in "\n".join(exact.lines)


def test_blurred_frames_are_skipped(tmp_path: Path) -> None:
    sharp = [Image.fromarray(scene(n, (640, 480))) for n in range(6)]
    soft = [image.filter(ImageFilter.GaussianBlur(20)) for image in sharp]
    frames = [np.asarray(image) for pair in zip(sharp, soft, strict=True) for image in pair]
    path = encode(tmp_path / "v.mp4", frames, rate=10)
    dataset = extract_frames(path, tmp_path / "out", FrameSettings(every_n_frames=1))
    assert stamps(dataset) == seconds(0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert "12 chosen, 6 blurred (sharpness" in "\n".join(dataset.lines)


def test_near_identical_frames_are_skipped_wherever_they_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def noisy(seed: int) -> np.ndarray:
        noise = rng.integers(-6, 7, (240, 320, 3))
        return (scene(seed, (320, 240), cells=40).astype(int) + noise).clip(0, 255).astype(np.uint8)

    path = encode(tmp_path / "v.mp4", [noisy(seed) for seed in (1, 1, 2, 2, 1, 3)], rate=10)
    dataset = extract_frames(path, tmp_path / "out", FrameSettings(every_n_frames=1))
    assert stamps(dataset) == seconds(0, 0.2, 0.5)
    assert "3 near-identical" in "\n".join(dataset.lines)


def test_nothing_kept_is_an_error_with_the_figures(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", [np.full((64, 96, 3), 90, np.uint8)] * 4)
    with Refusal("LG-DATA-043", "1 blurred (sharpness 0 < 30)", "min_sharpness"):
        extract_frames(path, tmp_path / "out")
    with Refusal("LG-DATA-043", "0 chosen"):
        extract_frames(path, tmp_path / "out2", dataclasses.replace(ALL, start=99))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "sometimes"),
        ("image_format", "bmp"),
        ("every_n_frames", 0),
        ("every_n_seconds", 0.0),
        ("scene_threshold", 2.0),
        ("start", -1.0),
        ("max_frames", -1),
        ("max_distance", 65),
        ("min_sharpness", float("nan")),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with Refusal("LG-CFG-003", f"'{name}'"):
        check_settings(dataclasses.replace(FrameSettings(), **{name: value}))


def test_an_end_before_the_start_is_refused() -> None:
    with Refusal("LG-CFG-003", "'end'"):
        check_settings(FrameSettings(start=3, end=2))


# ---- the measures ----


def test_sharpness_falls_with_blur_and_ignores_brightness() -> None:
    gray = np.asarray(picture((200, 120)).convert("L"))
    noise = np.random.default_rng(0).integers(0, 100, (120, 200)).astype(np.uint8)
    image = Image.fromarray(noise)
    values = [sharpness(np.asarray(image.filter(ImageFilter.GaussianBlur(r)))) for r in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[0] > 100 * values[-1]
    assert sharpness(noise + 100) == pytest.approx(sharpness(noise))
    assert sharpness(np.zeros((2, 50), np.uint8)) == 0 and sharpness(gray) < 5


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    gray = np.zeros((5, 5), np.uint8)
    gray[2, 2] = 10
    # The Laplacian of the inner 3 x 3: 10 beside the dot, -40 on it, 0 in the corners.
    assert sharpness(gray) == pytest.approx(np.var([0, 10, 0, 10, -40, 10, 0, 10, 0]))


def test_dhash_tells_pictures_apart_and_similar_ones_not() -> None:
    one, other = (np.asarray(Image.fromarray(scene(n, (320, 240))).convert("L")) for n in (1, 2))
    softer = np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(1)).resize((160, 120)))
    assert hamming(dhash(one), dhash(softer)) <= 6 < hamming(dhash(one), dhash(other))
    rising = np.tile(np.arange(90, dtype=np.uint8), (16, 1))
    assert dhash(rising) == 2**64 - 1 and dhash(rising[:, ::-1].copy()) == 0


def test_steady_motion_and_fades_begin_no_scene() -> None:
    wide = np.asarray(Image.fromarray(scene(5, (640, 36), cells=4)).convert("L"))
    moving = [wide[:, shift : shift + 64] for shift in range(0, 200, 2)]
    detector = SceneDetector(0.1)
    # A pattern that starts to move looks like a cut once, at the first step.
    assert sum(detector.is_new(frame) for frame in moving[:2]) <= 2
    assert not any(detector.is_new(frame) for frame in moving[2:])
    fading = [np.full((36, 64), value, np.uint8) for value in range(255, 0, -10)]
    detector = SceneDetector(0.1)
    assert [detector.is_new(frame) for frame in fading] == [True] + [False] * (len(fading) - 1)


def test_the_pictures_are_right(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", [quarters()] * 2, turned=90)
    for image_format in ("png", "jpg"):
        chosen = dataclasses.replace(ALL, max_frames=1, image_format=image_format)
        (record,) = extract_frames(path, tmp_path / image_format, chosen).records
        assert record.size == (96, 64) and record.path.suffix == f".{image_format}"
        assert close(corners(load_upright(record)), corners(Image.open(record.path)), by=0)
        with Image.open(record.path) as image:
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[image_format]


# ---- names ----


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0:00"), (61.5, "1:01.5"), (3600 + 62.345, "1:01:02.345"), (0.9999, "0:01")]
)
def test_clock(value: float, text: str) -> None:
    assert clock(value) == text


@settings(max_examples=cases(1000), deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=300), unique=True))
def test_bases_are_unique_and_fit_every_system(stems: list[str]) -> None:
    names = [f"a/{stem.replace('/', '-')}.mp4" for stem in stems]
    names = list(dict.fromkeys(names))
    given_names = bases(names)
    assert list(given_names) == names
    folded = [base.casefold() for base in given_names.values()]
    assert len(set(folded)) == len(names)
    for base in given_names.values():
        name = frame_name(base, 1e5, set(), "png").rsplit("/", 1)[1]
        assert len(name.encode()) <= 160 and not set('<>:"|?*\\') & set(name)


def test_equal_names_get_a_part_of_their_own() -> None:
    given_names = bases(["a.mp4", "A.mkv", "b/a.mp4", "x?.mp4", "x*.mp4"])
    assert given_names["a.mp4"] == "a" and given_names["b/a.mp4"] == "b/a"
    assert given_names["A.mkv"].startswith("A-") and given_names["x?.mp4"] == "x_"
    assert given_names["x*.mp4"].startswith("x_-")


def test_equal_times_get_numbers() -> None:
    taken: set[str] = set()
    names = [frame_name("v", 0.0001, taken, "png") for _ in range(3)]
    assert names == ["v_00h00m00s000.png", "v_00h00m00s000-2.png", "v_00h00m00s000-3.png"]


# ---- animated pictures ----


def animate(path: Path, frames: list[np.ndarray], durations: list[int], **options: Any) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    return path


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("avif", {"quality": 100})],
)
def test_animated_pictures_are_videos(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    frames = [quarters(), scene(1), scene(2), quarters()[:, ::-1]]
    animate(tmp_path / f"a.{suffix}", frames, [100, 300, 50, 70], **options)
    Image.fromarray(quarters()).save(tmp_path / f"still.{suffix}")
    dataset = extract_frames(tmp_path, tmp_path / "out", ALL)
    # GIF and PNG join what does not change, and no format may lose a frame's time.
    assert stamps(dataset) == seconds(0, 0.1, 0.4, 0.45)
    assert "Not looked at: 1 other file." in dataset.lines
    assert close(corners(load_upright(dataset.records[0])), corners(Image.fromarray(quarters())), by=6)
    part = extract_frames(tmp_path / f"a.{suffix}", tmp_path / "part", dataclasses.replace(ALL, start=0.2))
    assert stamps(part) == seconds(0.4, 0.45)


def test_transparent_animations_lie_on_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (8, 8), (255, 0, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    records = extract_frames(tmp_path / "a.webp", tmp_path / "out", ALL).records
    assert [load_upright(r).getpixel((4, 4)) for r in records] == [(255, 255, 255), (255, 0, 0)]


def test_a_damaged_animation_is_refused_or_cut(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.gif", [scene(n) for n in range(9)], [100] * 9)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    try:
        dataset = extract_frames(path, tmp_path / "out", ALL, on_bad="skip")
        assert 1 <= len(dataset.records) < 9
    except LoraGraftError as error:
        assert error.code == "LG-DATA-041"
    still = tmp_path / "still.gif"
    Image.fromarray(scene(1)).save(still)
    with Refusal("LG-DATA-041", "does not move"):
        extract_frames(still, tmp_path / "out2", ALL)
