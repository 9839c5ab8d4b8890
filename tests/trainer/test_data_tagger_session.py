"""The tagger's input, pixel for pixel, through a real ONNX graph; what runs it; and its end."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.data import tagger_session
from loragraft.trainer.data.tagger_models import TaggerFiles, find_taggers
from loragraft.trainer.data.tagger_session import open_session, prepare
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture

pytest.importorskip("onnx", reason="pip install -e .[dev]")
pytest.importorskip("onnxruntime", reason="pip install -e .[dev]")

from loragraft_tests.trainer import tagger_files

SIZE = tagger_files.SIZE


def fed(folder: Path, image: Image.Image) -> np.ndarray:
    """Return the numbers that arrive inside the graph for a picture."""
    with open_session(find_taggers([folder], hub_cache=False)["pixels"], device="cpu") as session:
        scores = session.run(prepare(image, session.size)[None])
    return np.round(scores[0] * 255, 3).reshape(SIZE, SIZE, 3)


def canonical(image: Image.Image, size: int) -> np.ndarray:
    """The author's own steps, written out once more with numpy and another way of padding."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.pad(
        pixels,
        ((top, side - height - top), (left, side - width - left), (0, 0)),
        constant_values=255,
    )
    small = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(small).astype(np.float32)[:, :, [2, 1, 0]]


@pytest.mark.parametrize("size", [(8, 8), (40, 23), (23, 40), (7, 3), (3, 8), (100, 1), (5, 6)])
def test_every_pixel_that_the_graph_is_fed(tmp_path: Path, size: tuple[int, int]) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    image = picture(size, shade=77)
    found = fed(tmp_path, image)
    assert np.array_equal(found, canonical(image, SIZE))


def test_the_order_is_bgr_and_nothing_is_normalised(tmp_path: Path) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    found = fed(tmp_path, Image.new("RGB", (SIZE, SIZE), (255, 128, 3)))
    assert (found == np.array([3, 128, 255])).all()


def test_the_padding_is_white_and_its_offset_is_rounded_down(tmp_path: Path) -> None:
    """8 x 5 in a square of 8: one row above, two below."""
    tagger_files.write_pixel_tagger(tmp_path)
    found = fed(tmp_path, Image.new("RGB", (8, 5), (0, 0, 0)))
    assert (found[0] == 255).all() and (found[6:] == 255).all()
    assert (found[1:6] == 0).all()
    found = fed(tmp_path, Image.new("RGB", (5, 8), (0, 0, 0)))
    assert (found[:, 0] == 255).all() and (found[:, 6:] == 255).all() and (found[:, 1:6] == 0).all()


def test_the_resampling_is_bicubic(tmp_path: Path) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    image = Image.effect_noise((33, 33), 90).convert("RGB")
    found = fed(tmp_path, image)[:, :, ::-1]
    kinds = {kind: np.asarray(image.resize((SIZE, SIZE), kind)) for kind in Image.Resampling}
    assert [kind for kind, pixels in kinds.items() if np.array_equal(found, pixels)] == [
        Image.Resampling.BICUBIC
    ]


@settings(max_examples=cases(300), deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_preparation_is_the_authors_for_any_size(width: int, height: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = prepare(image, size)
    assert found.dtype == np.float32 and found.shape == (size, size, 3) and found.flags["C_CONTIGUOUS"]
    assert np.array_equal(found, canonical(image, size))


# ---- sessions ----


def test_a_fixed_and_a_dynamic_first_dimension(tmp_path: Path) -> None:
    for batch, expected in (("batch", None), (1, 1), (4, 4)):
        tagger_files.write_pixel_tagger(tmp_path, batch=batch, name=f"n{batch}")
        files = find_taggers([tmp_path], hub_cache=False)[f"n{batch}"]
        with open_session(files, device="cpu") as session:
            assert (session.max_batch, session.size, session.num_tags) == (expected, SIZE, SIZE * SIZE * 3)
            assert "onnxruntime" in session.line and "CPU" in session.line


def test_the_graph_is_freed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    runtime = importlib.import_module("onnxruntime")
    graphs: list[weakref.ref[Any]] = []
    real = runtime.InferenceSession

    def watched(*args: Any, **options: Any) -> Any:
        session = real(*args, **options)
        graphs.append(weakref.ref(session))
        return session

    monkeypatch.setattr(runtime, "InferenceSession", watched)
    with open_session(find_taggers([tmp_path], hub_cache=False)["pixels"]) as session:
        assert graphs[0]() is not None
    gc.collect()
    assert graphs[0]() is None, "the session is still in memory"
    with pytest.raises(RuntimeError, match="closed"):
        session.run(np.zeros((1, SIZE, SIZE, 3), np.float32))


@pytest.mark.parametrize(
    ("available", "device", "expected"),
    [
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], "auto",
         ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        (["CPUExecutionProvider", "DmlExecutionProvider"], "auto",
         ["DmlExecutionProvider", "CPUExecutionProvider"]),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu", ["CPUExecutionProvider"]),
        (["CoreMLExecutionProvider", "CPUExecutionProvider"], "auto", ["CPUExecutionProvider"]),
        (["AzureExecutionProvider", "CPUExecutionProvider"], "auto", ["CPUExecutionProvider"]),
    ],
)  # fmt: skip
def test_providers_are_those_wanted_and_there(available: list[str], device: str, expected: list[str]) -> None:
    assert tagger_session._providers(available, device) == expected


def test_the_user_is_told_that_the_cpu_works(tmp_path: Path) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    files = find_taggers([tmp_path], hub_cache=False)["pixels"]
    with open_session(files, device="auto") as session:
        assert any("CPU" in note and "onnxruntime-gpu" in note for note in session.notes)
    with open_session(files, device="cpu") as session:
        assert session.notes == ()


def test_a_gpu_that_fails_on_the_first_picture_hands_over_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    runtime = importlib.import_module("onnxruntime")
    real = runtime.InferenceSession

    class Broken:
        """A session whose GPU provider loads and then fails, as on a machine with a wrong cuDNN."""

        def __init__(self, path: str, providers: list[str]) -> None:
            self._real, self._providers = real(path, providers=["CPUExecutionProvider"]), providers

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def get_providers(self) -> list[str]:
            return self._providers

        def run(self, *args: Any) -> Any:
            if self._providers[0] != "CPUExecutionProvider":
                raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")
            return self._real.run(*args)

    monkeypatch.setattr(runtime, "InferenceSession", Broken)
    monkeypatch.setattr(
        runtime, "get_available_providers", lambda: ["DmlExecutionProvider", "CPUExecutionProvider"]
    )
    with open_session(find_taggers([tmp_path], hub_cache=False)["pixels"]) as session:
        assert any("CUDNN_STATUS" in note for note in session.notes)
        assert session.line.endswith("CPU")
        assert session.run(np.full((1, SIZE, SIZE, 3), 255, np.float32)).max() == 1


def test_without_a_runtime_the_message_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger_files.write_pixel_tagger(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    files = find_taggers([tmp_path], hub_cache=False)["pixels"]
    with Refusal("LG-DATA-061", "pip install onnxruntime", "model.safetensors"), open_session(files):
        pass


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 448, 448), "3, 448, 448"),
        (("n", 8, 9, 3), "8, 9, 3"),
        ((1, 8, 8), "8, 8"),
        (("n", "h", "w", 3), "h"),
        ((1, 100_000, 100_000, 3), "100000"),
    ],
)
def test_a_graph_of_another_signature_is_refused(tmp_path: Path, shape: Any, words: str) -> None:
    graph = tagger_files.write_graph(tmp_path / "x.onnx", shape)
    files = TaggerFiles("x", tmp_path / "x.csv", graph)
    with Refusal("LG-DATA-062", "x.onnx", words), open_session(files):
        pass


