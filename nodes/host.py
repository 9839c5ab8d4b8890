"""ComfyUI seen from the nodes: folders, the path gate, progress, interrupt, memory, events.

Only this file and its sisters host_weights, host_sampling and host_demo touch comfy, folder_paths
and server, and they are imported when a node runs, never while the pack is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy
import torch
from comfy.cli_args import args
from PIL import Image
from server import PromptServer

from ..trainer import api
from ..trainer.errors import LoraGraftError, listed

log = logging.getLogger("loragraft")

EVENT = "loragraft.train"
DEMO = "[demo]"
PREVIEW_PX = 512
QUOTES = "\"'"
# ComfyUI's own way to name another root: "folder [output]".
ANNOTATION = re.compile(r"\s*\[(input|output)\]$")


# ---- folders ----


def own_folder() -> Path:
    """Return the pack's own folder below ComfyUI's user folder; HTTP cannot read it."""
    named = getattr(folder_paths, "get_system_user_directory", None)
    return Path(named("loragraft")) if named else Path(folder_paths.get_user_directory()) / "__loragraft"


def output_folder() -> Path:
    """Return the folder of run folders and grids."""
    return Path(folder_paths.get_output_directory()) / "loragraft"


def grids_folder() -> Path:
    """Return the folder of kept grids."""
    return output_folder() / "grids"


def working_copy_folder(name: str, dataset: api.Dataset, step: str) -> Path:
    """Return the folder below output/loragraft/datasets into which a step writes its pictures.

    ``name`` is what the user wrote; where it is empty the dataset's folder and the step make one that no
    other folder's dataset gets. Raises LG-PATH-001.
    """
    name = name.strip()
    if not name:
        where = hashlib.sha256(str(dataset.root).encode("utf-8", "surrogatepass")).hexdigest()[:6]
        plain = re.sub(r"[^\w -]", "_", dataset.root.name).strip()[:40] or "dataset"
        name = f"{plain} {step} {where}"
    return output_folder() / "datasets" / api.safe_name(name, what="name")


def temp_folder() -> Path:
    """Return the folder of pictures that need not stay."""
    return Path(folder_paths.get_temp_directory()) / "loragraft"


def keeps_metadata() -> bool:
    """Say whether the user lets ComfyUI write workflows into images."""
    return not args.disable_metadata


def places() -> api.Places:
    """Return where runs, finished LoRAs and models, and the cache go."""
    kinds = ("loras", "checkpoints", "embeddings")
    loras, models, words = (Path(folder_paths.get_folder_paths(kind)[0]) for kind in kinds)
    return api.Places(output_folder(), loras, own_folder() / "cache", checkpoints=models, embeddings=words)


def folders_file() -> Path:
    """Return the file in which the user lists further folders to read datasets from."""
    return own_folder() / "folders.txt"


def listed_roots() -> list[Path]:
    """Return the folders that the user listed: one absolute path a line, '#' starts a comment."""
    try:
        text = folders_file().read_text("utf-8-sig")
    except FileNotFoundError:
        return []
    lines = (line.strip() for line in text.splitlines())
    return [Path(line) for line in lines if not line.startswith("#") and Path(line).is_absolute()]


def dataset_folder(text: str) -> Path:
    """Return the folder that a dataset path names; the only way from a user's text to a folder.

    ``[demo]`` is the embedded sample; other text is relative to input/, or to output/ with
    `` [output]`` behind it, or an absolute path below input/, output/ or a listed folder. Spaces and one pair
    of quotes around it go: file managers copy paths with them.
    """
    text = _pasted(text)
    if text == DEMO:
        return api.demo_dataset()
    root = Path(folder_paths.get_input_directory())
    if match := ANNOTATION.search(text):
        text = text[: match.start()]
        if match[1] == "output":
            root = Path(folder_paths.get_output_directory())
    if not _absolute(text):
        return api.resolve(root, text, what="dataset folder", must_exist=True)
    roots = [
        Path(folder_paths.get_input_directory()),
        Path(folder_paths.get_output_directory()),
        *listed_roots(),
    ]
    for root in roots:
        inside = _below(text, root)
        if inside is not None:
            return api.resolve(root, inside, what="dataset folder", must_exist=True)
    raise LoraGraftError(
        "LG-NODE-020",
        f"The folder {text[:70]!r} is not one that workflows may read.",
        where="path",
        why="a shared workflow must not read any folder of this machine"
        f"{api.of_other_system(text)}; allowed: {listed(map(str, roots), limit=5)}.",
        fix=f"put the images below ComfyUI's input folder, or add the line {text[:200]} to {folders_file()}",
    )


def inner_folder(folder: Path, text: str, *, what: str) -> Path:
    """Return a folder that a widget names: below ``folder``, or where `dataset_folder` may read."""
    text = _pasted(text)
    if _absolute(text) or ANNOTATION.search(text):
        return dataset_folder(text)
    return api.resolve(folder, text, what=what, must_exist=True)


def lora_file(name: str) -> Path:
    """Return the LoRA file that a name below models/loras means; raises LG-NODE-016 or LG-PATH."""
    if not name.strip():
        raise LoraGraftError(
            "LG-NODE-016",
            "No LoRA is named.",
            where="Preview with LoRA: lora_name",
            why="nothing could be tested.",
            fix="link Train LoRA's lora_name or checkpoints, or write a file name from models/loras",
        )
    if not name.endswith(".safetensors"):
        raise LoraGraftError(
            "LG-NODE-016",
            f"{name[:60]!r} is no LoRA file.",
            where="Preview with LoRA: lora_name",
            why="only .safetensors files are read; other formats can run code.",
            fix="name a .safetensors file from models/loras",
        )
    folders = [Path(f) for f in folder_paths.get_folder_paths("loras")]
    for folder in folders:
        path = api.resolve(folder, name, what="LoRA")
        if path.is_file():
            return path
    raise LoraGraftError(
        "LG-NODE-016",
        f"The LoRA {name[:60]!r} does not exist.",
        where="Preview with LoRA: lora_name",
        why=f"there is no such file below {listed(map(str, folders), limit=3)}.",
        fix="check the name; folders below models/loras count, and so does the suffix .safetensors",
    )


def workflow_roots() -> dict[str, str]:
    """Return what stands for this machine's folders in an embedded workflow (see workflow.portable)."""
    roots = {folder_paths.get_input_directory(): "", folder_paths.get_output_directory(): " [output]"}
    roots |= {str(root): "" for root in listed_roots()}
    roots |= {folder_paths.models_dir: "", folder_paths.base_path: ""}
    return {path: suffix for root, suffix in roots.items() for path in (root, os.path.realpath(root))}


