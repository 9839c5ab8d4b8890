"""Videos that the tests encode: turned, stretched, in every colour range, or no video at all."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from loragraft.trainer.data import video as video_module
from loragraft.trainer.data.video import UnreadableVideoError, container_of, load_av, open_video
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.videos import (
    BLUE,
    GREEN,
    QUARTERS,
    RED,
    WHITE,
    close,
    corners,
    encode,
    quarters,
    scene,
)


def first(path: Path) -> Image.Image:
    with open_video(path) as opened:
        return opened.picture(next(opened.frames()))


# ---- how it is shown ----

# Degrees that a player turns it counter-clockwise -> the corners as they are seen.
TURNS = {
    0: (RED, GREEN, BLUE, WHITE),
    90: (GREEN, WHITE, RED, BLUE),
    180: (WHITE, BLUE, GREEN, RED),
    -90: (BLUE, RED, WHITE, GREEN),
}


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("turned", TURNS)
def test_a_turned_video_is_brought_upright(tmp_path: Path, turned: int, suffix: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", [quarters()] * 2, turned=turned)
    image = first(path)
    assert image.size == ((64, 96) if abs(turned) == 90 else (96, 64))
    assert close(corners(image), TURNS[turned])
    with open_video(path) as opened:
        assert opened.facts.size == image.size[::-1]


MIRRORS = {
    "left to right": ((-1, 0, 0, 1), (GREEN, RED, WHITE, BLUE)),
    "top to bottom": ((1, 0, 0, -1), (BLUE, WHITE, RED, GREEN)),
    "main diagonal": ((0, 1, 1, 0), (RED, BLUE, GREEN, WHITE)),
    "other diagonal": ((0, -1, -1, 0), (WHITE, GREEN, BLUE, RED)),
}


@pytest.mark.parametrize("kind", MIRRORS)
def test_a_mirrored_video_is_mirrored_back(tmp_path: Path, kind: str) -> None:
    (a, b, c, d), seen = MIRRORS[kind]
    path = encode(tmp_path / "a.mp4", [quarters()] * 2)
    # PyAV writes rotations only, so the matrix goes into the track header by hand (ISO 14496-12, 8.3.2).
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at : at + 36])[0] == 65536
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    assert close(corners(first(path)), seen)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(Fraction(4, 3), (128, 64)), (Fraction(3, 4), (96, 85)), (Fraction(1), (96, 64)), (None, (96, 64))],
)
def test_pixels_become_square_and_none_is_lost(
    tmp_path: Path, aspect: Fraction | None, size: tuple[int, int]
) -> None:
    path = encode(tmp_path / "a.mp4", [quarters()] * 2, pixel_aspect=aspect)
    assert first(path).size == size
    assert close(corners(first(path)), QUARTERS)


def test_stretched_and_turned_at_once(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [quarters()] * 2, pixel_aspect=Fraction(2), turned=90)
    assert first(path).size == (64, 192), "stretched as stored, then turned"


@pytest.mark.parametrize("full_range", [True, False, None])
@pytest.mark.parametrize("colorspace", [1, 6, None])
def test_colours_come_back(tmp_path: Path, full_range: bool | None, colorspace: int | None) -> None:
    grays = np.zeros((64, 96, 3), np.uint8)
    for number, value in enumerate((0, 16, 64, 128, 235, 255)):
        grays[:, number * 16 : (number + 1) * 16] = value
    path = encode(
        tmp_path / "a.mp4", [quarters(), grays], full_range=full_range, colorspace=colorspace, key_every=1
    )
    with open_video(path) as opened:
        coloured, gray = [opened.picture(frame) for frame in opened.frames()]
    assert close(corners(coloured), QUARTERS, by=4)
    assert [gray.getpixel((x * 16 + 8, 32))[1] for x in range(6)] == pytest.approx(
        [0, 16, 64, 128, 235, 255], abs=3
    )


@pytest.mark.parametrize(("size", "matrix"), [((1280, 720), 1), ((720, 480), 6)])
def test_without_a_named_matrix_hd_is_bt709(tmp_path: Path, size: tuple[int, int], matrix: int) -> None:
    path = encode(tmp_path / "a.mp4", [quarters(size)] * 2, colorspace=matrix)
    with open_video(path) as opened:
        named = opened.picture(next(opened.frames()))
        frame = next(opened.frames())
        frame.decoded.colorspace = 2  # as if the file named none
        unnamed = opened.picture(frame)
    assert close(corners(unnamed), corners(named), by=1)
    assert close(corners(unnamed), QUARTERS, by=4)


@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [
        ("libx264", "yuv444p", "mkv"),
        ("libx264", "yuv420p10le", "mkv"),
        ("libvpx-vp9", "yuv420p", "webm"),
        ("ffv1", "bgr0", "mkv"),
        ("ffv1", "gray", "mkv"),
        ("mjpeg", "yuvj420p", "mov"),
        ("png", "rgb24", "mov"),
        ("qtrle", "argb", "mov"),
        ("mpeg4", "yuv420p", "mp4"),
    ],
)
def test_codecs_and_pixel_formats(tmp_path: Path, codec: str, pixels: str, suffix: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", [quarters()] * 3, codec=codec, pixels=pixels)
    found = corners(first(path))
    if pixels == "gray":
        assert found[3] == WHITE and all(r == g == b for r, g, b in found)
    else:
        assert close(found, QUARTERS, by=12)


def test_what_is_unusual_is_said(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mov", [quarters()] * 2, codec="qtrle", pixels="argb")
    with open_video(path) as opened:
        assert opened.facts.notes == ("its transparency is ignored",)


# ---- time ----


def test_times_are_the_files_own(tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 540, 2000, 2040, 3500]
    path = encode(tmp_path / "a.mp4", [scene(n) for n in range(8)], times_ms=times)
    with open_video(path) as opened:
        assert [round(f.seconds * 1000) for f in opened.frames()] == times


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_winding_gives_the_frames_that_reading_gives(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = encode(tmp_path / f"a.{suffix}", [scene(n) for n in range(50)], rate=25, key_every=12, codec=codec)
    with open_video(path) as opened:
        whole = [f.seconds for f in opened.frames()]
        part = [f.seconds for f in opened.frames(0.7, 1.3)]
        again = [f.seconds for f in opened.frames()]
        keys = [f.seconds for f in opened.frames(keys_only=True)]
        after_keys = [f.seconds for f in opened.frames()]
    assert len(whole) == 50 and whole == again == after_keys
    assert part == [t for t in whole if 0.7 <= t < 1.3]
    assert 0 < len(keys) < 10 and set(keys) <= set(whole)


# ---- what is no video of ours ----


def test_told_by_content_not_by_suffix(tmp_path: Path) -> None:
    mp4 = encode(tmp_path / "a.mp4", [quarters()] * 2)
    mkv = encode(tmp_path / "a.mkv", [quarters()] * 2)
    assert container_of(mp4.rename(tmp_path / "a.txt")) == "mov"
    assert container_of(mkv.rename(tmp_path / "a.mp4")) == "matroska"
    assert first(tmp_path / "a.mp4").size == (96, 64)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.mp4", "AVIF")
    assert container_of(tmp_path / "picture.mp4") is None


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8 of the network": "#EXTM3U\n#EXTINF:9,\nhttp://192.0.2.1/secret.ts\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {path}\n",
    "bare concat": "file '{path}'\n",
    "dash": '<?xml version="1.0"?><MPD><BaseURL>{path}</BaseURL></MPD>',
    "text": "hello",
    "html": "<!DOCTYPE html><html></html>",
    "empty": "",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_in_a_videos_clothes_is_not_followed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = encode(tmp_path / "secret.mp4", [quarters()] * 2)
    path = tmp_path / "innocent.mp4"
    path.write_text(PLAYLISTS[kind].format(path=secret.name), "utf-8")
    with (
        pytest.raises(UnreadableVideoError, match=r"names other files|not an MP4|XML|HTML|0 bytes"),
        open_video(path),
    ):
        pass
    # Nor where the first bytes lie: the named reader takes no other format, and opens no other file.
    monkeypatch.setattr(video_module, "container_of", lambda _: "mov")
    with pytest.raises(UnreadableVideoError), open_video(path):
        pass


def test_plain_pyav_would_follow_it(tmp_path: Path) -> None:
    encode(tmp_path / "secret.mp4", [quarters()] * 2)
    path = tmp_path / "innocent.mp4"
    path.write_text(PLAYLISTS["concat"].format(path="secret.mp4"), "utf-8")
    with av.open(str(path)) as container:
        assert container.format.name == "concat", "else the tests above would prove nothing"


def test_other_containers_are_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", [quarters()] * 2, codec="mpeg4")
    with pytest.raises(UnreadableVideoError, match=r"AVI.*only MP4, MOV, MKV, WebM"), open_video(path):
        pass


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(UnreadableVideoError, match="no video in it"), open_video(path):
        pass


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        video_module.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name))
    )
    with Refusal("LG-DATA-042", "python -m pip install av"):
        load_av()


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("MAX_PIXELS", 96 * 64 - 1, "96x64"),
        ("MAX_FPS", 29, "30 frames a second"),
        ("MAX_SECONDS", 0, "hours long"),
        ("MAX_FRAMES", 3, "more than 3 frames"),
        ("MAX_DECODED_BYTES", 96 * 64 * 5, "decoded bytes"),
        ("MAX_WALL_SECONDS", -1, "seconds of decoding"),
    ],
)
def test_limits(tmp_path: Path, limit: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", [quarters()] * 9)
    monkeypatch.setattr(video_module, limit, value)
    with pytest.raises(UnreadableVideoError, match=words), open_video(path) as opened:
        list(opened.frames())


def test_a_link_or_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UnreadableVideoError, match="not a regular file"), open_video(tmp_path / "pipe.mp4"):
        pass


# ---- broken files ----


def damaged(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    if kind == 1:
        for _ in range(rng.randrange(1, 40)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(data))
        changed[at : at + rng.randrange(1, 400)] = rng.randbytes(rng.randrange(1, 400))
    else:
        at = rng.randrange(16, len(data))
        changed[at:at] = data[: rng.randrange(len(data))]
    return bytes(changed)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    frames: Sequence[np.ndarray] = [scene(n) for n in range(12)]
    made: list[tuple[str, dict[str, Any]]] = [
        ("a.mp4", {}),
        ("b.mp4", {"muxing": {"movflags": "faststart"}, "turned": 90}),
        ("c.mkv", {}),
        ("d.webm", {"codec": "libvpx"}),
        ("e.mov", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    ]
    return [encode(folder / name, frames, **settings).read_bytes() for name, settings in made]


# 138 damages the name of the codec.
@pytest.mark.parametrize("number", sorted({*range(cases(50) * 4), 138}))
def test_damaged_videos_are_read_or_refused(tmp_path: Path, samples: list[bytes], number: int) -> None:
    rng = random.Random(number)
    path = tmp_path / "a.mp4"
    path.write_bytes(damaged(samples[number % len(samples)], rng))
    num_frames = 0
    try:
        with open_video(path) as opened:
            for frame in opened.frames():
                assert opened.picture(frame).mode == "RGB"
                num_frames += 1
    except UnreadableVideoError as error:
        assert str(error) and "\n" not in str(error)
    assert num_frames <= 500


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "a.mp4", [scene(n, (320, 240)) for n in range(90)], muxing={"movflags": "faststart"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with open_video(path) as opened:
        num_frames = sum(1 for _ in opened.frames())
        assert 10 < num_frames < 80
        assert opened.is_cut_off or opened.num_damaged


@pytest.mark.parametrize(
    "name", ["a b; c%20\u00e9.mp4", "\u7d75\u6587\u5b57 \U0001f600.mp4", "http:x.mp4", "n" * 200 + ".mp4"]
)
def test_any_file_name_can_be_opened(tmp_path: Path, name: str) -> None:
    assert first(encode(tmp_path / "a.mp4", [quarters()] * 2).rename(tmp_path / name)).size == (96, 64)