@pytest.mark.parametrize("content", [b"", b"not a graph", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    graph = tmp_path / "x.onnx"
    graph.write_bytes(content)
    with Refusal("LG-DATA-062", "x.onnx"), open_session(TaggerFiles("x", tmp_path / "x.csv", graph)):
        pass


# ---- timm ----


def test_timm_weights_give_what_the_authors_script_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real timm where it is installed: its network on the author's transform against our way."""
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no timm: {error}")
    from safetensors.torch import save_file

    folder = tmp_path / "tiny"
    folder.mkdir()
    name, arguments = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 16}
    model = timm.create_model(name, num_classes=7, **arguments).train(False)
    save_file(model.state_dict(), folder / "model.safetensors")
    trained = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.2], "num_classes": 7}
    trained |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": name, "num_classes": 7, "model_args": arguments, "pretrained_cfg": trained}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tagger_files.write_labels(folder / "selected_tags.csv", [(f"t{i}", 0) for i in range(7)])
    image = picture((50, 31), shade=200)
    with open_session(find_taggers([tmp_path], hub_cache=False)["tiny"]) as session:
        found = session.run(prepare(image, session.size)[None])
        assert "timm" in session.line
    rgb = torch.from_numpy(canonical(image, 32)[:, :, ::-1].copy()).permute(2, 0, 1)[None] / 255
    mean, deviation = (torch.tensor(trained[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = torch.sigmoid(model(((rgb - mean) / deviation)[:, [2, 1, 0]])).numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_timm_is_called_as_it_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm: a stand-in network shows the channels' order, the scale and that no net is used."""
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    calls: list[dict[str, Any]] = []

    class Network(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            return torch.logit(pixels.mean(dim=(2, 3)).clamp(0.01, 0.99))

    def create_model(architecture: str, **options: Any) -> Any:
        calls.append({"architecture": architecture, **options})
        return Network()

    stand_in = types.ModuleType("timm")
    stand_in.create_model = create_model  # type: ignore[attr-defined]
    stand_in.__version__ = "1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    trained = {"input_size": [3, 4, 4], "mean": [0, 0, 0], "std": [1, 1, 1], "hf_hub_id": "a/b", "url": "x"}
    config = {"architecture": "net", "num_classes": 3, "pretrained_cfg": trained}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tagger_files.write_labels(folder / "selected_tags.csv", [("a", 0), ("b", 0), ("c", 0)])
    with open_session(find_taggers([tmp_path], hub_cache=False)["tiny"]) as session:
        scores = session.run(prepare(Image.new("RGB", (4, 4), (204, 102, 51)), session.size)[None])
    assert np.allclose(scores, [[0.2, 0.4, 0.8]], atol=1e-3)  # BGR
    (call,) = calls
    assert call["num_classes"] == 3
    assert call["pretrained_cfg"]["file"].endswith("model.safetensors")
    assert not call["pretrained_cfg"]["hf_hub_id"] and not call["pretrained_cfg"]["url"]


@pytest.mark.parametrize(
    "config",
    ["", "[]", "{}", '{"architecture": 3}', '{"architecture": "a", "num_classes": 1, "pretrained_cfg": {}}',
     '{"architecture": "a", "num_classes": 1, "pretrained_cfg": {"mean": [1], "std": [1], "input_size": []}}',
     "[" * 5000],
)  # fmt: skip
def test_a_broken_timm_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(config, "utf-8")
    tagger_files.write_labels(folder / "selected_tags.csv", [("a", 0)])
    files = find_taggers([tmp_path], hub_cache=False)["tiny"]
    with Refusal("LG-DATA-062", "config.json"), open_session(files):
        pass
