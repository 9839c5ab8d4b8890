"""A process that has imported everything once and forks for each training: one that kills itself, or goes on.

Reads lines of JSON {"root": folder, "at": call} on stdin. The fork trains in that folder and sends itself
SIGKILL at that call which changes the disk (0: never). Answers with {"killed": bool, "kinds": [...],
"code": exit status}; ``kinds``, one letter a call ("w" writes), is known only where the fork lived.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from loragraft.trainer import api
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.disk import Disk, Killed

OPTIONS: dict[str, Any] = {
    "max_train_steps": 5,
    "save_every_n_steps": 2,
    "save_last_n_steps": 2,
    "validate_every_n_steps": 3,
    "validation_timesteps": 1,
    "sample_prompts": ["zibu --w 64 --h 64 --s 1"],
    "sample_every_n_steps": 3,
    "publish_checkpoints": True,
    "network_train_unet_only": True,
    "network_dim": 1,
    "preview_image": True,
    "sample_steps": 1,
    "log_with": "none",
}


class DeadlyDisk(Disk):
    """A disk whose process really dies: of a write, half is written first."""

    def reached(self, kind: str, path: Path | str) -> None:
        """Note a call; die at the one that is due."""
        if self.dead:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            super().reached(kind, path)
        except Killed:
            if kind != "write":
                os.kill(os.getpid(), signal.SIGKILL)
            raise  # half of it is written on the way out; the next call is the last


def train(root: Path, at: int, training: runs.Training) -> str:
    """Train to the end or to the kill; return the calls' first letters."""
    disk = DeadlyDisk(root, at)
    places = api.Places(root / "runs", root / "loras", root / "cache")
    with disk.watching():
        try:
            runs.Training(training.base, training.train_set, places).finish(**OPTIONS)
        finally:
            if disk.dead:
                os.kill(os.getpid(), signal.SIGKILL)
    return "".join(kind[0] for kind, _ in disk.calls)


def serve(images: Path, base: Path, tokenizer: Path) -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    opened = api.open_base(base, tokenizer=tokenizer)
    nowhere = api.Places(Path(), Path(), Path())
    training = runs.Training(opened, runs.train_set(images, validation_split=0.5), nowhere)
    with tempfile.TemporaryDirectory() as folder:  # what is imported late is imported here, once
        train(Path(folder), 0, training)
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                kinds = train(Path(order["root"]), order["at"], training)
                with os.fdopen(writer, "w") as answer:
                    answer.write(kinds)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as answer:
            kinds = answer.read()
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, "kinds": kinds, "code": status}), flush=True)


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
