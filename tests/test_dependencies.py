"""Installing our requirements changes no package that ComfyUI has: asked of pip's resolver."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# What ComfyUI lacks of ours and what that brings: diffusers, accelerate and small ones.
MAX_ADDED = 8

pytestmark = pytest.mark.network


def interpreter(version: str) -> str:
    """Return an interpreter of this version that has pip; pip reads markers as the one that runs it does."""
    for found in (sys.executable, shutil.which(f"python{version}")):
        ask = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
        if found:
            done = subprocess.run([found, "-c", ask], capture_output=True, text=True)
            if done.stdout.strip() == version:
                return found
    pytest.skip(f"no python{version} with pip")


def resolve(python: str, files: list[Path], folder: Path) -> dict[str, str]:
    """Return name -> version of what pip would install into an empty environment."""
    report = folder / f"report-{len(files)}.json"
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--only-binary=:all:", "--target", str(folder / "target"), "--report", str(report)]
    for file in files:
        command += ["-r", str(file)]
    subprocess.run(command, check=True)
    entries = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in entries}


@pytest.mark.parametrize("version", VERSIONS)
def test_no_version_changes(comfyui: Path, tmp_path: Path, version: str) -> None:
    python, host = interpreter(version), comfyui / "requirements.txt"
    before = resolve(python, [host], tmp_path)
    after = resolve(python, [host, ROOT / "requirements.txt"], tmp_path)
    changed = {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}
    added = [f"{name} {after[name]}" for name in sorted(set(after) - set(before))]
    print(f"Python {version}: {len(before)} packages, {len(added)} added: {', '.join(added)}")
    assert not changed
    assert len(added) <= MAX_ADDED, added
