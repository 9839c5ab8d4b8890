"""What every trainer of the benchmark gets: the same base, images, seed and settings, as one small file."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUM_IMAGES, REPEATS = 4, 400  # one epoch is longer than any run, at batch 8 too
REFUSED = 3  # exit status of a child whose trainer refused the settings


@dataclass(frozen=True)
class Work:
    """One training job; ``text_encoder`` says whether the text encoder is trained beside the U-Net.

    ``checkpoint`` is the denoiser's file where ``files`` name those of the other parts, ``tokenizer``
    CLIP's and ``tokenizers`` the others by kind. ``settings`` are the variant's own: of our TrainConfig, or
    of a peer that has variants.
    """

    checkpoint: str
    images: str
    tokenizer: str
    out: str
    steps: int
    resolution: int
    text_encoder: bool = False
    batch_size: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 32
    alpha: float = 16.0
    learning_rate: float = 1e-4
    seed: int = 42
    architecture: str = "sd15"
    files: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the job for a child process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def read(path: str) -> Work:
        """Read the job in a child process."""
        return Work(**json.loads(Path(path).read_text(encoding="utf-8")))


def pack() -> ModuleType:
    """Import this repository as the package ``loragraft``, whatever its folder is called."""
    return load_by_path("loragraft", ROOT / "__init__.py")


def open_base(work: Work) -> Any:
    """Open the job's base with our trainer."""
    pack()
    from loragraft.trainer import api

    texts = [file for role, file in work.files.items() if role != "vae"]
    return api.open_base(
        work.checkpoint,
        tokenizer=[work.tokenizer, *work.tokenizers.values()],
        vae=work.files.get("vae"),
        text_encoders=texts,
    )


def load_by_path(name: str, file: Path) -> ModuleType:
    """Import one file under a name; a package if it is an __init__.py."""
    if name not in sys.modules:
        package = [str(file.parent)] if file.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=package)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# ---- what a child tells the parent, which holds the clock ----


def say_step(step: int, total: int, loss: float) -> None:
    """Say that a step is done."""
    print(f"bench step {step}/{total} loss {loss:.8f}", flush=True)


def say_versions(*packages: str) -> None:
    """Say which versions run."""
    from importlib.metadata import version

    say_facts(versions={"python": sys.version.split()[0], **{p: version(p) for p in packages}})


def say_facts(**facts: Any) -> None:
    """Say something that is kept with the run: versions, what was planned, the allocator's peak."""
    print("bench facts " + json.dumps(facts), flush=True)


def say_gpu_peak(device: str) -> None:
    """Say the most memory that torch's allocator gave out and held, in MiB, on a GPU."""
    if device == "cpu":
        return
    import torch

    peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    say_facts(torch_peak_mib={name: value / 2**20 for name, value in peak.items()})