def _pasted(text: str) -> str:
    """Return a path without the spaces and the pair of quotes that a file manager puts around it."""
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES
    return text[1:-1].strip() if is_quoted else text


def _absolute(text: str) -> bool:
    return text.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", text) is not None


def _below(text: str, root: Path) -> str | None:
    """Return ``text`` relative to ``root`` ("." for the root itself), compared as text only; else None."""
    given = os.path.normcase(text.rstrip("/\\") if len(text) > 1 else text)
    for form in (os.path.normcase(str(root)), os.path.normcase(os.path.realpath(root))):
        form = form.rstrip("/\\")
        if given == form:
            return "."
        if given.startswith(form) and given[len(form)] in "/\\":
            return text[len(form) + 1 :]
    return None


# ---- progress, interrupt, events ----


class Progress:
    """The bar and the preview picture on the node that runs."""

    def __init__(self, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total)

    def show(self, value: int, total: int) -> None:
        """Set the bar; raises the host's interrupt where Cancel was pressed, as all methods here do."""
        self._bar.update_absolute(value, total)

    def show_image(self, image: Image.Image) -> None:
        """Show a picture on the node and leave the bar where it is."""
        preview = ("JPEG", image.convert("RGB"), PREVIEW_PX)
        self._bar.update_absolute(self._bar.current, self._bar.total, preview)

    def add_preview(self, before: int, total: int, done: int, preview: Any) -> None:
        """Set the bar to ``before + done`` with a preview that is already in the host's own form."""
        self._bar.update_absolute(before + done, total, preview)


def check_interrupt() -> None:
    """Raise the host's interrupt (a BaseException) where Cancel was pressed."""
    management.throw_exception_if_processing_interrupted()


def send(payload: dict[str, Any]) -> None:
    """Send a training event to the browsers; safe from any thread."""
    PromptServer.instance.send_sync(EVENT, payload)


def view(path: Path) -> dict[str, str]:
    """Return how the browser asks for an image file below output/ or temp/ (the arguments of /view)."""
    for kind, root in (
        ("output", folder_paths.get_output_directory()),
        ("temp", folder_paths.get_temp_directory()),
    ):
        try:
            relative = Path(os.path.realpath(path)).relative_to(os.path.realpath(root))
        except ValueError:
            continue
        folder = relative.parent.as_posix()
        return {"filename": relative.name, "subfolder": "" if folder == "." else folder, "type": kind}
    return {}


# ---- computing ----


def device() -> torch.device:
    """Return the device that ComfyUI computes on."""
    return management.get_torch_device()


def free_memory() -> None:
    """Unload every model that ComfyUI keeps on a GPU, so that training finds it empty."""
    if not management.is_device_cpu(device()):
        management.unload_all_models()
        management.soft_empty_cache()


@contextmanager
def training_mode() -> Iterator[None]:
    """Let autograd work, and leave the process as it was: the random states, default dtype, backend flags."""
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    flags = [(backend, name, getattr(backend, name)) for backend, name in _flags()]
    algorithms = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for backend, name, value in flags:
            if getattr(backend, name) != value:
                setattr(backend, name, value)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])


def _flags() -> list[tuple[Any, str]]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    named = [(cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn, "enabled"), (cudnn, "allow_tf32")]
    return [*named, (matmul, "allow_tf32")]
