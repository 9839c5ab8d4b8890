"""The command line asks for large pages before torch is there, and leaves what the user says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = Path(__file__).resolve().parents[2] / "trainer" / "launch" / "cli.py"
NAME = "THP_MEM_ALLOC_ENABLE"
WATCHED = f"""
import os, runpy, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("torch comes:", os.environ.get({NAME!r}))

sys.meta_path.insert(0, Watch())
sys.argv = [{str(CLI)!r}, "train", "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_it_is_asked_for_before_torch_comes(given: str | None, found: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != NAME}
    env |= {} if given is None else {NAME: given}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], env=env, capture_output=True, text=True, check=True, timeout=300
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("torch comes")] == [
        f"torch comes: {found}"
    ]
