"""Which frames become pictures, what they are called, and that a second run touches nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from loragraft.trainer.data.extract import extract_frames, plan_frames
from loragraft.trainer.data.frame_checks import SceneDetector, dhash, hamming, sharpness
from loragraft.trainer.data.frame_store import FILE
from loragraft.trainer.data.frames import FrameSettings, check_settings, clock
from loragraft.trainer.data.images import inspect, load_upright
from loragraft.trainer.data.video_files import bases, find_videos, frame_name
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture
from loragraft_tests.trainer.videos import close, corners, encode, quarters, scene

ALL = FrameSettings(every_n_frames=1, skip_blurred=False, skip_similar=False)


def stamps(dataset: Any) -> list[str]:
    """Return the times in the pictures' names."""
    return [record.path.stem.rsplit("_", 1)[1] for record in dataset.records]


def seconds(*values: float) -> list[str]:
    """Write times as names do."""
    return [frame_name("x", value, set(), "png")[2:-4] for value in values]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of 90 frames, 30 a second, in three scenes of 30, 40 and 20 frames that move."""
    frames = []
    for number, length in enumerate((30, 40, 20)):
        wide = scene(number, (192, 64))
        frames += [np.ascontiguousarray(wide[:, shift : shift + 96]) for shift in range(length)]
    return encode(tmp_path_factory.mktemp("clips") / "trip.mp4", frames, key_every=25)


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


# ---- names and folders ----


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


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    """Return a folder of three videos, a picture, a text, and nothing broken."""
    root = tmp_path / "videos"
    for name in ("a.mp4", "10_my cat/b.mov", "plain/c.dat"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip.read_bytes())
    picture().save(root / "cover.png")
    (root / "notes.txt").write_text("hello", "utf-8")
    return root


def test_a_whole_folder_at_once(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    dataset = extract_frames(
        folder, out, dataclasses.replace(ALL, every_n_frames=45), progress=lambda *step: seen.append(step)
    )
    found = {r.name: (r.concept, r.repeats, r.caption, r.caption_source) for r in dataset.records}
    assert found == {
        "10_my cat/b_00h00m00s000.png": ("my cat", 10, "my cat", "folder"),
        "10_my cat/b_00h00m01s500.png": ("my cat", 10, "my cat", "folder"),
        "a_00h00m00s000.png": ("", 1, "", ""),
        "a_00h00m01s500.png": ("", 1, "", ""),
        "plain/c_00h00m00s000.png": ("plain", 1, "plain", "folder"),
        "plain/c_00h00m01s500.png": ("plain", 1, "plain", "folder"),
    }
    assert dataset.lines[0] == "6 pictures of 3 videos; up to date already: 0."
    assert "Not looked at: 2 other files." in dataset.lines
    assert seen == sorted(seen) and seen[-1] == (3000, 3000) and len(seen) > 200
    for record in dataset.records:
        facts = inspect(record.path)
        assert (facts.size, facts.content_hash) == (record.size, record.content_hash)
    only = extract_frames(
        folder, tmp_path / "flat", ALL, recursive=False, class_tokens="zog", default_repeats=4
    )
    assert {(r.concept, r.repeats) for r in only.records} == {("zog", 4)} and len(only.records) == 90


def test_the_pictures_are_right(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", [quarters()] * 2, turned=90)
    for image_format in ("png", "jpg"):
        chosen = dataclasses.replace(ALL, max_frames=1, image_format=image_format)
        (record,) = extract_frames(path, tmp_path / image_format, chosen).records
        assert record.size == (96, 64) and record.path.suffix == f".{image_format}"
        assert close(corners(load_upright(record)), corners(Image.open(record.path)), by=0)
        with Image.open(record.path) as image:
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[image_format]


# ---- a second run ----


def contents(root: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_second_run_touches_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = extract_frames(folder, out, ALL)
    before = contents(out)
    second = extract_frames(folder, out, ALL)
    assert contents(out) == before
    assert second.records == first.records and "up to date already: 3" in second.lines[0]
    assert second.lines[1:] == first.lines[1:], "what was skipped is still said"


def test_one_changed_video_is_done_again_and_no_other(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_frames(folder, out, ALL)
    before = contents(out)
    encode(folder / "a.mp4", [scene(90 + n) for n in range(5)])
    dataset = extract_frames(folder, out, ALL)
    after = contents(out)
    assert {name for name in after if after[name] == before.get(name)} == {
        name for name in before if name.startswith(("10_", "plain"))
    }
    assert len([name for name in after if name.startswith("a_")]) == 5, "superseded pictures are gone"
    assert len(dataset.records) == 185 and "up to date already: 2" in dataset.lines[0]


def test_a_touched_or_moved_video_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_frames(folder, out, ALL)
    before = contents(out)
    os.utime(folder / "a.mp4", ns=(1, 1))
    extract_frames(folder.rename(tmp_path / "elsewhere"), out, ALL)
    assert contents(out) == before


def test_other_settings_replace_what_was_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_frames(folder, out, ALL)
    captioned = out / "a_00h00m00s033.txt"
    captioned.write_text("mine", "utf-8")
    before = contents(out)
    chosen = dataclasses.replace(ALL, every_n_frames=45)
    lines = plan_frames(folder, out, chosen)
    assert contents(out) == before, "a plan writes nothing"
    assert "a.mp4: to be read again; replaces or removes 89 pictures:" in lines
    assert "  a_00h00m00s067.png" in lines and "  a_00h00m00s033.png" not in lines
    dataset = extract_frames(folder, out, chosen)
    assert len(dataset.records) == 6
    kept = {name for name in contents(out) if name.startswith("a_")}
    assert kept == {f"a_{s}.png" for s in seconds(0, 0.033, 1.5)} | {captioned.name}
    assert contents(out)["a_00h00m00s000.png"] == before["a_00h00m00s000.png"], "the same picture stays"
    assert plan_frames(folder, out, chosen)[1].endswith("up to date, 2 pictures")


def test_pictures_changed_or_deleted_by_hand_stay_so(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = extract_frames(clip, out, dataclasses.replace(ALL, every_n_frames=10))
    gone, edited, captioned = (record.path for record in first.records[:3])
    gone.unlink()
    picture((40, 30)).save(edited)
    captioned.with_suffix(".txt").write_text("a cat", "utf-8")
    before = contents(out)
    dataset = extract_frames(clip, out, dataclasses.replace(ALL, every_n_frames=10))
    assert contents(out) == before
    assert [r.path for r in dataset.records] == [r.path for r in first.records[1:]]
    assert dataset.records[0].size == (30, 40)
    assert dataset.records[0].content_hash == inspect(edited).content_hash
    assert (dataset.records[1].caption, dataset.records[1].caption_source) == ("a cat", "txt")
    text = "\n".join(dataset.lines)
    assert f"Deleted by hand, and left out: 1 picture: {gone.name}" in text
    assert f"Changed by hand, and left so: 1 picture: {edited.name}" in text
    edited.write_bytes(b"nonsense")
    with Refusal("LG-DATA-047", edited.name):
        extract_frames(clip, out, dataclasses.replace(ALL, every_n_frames=10))


def test_files_of_others_are_never_replaced(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for stamp in seconds(0, 1):
        picture().save(out / f"trip_{stamp}.png")
    before = contents(out)
    with Refusal("LG-DATA-046", "2 files", "trip_00h00m00s000.png", "trip_00h00m01s000.png"):
        extract_frames(clip, out, dataclasses.replace(ALL, every_n_frames=30))
    assert contents(out) == before
    edited = tmp_path / "edited"
    dataset = extract_frames(clip, edited, dataclasses.replace(ALL, every_n_frames=30))
    picture().save(dataset.records[0].path)
    with Refusal("LG-DATA-046", "trip_00h00m00s000.png"):
        extract_frames(clip, edited, dataclasses.replace(ALL, every_n_frames=30, image_format="png", end=2))


def test_a_cancelled_run_leaves_nothing_half_done(folder: Path, tmp_path: Path) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(done: int, total: int) -> None:
        if done > 1500:
            raise Cancelled

    out = tmp_path / "out"
    with pytest.raises(Cancelled):
        extract_frames(folder, out, ALL, progress=cancel)
    assert {name.split("_0")[0] for name in contents(out)} == {"10_my cat/b", FILE}
    assert not [path for path in out.iterdir() if "tmp" in path.name]
    before = contents(out)
    dataset = extract_frames(folder, out, ALL)
    assert len(dataset.records) == 270 and "up to date already: 1" in dataset.lines[0]
    assert all(contents(out)[name] == before[name] for name in before if name != FILE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"version": 1', '"version": 7'),
        lambda text: text.replace("trip_00h", "../trip_00h"),
        lambda text: text.replace("trip_00h", "/etc/trip_00h"),
        lambda text: text.replace('"height": 64', '"height": "64"'),
        lambda text: "[" * 20000,
        lambda text: "\xff",
    ],
)
def test_a_damaged_list_is_refused(clip: Path, tmp_path: Path, damage: Any) -> None:
    extract_frames(clip, tmp_path, ALL)
    text = (tmp_path / FILE).read_text("utf-8")
    (tmp_path / FILE).write_bytes(damage(text).encode("latin-1"))
    with Refusal("LG-DATA-044", FILE):
        extract_frames(clip, tmp_path, ALL)


def test_the_list_names_no_absolute_path(clip: Path, tmp_path: Path) -> None:
    extract_frames(clip, tmp_path, ALL)
    text = (tmp_path / FILE).read_text("utf-8")
    assert str(tmp_path) not in text and str(clip.parent) not in text
    assert set(json.loads(text)) == {"version", "videos"}


# ---- what cannot be read ----


def test_all_unreadable_videos_are_listed_at_once(folder: Path, tmp_path: Path) -> None:
    (folder / "list.mp4").write_text("#EXTM3U\nhttp://192.0.2.1/x.ts\n", "utf-8")
    (folder / "old.avi").write_bytes(b"RIFF0000AVI ")
    (folder / "half.webm").write_bytes(b"\x1aE\xdf\xa3rest")
    (folder / "-5_x").mkdir()
    (folder / "-5_x/d.mp4").write_bytes((folder / "a.mp4").read_bytes())
    names = ("list.mp4 (a playlist", "old.avi (AVI", "half.webm (damaged", "asks for -5 repeats")
    out = tmp_path / "out"
    with Refusal("LG-DATA-041", "4 of 7", *names):
        extract_frames(folder, out, ALL)
    assert not out.exists()
    dataset = extract_frames(folder, out, ALL, on_bad="skip")
    assert len(dataset.records) == 270
    assert "Left out: list.mp4 (a playlist" in "\n".join(dataset.lines)
    assert any("cannot be read" in line for line in plan_frames(folder, out, ALL))


def test_damage_on_the_way_stops_or_keeps_what_came_before(folder: Path, tmp_path: Path) -> None:
    encode(folder / "z.mp4", [scene(n, (320, 240)) for n in range(90)], muxing={"movflags": "faststart"})
    data = (folder / "z.mp4").read_bytes()
    (folder / "z.mp4").write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    with Refusal("LG-DATA-045", "1 of 4", "z.mp4"):
        extract_frames(folder, out, ALL)
    assert not [name for name in contents(out) if name.startswith("z")]
    dataset = extract_frames(folder, out, ALL, on_bad="skip")
    assert "up to date already: 3" in dataset.lines[0]
    assert 10 < len([r for r in dataset.records if r.name.startswith("z")]) < 80
    again = extract_frames(folder, out, ALL, on_bad="skip")
    assert again.records == dataset.records


def test_no_video_at_all(tmp_path: Path) -> None:
    with Refusal("LG-DATA-040", "there is no such file or folder"):
        find_videos(tmp_path / "nowhere")
    with Refusal("LG-DATA-040", "it holds no file"):
        find_videos(tmp_path)
    picture().save(tmp_path / "a.png")
    with Refusal("LG-DATA-040", "it holds 1 other files"):
        find_videos(tmp_path)
    with Refusal("LG-DATA-041", "a.png"):
        extract_frames(tmp_path / "a.png", tmp_path / "out")
    (tmp_path / "clip.mp4").write_text("x", "utf-8")
    with Refusal("LG-DATA-040", "did you mean", "clip.mp4"):
        find_videos(tmp_path / "clp.mp4")
    for path in ("", "a\0b", "x" * 5000):
        with pytest.raises(LoraGraftError, match="LG-DATA-040"):
            find_videos(path)


def test_a_wrong_policy_is_refused(clip: Path, tmp_path: Path) -> None:
    with Refusal("LG-CFG-003", "on_bad"):
        extract_frames(clip, tmp_path, on_bad="ignore")


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
