"""Run a tagger: the pictures as it was trained on them, and the runtime that is there.

The preparation is that of the models' author: on white, padded to a square in the middle, bicubic,
BGR, 0 to 255. onnxruntime of any flavour runs the graph; without it, timm runs the weights on torch.
Both are found when they are needed, never required.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import LoraGraftError, listed
from .images import shown
from .tagger_models import CONFIG, TaggerFiles

Floats = npt.NDArray[np.float32]

CPU = "CPUExecutionProvider"
# Fastest first. Not here: TensorRT builds an engine for minutes, CoreML fails on these graphs.
WANTED_PROVIDERS = (
    *("CUDAExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider"),
    *("DmlExecutionProvider", "OpenVINOExecutionProvider", CPU),
)
GPU_BYTES = 2 * 2**30  # room that a large tagger needs, with its working memory
MAX_SIDE = 4096
DEVICES = ("auto", "cpu")
PIP_LINES = "pip install onnxruntime-gpu (NVIDIA), pip install onnxruntime (any CPU), or pip install timm"
WHITE = (255, 255, 255)
# Where timm would else look for weights on the net.
LOCAL_ONLY = {"url": "", "hf_hub_id": None, "source": None, "custom_load": False}


@dataclass
class Session:
    """A loaded tagger: ``run`` takes (N, size, size, 3) pixels from `prepare` and gives (N, tags) scores.

    ``max_batch`` is how many pictures it takes at once, None for any number; ``line`` says what runs it.
    """

    size: int
    max_batch: int | None
    num_tags: int | None
    line: str
    run: Callable[[Floats], Floats]
    notes: tuple[str, ...] = ()


def prepare(image: Image.Image, size: int) -> Floats:
    """Return an RGB picture as the tagger sees it: (size, size, 3) float32, BGR, 0 to 255.

    As SmilingWolf's own space does it: white padding with the offset rounded down, then bicubic.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[:, :, ::-1])


@contextlib.contextmanager
def open_session(files: TaggerFiles, *, device: str = "auto") -> Iterator[Session]:
    """Load a tagger for the duration of a ``with``; its memory is given back at the end.

    Raises LG-DATA-061 where neither onnxruntime nor timm can run it, LG-DATA-062 where the file is no
    such model.
    """
    reasons: list[str] = []
    opened = _open_graph(files, device, reasons) or _open_weights(files, device, reasons)
    if opened is None:
        raise LoraGraftError(
            "LG-DATA-061",
            f"Nothing here can run the tagger {files.name}.",
            where=listed(reasons),
            why="a tagger needs onnxruntime, or timm where its .safetensors weights are there.",
            fix=f"install one: {PIP_LINES}; then start again",
        )
    try:
        yield opened
    finally:
        # Callers hold the Session, so its only link to the weights is cut here.
        opened.run = _closed
        del opened
        gc.collect()


def _closed(pixels: Floats) -> Floats:
    raise RuntimeError("the tagger's session is closed")


# ---- onnxruntime ----


def _open_graph(files: TaggerFiles, device: str, reasons: list[str]) -> Session | None:
    if files.graph is None:
        reasons.append(f"{files.name} has no ONNX graph")
        return None
    try:
        runtime = importlib.import_module("onnxruntime")
        available = list(runtime.get_available_providers())
    except (ImportError, OSError, AttributeError) as error:  # absent, or a library of it does not load
        reasons.append(f"onnxruntime: {shown(error, 200)}")
        return None
    wanted = _providers(available, device)
    if wanted[0] == "CUDAExecutionProvider" and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # torch's CUDA libraries serve onnxruntime too
    graph = _load_graph(runtime, files.graph, wanted)
    first, output = graph.get_inputs()[0], graph.get_outputs()[0]
    size = _graph_size(files.graph, first, graph.get_inputs())
    batch = first.shape[0] if isinstance(first.shape[0], int) else None
    used = graph.get_providers()[0]
    notes = _notes(used, wanted[0], device)
    fault = None if used == CPU else _fault_of(graph, (batch or 1, size, size, 3))
    if fault is not None:
        notes.append(f"{used} failed ({fault}); the CPU runs the tagger.")
        graph, used = _load_graph(runtime, files.graph, [CPU]), CPU
    return Session(
        size,
        batch,
        output.shape[-1] if isinstance(output.shape[-1], int) else None,
        f"{files.name} by onnxruntime {runtime.__version__}, {used.removesuffix('ExecutionProvider')}",
        partial(_run_graph, graph),
        tuple(notes),
    )


def _run_graph(graph: Any, pixels: Floats) -> Floats:
    first, output = graph.get_inputs()[0], graph.get_outputs()[0]
    dtype = np.float16 if first.type == "tensor(float16)" else np.float32
    (scores,) = graph.run([output.name], {first.name: pixels.astype(dtype, copy=False)})
    return np.asarray(scores, dtype=np.float32)


