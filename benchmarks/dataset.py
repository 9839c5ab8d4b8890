"""Dataset steps against kohya's set-up and a plain loop, one core against all. `make bench-dataset`.

Each measurement runs in a process of its own, by turns; imports do not count. kohya is found by
LORAGRAFT_KOHYA and LORAGRAFT_KOHYA_PYTHON, and skipped with a word where it is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from . import kohya
from .common import ROOT, pack
from .machine import RESULTS, machine

NUM_PHOTOS, NUM_KINDS, NUM_CONVERTED = 2000, 40, 200
FRAMES, EVERY = 900, 30
ROUNDS = 3  # of the header scan in one process: the best counts, the first is kept beside it

KOHYA = """
import argparse, contextlib, gc, io, json, sys, time
sys.path.insert(0, {folder!r})
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from library import config_util
    subset = dict(image_dir={images!r}, num_repeats=1, class_tokens="photo", caption_extension=".txt")
    config = dict(datasets=[dict(resolution=512, batch_size=1, enable_bucket=True, min_bucket_reso=256,
                                 max_bucket_reso=1024, subsets=[subset])])
    arguments = argparse.Namespace(train_data_dir=None, debug_dataset=False, max_token_length=75,
                                   prior_loss_weight=1.0)
    gc.collect()
    runs = []
    for _ in range({rounds}):
        begun = time.perf_counter()
        generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, False, True))
        blueprint = generator.generate(config, arguments)
        group = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
        runs.append(time.perf_counter() - begun)
    group = group[0] if isinstance(group, tuple) else group
print(json.dumps(dict(seconds=min(runs), first=runs[0], images=group.num_train_images)))
"""


# ---- what the children measure ----


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Time a piece of work, and the memory that it added at its peak."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, begun = _memory("VmRSS"), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "extra_mib": _memory("VmHWM") - before, "result": result}


def _memory(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def scan(folder: str) -> dict[str, Any]:
    """Look at all headers and sort into buckets."""
    api, config = _api()

    def work() -> int:
        return len(api.build_train_set(api.scan_folder(folder, check="header"), config).records)

    runs = [timed(work) for _ in range(ROUNDS)]
    return {**min(runs, key=lambda run: float(run["seconds"])), "first": runs[0]["seconds"]}


def decode(folder: str, workers: str) -> dict[str, Any]:
    """Hash and decode all images."""
    api, _ = _api()
    from loragraft.trainer.data.scan import complete

    dataset = api.scan_folder(folder, check="header")
    return timed(lambda: len(complete(dataset, workers=int(workers)).records))


def convert(folder: str, out: str, workers: str, format: str) -> dict[str, Any]:
    """Write all images in another format."""
    api, _ = _api()
    dataset = api.scan_folder(folder)
    return timed(lambda: api.convert(dataset, out, format=format, workers=int(workers)).made)


def frames(video: str, out: str, whose: str) -> dict[str, Any]:
    """Extract every 30th frame, ours or in a plain loop."""
    import av

    api, _ = _api()

    def plain() -> int:
        Path(out).mkdir()
        written = 0
        with av.open(video) as container:
            container.streams.video[0].thread_type = "SLICE"
            for number, frame in enumerate(container.decode(video=0)):
                if number % EVERY == 0:
                    frame.to_image().save(Path(out) / f"{number:06}.png", compress_level=1)
                    written += 1
        return written

    def ours() -> int:
        settings = api.FrameSettings(every_n_frames=EVERY, skip_blurred=False, skip_similar=False)
        return len(api.extract_frames(video, out, settings).records)

    return timed(plain if whose == "plain" else ours)


def _api() -> tuple[Any, Any]:
    pack()
    from loragraft.trainer import api

    return api, api.make(api.DatasetConfig, {"resolution": 512})


CHILDREN = {"scan": scan, "decode": decode, "convert": convert, "frames": frames}


# ---- what they work on ----


def write_photos(folder: Path) -> None:
    """Write photos of 640 to 4000 px: a few kinds, each file with bytes of its own behind the picture."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    kinds = []
    for n in range(NUM_KINDS):
        long, short = int(rng.integers(640, 4001)), float(rng.uniform(0.5, 1))
        size = (long, int(long * short)) if n % 2 else (int(long * short), long)
        small = Image.fromarray(
            rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), dtype=np.uint8)
        )
        file = folder / f"kind{n}.jpg"
        small.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
        kinds.append(file.read_bytes())
        file.unlink()
    chosen = random.Random(0)
    for n in range(NUM_PHOTOS):
        (folder / f"photo {n}.jpg").write_bytes(kinds[chosen.randrange(NUM_KINDS)] + f"{n:08}".encode())


