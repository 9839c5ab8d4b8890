"""Kill -9 at any call that changes the disk, in a real process: the run continues and ends in equal files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.trainer import runs, tiny

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from loragraft_tests.trainer import kill_server
from pathlib import Path
kill_server.serve(*map(Path, sys.argv[1:]))
"""
POINTS = 100
QUICK = 6

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is neither fork nor SIGKILL")


class Server:
    """Orders to the process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def train(self, root: Path, at: int = 0) -> dict[str, Any]:
        """Train in ``root``; die at this call."""
        assert self.process.stdin is not None and self.process.stdout is not None
        root.mkdir(exist_ok=True)
        self.process.stdin.write(json.dumps({"root": str(root), "at": at}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, tokenizer: Path) -> Iterator[Server]:
    """Start the process once."""
    images = tmp_path_factory.mktemp("killed")
    tiny.write_images(images / "1_zibu", [(16, 16)] * 4)
    command = [sys.executable, "-c", START.format(tests=str(ROOT / "tests"))]
    process = subprocess.Popen(
        [*command, *map(str, (images, checkpoint, tokenizer))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield Server(process)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], str]:
    """Return the files of a run that nothing happened to, and the kinds of its calls to the disk."""
    root = tmp_path_factory.mktemp("straight")
    done = server.train(root)
    assert done["code"] == 0
    return files(root), done["kinds"]


def files(root: Path) -> dict[str, bytes]:
    """Return all that must be equal: what is published, drawn, measured, kept; of steps only their losses."""
    found = {f"loras/{k}": v for k, v in runs.tree(root / "loras").items()}
    (folder,) = (root / "runs").iterdir()
    for name, content in runs.tree(folder).items():
        if name in ("log.log", "run.lock"):  # tell of the stops
            continue
        found[name] = content
    steps = [json.loads(line) for line in found.pop("log.jsonl").decode().splitlines()]
    found["losses"] = json.dumps([(s["step"], s["loss"]) for s in steps]).encode()
    return found


def points(kinds: str, count: int) -> list[int]:
    """Return ``count`` calls: a third spread over those that write, the others over all other kinds."""
    writes = [n for n, kind in enumerate(kinds, 1) if kind == "w"]
    others = [n for n, kind in enumerate(kinds, 1) if kind != "w"]
    return sorted([*spread(writes, count // 3), *spread(others, count - count // 3)])


def spread(items: list[int], count: int) -> list[int]:
    """Return ``count`` of the items in equal steps, the first and the last among them."""
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def check(server: Server, root: Path, at: int, expected: dict[str, bytes], again: int = 0) -> None:
    """Kill at one call, perhaps the continued run too, and compare its end with the uninterrupted run's."""
    assert server.train(root, at)["killed"], at
    if again:
        server.train(root, again)
    assert server.train(root)["code"] == 0, at
    found = files(root)
    assert found.keys() == expected.keys(), (at, found.keys() ^ expected.keys())
    assert not [name for name in found if found[name] != expected[name]], at


def test_killed_at_a_few_points(
    server: Server, straight: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    expected, kinds = straight
    assert len(kinds) > 1000 and set(kinds) >= set("wcsrmu"), "the calls are seen"
    assert {"loras/x.safetensors", "loras/x-step00000004.safetensors", "best.json"} <= expected.keys()
    for at in points(kinds, QUICK):
        check(server, tmp_path / f"{at}", at, expected)


@pytest.mark.slow
def test_killed_at_a_hundred_points(
    server: Server, straight: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    """Every fifth is killed a second time while it continues."""
    expected, kinds = straight
    aimed = points(kinds, POINTS)
    assert len(set(aimed)) == POINTS
    for number, at in enumerate(aimed):
        check(server, tmp_path / f"{at}", at, expected, again=1 + at % 40 if number % 5 == 0 else 0)
