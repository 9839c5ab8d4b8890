"""Which machine this is, and where results are kept: one JSON file for each call, never written over."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .common import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 2  # of results with cases; earlier files hold one table and name no case


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine."""
    info: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "threads": threads}
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        info["cpu"] = re.search(r"model name\s*: (.*)", cpuinfo)[1]  # type: ignore[index]
        flags = set(re.search(r"flags\s*: (.*)", cpuinfo)[1].split())  # type: ignore[index]
        info["avx512"], info["amx_bf16"] = "avx512f" in flags, "amx_bf16" in flags
        total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]  # type: ignore[index]
        info["memory_gib"] = round(int(total) / 2**20, 1)
    except (OSError, TypeError):
        info["cpu"] = platform.processor()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if has_gpu():
        info["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return info


def has_gpu() -> bool:
    """Tell whether there is an NVIDIA GPU with its driver."""
    return (
        shutil.which("nvidia-smi") is not None
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    )


def kind(info: dict[str, Any], device: str) -> str:
    """Return what must be equal for two measurements on ``device`` to be comparable."""
    if device != "cpu":
        return str(info.get("gpu", "no GPU")).split(",")[0]
    amx = " with AMX" if info.get("amx_bf16") else ""
    return f"{info['cpu']}{amx}, {info['threads']} of {info['cores']} cores"


class Results:
    """One results file, written again after each part, so that a call that is cut short keeps the rest."""

    def __init__(self, label: str, threads: int, *, keep: bool = True) -> None:
        now = datetime.now(timezone.utc)
        self.file = _free(RESULTS / f"{now:%Y-%m-%d}-{label}.json") if keep else None
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "date": now.isoformat(timespec="seconds"),
            "machine": machine(threads),
        }

    def put(self, part: str, name: str, value: Any) -> None:
        """Keep ``value`` as ``name`` of a part, such as ("cases", "sd15-256-b1-fp32")."""
        self.content.setdefault(part, {})[name] = value
        if self.file is not None:
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def where(self) -> str:
        """Say where it is kept."""
        return f"kept in {self.file.relative_to(ROOT)}" if self.file else "not kept"


def _free(file: Path) -> Path:
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free