def write_video(file: Path) -> None:
    """Write 30 seconds of 720p that pan over a picture."""
    import av
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((1600, 900), Image.Resampling.BICUBIC))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for n in range(FRAMES):
            x, y = int(150 + 150 * np.sin(n / 40)), int(80 + 80 * np.cos(n / 33))
            picture = np.ascontiguousarray(wide[y : y + 720, x : x + 1280])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def child(*arguments: object) -> dict[str, Any]:
    """Measure one thing in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.dataset", "--child", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def kohya_setup(images: Path) -> dict[str, Any]:
    """Set kohya's dataset up on the same folder."""
    code = KOHYA.format(folder=str(kohya.folder()), images=str(images), rounds=ROUNDS)
    argv = [os.environ["LORAGRAFT_KOHYA_PYTHON"], "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=kohya.folder())
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, print and keep."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--label", default="dataset", help="end of the results file's name")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    found: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, run: dict[str, Any]) -> None:
        found.setdefault(name, []).append(run)
        extra = f", {run['extra_mib']:.0f} MiB more" if "extra_mib" in run else ""
        print(f"{name}: {run['seconds']:.3f} s{extra}", flush=True)

    with tempfile.TemporaryDirectory(prefix="loragraft-dataset-") as name:
        root = Path(name)
        photos, few, video = root / "1_photo", root / "few" / "1_photo", root / "clip.mp4"
        photos.mkdir()
        few.mkdir(parents=True)
        write_photos(photos)
        for file in sorted(photos.iterdir())[:NUM_CONVERTED]:
            shutil.copy(file, few)
        write_video(video)
        absent = kohya.missing()
        if absent:
            print(f"without kohya: {absent}")
        for _ in range(3 * args.turns):
            keep("header scan and buckets", child("scan", photos))
            if not absent:
                keep("kohya's set-up", kohya_setup(photos))
        for turn in range(args.turns):
            for workers in (1, cores) if turn == 0 else ():  # minutes each
                keep(f"hash and decode, {workers} workers", child("decode", photos, workers))
            for format in ("jpeg", "png"):
                for workers in (1, cores):
                    out = root / f"{format}-{workers}-{turn}"
                    keep(
                        f"convert to {format}, {workers} workers", child("convert", few, out, workers, format)
                    )
                    shutil.rmtree(out)
            for whose in ("plain", "ours"):
                out = root / f"frames-{whose}-{turn}"
                keep(f"frames, {whose}", child("frames", video, out, whose))
                shutil.rmtree(out)

    best = {name: median(run["seconds"] for run in runs) for name, runs in found.items()}
    ratios = {
        f"{what}, {cores} over 1": best[f"{what}, 1 workers"] / best[f"{what}, {cores} workers"]
        for what in ("hash and decode", "convert to jpeg", "convert to png")
    }
    ratios["frames, ours over plain (seconds)"] = best["frames, ours"] / best["frames, plain"]
    if not absent:
        ratios["header scan, ours over kohya (speed)"] = (
            best["kohya's set-up"] / best["header scan and buckets"]
        )
    print(*(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()), sep="\n")
    now = datetime.now(timezone.utc)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(cores),
        "work": {"photos": NUM_PHOTOS, "converted": NUM_CONVERTED, "frames": FRAMES, "turns": args.turns},
        "median_seconds": best,
        "ratios": ratios,
        "runs": found,
    }
    file = RESULTS / f"{now:%Y-%m-%d}-{args.label}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
