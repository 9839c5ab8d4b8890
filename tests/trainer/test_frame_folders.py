"""A folder of videos: what pictures are called, what a second run leaves alone, and what cannot be read."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer.data.extract import extract_frames, plan_frames
from loragraft.trainer.data.frame_store import FILE
from loragraft.trainer.data.images import inspect
from loragraft.trainer.data.video_files import find_videos
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer.data_folders import Refusal, picture
from loragraft_tests.trainer.video_frames import ALL, seconds, write_trip
from loragraft_tests.trainer.videos import encode, scene


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the video of three scenes."""
    return write_trip(tmp_path_factory.mktemp("clips"))


# ---- a whole folder ----


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
