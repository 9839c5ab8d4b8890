"""The browser modules' own tests, run by Node, and what no shipped script may contain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "js").rglob("*.js"))


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js: install nodejs")
def test_pure_modules() -> None:
    files = [str(p) for p in sorted((ROOT / "tests" / "js").glob("*.test.mjs"))]
    done = subprocess.run(["node", "--test", *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_only_the_extension_itself_touches_comfyui() -> None:
    """Every other module can be loaded, and tested, without ComfyUI's page."""
    users = [p.name for p in SCRIPTS if "scripts/app.js" in p.read_text("utf-8")]
    assert users == ["loragraft.js"]


def test_imports_are_relative_and_exist() -> None:
    for script in SCRIPTS:
        for target in re.findall(r'from "([^"]+)"', script.read_text("utf-8")):
            host = target.startswith("../../scripts/")
            assert host or (script.parent / target).is_file(), f"{script.name}: {target}"


def test_files_stay_small() -> None:
    assert len((ROOT / "js" / "chart.js").read_text("utf-8").splitlines()) <= 200
    for script in SCRIPTS:
        assert len(script.read_text("utf-8").splitlines()) <= 400, script.name