def _fault_of(graph: Any, shape: tuple[int, ...]) -> str | None:
    """Say why a GPU cannot run the graph, or None.

    Its library may load and yet fail on the first picture: better now than amid the images.
    """
    try:
        _run_graph(graph, np.full(shape, 255, np.float32))
    except Exception as error:  # the runtime's own exception types are not public
        return shown(error, 120)
    return None


def _notes(used: str, wanted: str, device: str) -> list[str]:
    """Say why the CPU runs what a GPU was wanted for."""
    if used != CPU:
        return []
    if wanted != CPU:
        return [f"{wanted} could not be used; the CPU runs the tagger."]
    if device != "cpu":
        return [
            "onnxruntime has no GPU provider here, so the CPU runs the tagger; for NVIDIA cards: "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu."
        ]
    return []


def _providers(available: list[str], device: str) -> list[str]:
    wanted = (CPU,) if device == "cpu" else WANTED_PROVIDERS
    return [name for name in wanted if name in available] or [CPU]


def _load_graph(runtime: Any, graph: Path, providers: list[str]) -> Any:
    try:
        return runtime.InferenceSession(str(graph), providers=providers)
    except Exception as error:  # the runtime's own exception types are not public
        raise _bad_model(graph, f"onnxruntime cannot load it: {shown(error, 200)}") from error


def _graph_size(graph: Path, first: Any, inputs: list[Any]) -> int:
    """Return the side of the pictures it takes, having checked the signature (N, S, S, 3)."""
    shape = list(first.shape)
    sides = shape[1:3]
    square = len(shape) == 4 and shape[3] == 3 and isinstance(sides[0], int) and sides[0] == sides[1]
    if not square or len(inputs) != 1 or first.type not in ("tensor(float)", "tensor(float16)"):
        raise _bad_model(
            graph, f"it takes {first.type} {shape}, not pictures of the shape (N, side, side, 3)"
        )
    if not 1 <= sides[0] <= MAX_SIDE or (isinstance(shape[0], int) and not 1 <= shape[0] <= 256):
        raise _bad_model(graph, f"it takes pictures of the shape {shape}")
    return int(sides[0])


# ---- timm on torch ----


def _open_weights(files: TaggerFiles, device: str, reasons: list[str]) -> Session | None:
    if files.weights is None:
        reasons.append(f"{files.name} has no model.safetensors with {CONFIG}")
        return None
    try:
        timm = importlib.import_module("timm")
    except (ImportError, OSError, RuntimeError) as error:  # absent, or torchvision does not fit torch
        reasons.append(f"timm: {shown(error, 200)}")
        return None
    import torch

    config = _read_config(files.weights.parent / CONFIG)
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    try:
        model = timm.create_model(
            config["architecture"],
            pretrained=True,  # from this file: timm fits older names and buffers as it does for its own
            pretrained_cfg={**config["pretrained_cfg"], **LOCAL_ONLY, "file": str(files.weights)},
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
    except Exception as error:  # timm and torch raise what they meet
        raise _bad_model(files.weights, f"timm cannot build it: {shown(error, 200)}") from error
    model = model.to(where).train(False)
    trained = config["pretrained_cfg"]
    mean = torch.tensor(trained["mean"], device=where).view(1, 3, 1, 1)
    deviation = torch.tensor(trained["std"], device=where).view(1, 3, 1, 1)

    def run(pixels: Floats) -> Floats:
        rgb = torch.from_numpy(pixels).to(where).permute(0, 3, 1, 2)[:, [2, 1, 0]] / 255  # (N, 3, S, S)
        # The transform is written for RGB; the network was trained on BGR.
        with torch.inference_mode():
            logits = model(((rgb - mean) / deviation)[:, [2, 1, 0]])
            return torch.sigmoid(logits.float()).cpu().numpy()

    notes = () if where.type == "cuda" or device == "cpu" else ("torch has no GPU here; the CPU tags.",)
    line = f"{files.name} by timm {timm.__version__} on torch, {where.type}"
    return Session(trained["input_size"][1], None, config["num_classes"], line, run, notes)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8-sig"))
        trained = config["pretrained_cfg"]
        sound = (
            isinstance(config["architecture"], str)
            and isinstance(config["num_classes"], int)
            and trained.get("num_classes", config["num_classes"]) == config["num_classes"]
            and isinstance(config.get("model_args", {}), dict)
            and len(trained["mean"]) == len(trained["std"]) == 3
            and 1 <= trained["input_size"][1] <= MAX_SIDE
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _bad_model(file, f"{type(error).__name__}: {shown(error, 100)}") from error
    if not sound:
        raise _bad_model(file, "architecture, num_classes or pretrained_cfg are not as timm writes them")
    return dict(config)


def _bad_model(file: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-062",
        "The file is no tagger of the WD family.",
        where=shown(file),
        why=f"{why}.",
        fix="take the tagger's files from its own repository; v3 taggers need onnxruntime 1.17 or newer",
    )
