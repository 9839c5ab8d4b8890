"""Small real taggers for tests: ONNX graphs of the WD family's signature whose outputs are known.

``pixels``: as many tags as the picture has numbers, each score one number of the input divided by 255,
so that every pixel fed to the graph can be read off. ``fixed``: the given scores, whatever the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 8
NUM_PIXELS = SIZE * SIZE * 3


def write_labels(file: Path, rows: Sequence[tuple[str, int]]) -> Path:
    """Write a selected_tags.csv of (name, category) rows."""
    lines = ["tag_id,name,category,count", *(f"{i},{name},{kind},1" for i, (name, kind) in enumerate(rows))]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def write_tagger(
    folder: Path,
    rows: Sequence[tuple[str, int]],
    scores: Sequence[float],
    *,
    batch: int | str = "batch",
    name: str = "tagger",
) -> Path:
    """Write NAME/model.onnx and its labels: the graph gives ``scores`` plus nothing of the picture."""
    target = folder / name
    target.mkdir(parents=True)
    write_labels(target / "selected_tags.csv", rows)
    flat = helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0)
    zero = helper.make_node("Mul", ["mean", "nothing"], ["zeros"])
    column = helper.make_node("Unsqueeze", ["zeros", "last"], ["column"])
    added = helper.make_node("Add", ["column", "scores"], ["output"])
    constants = [
        numpy_helper.from_array(np.float32(0), "nothing"),
        numpy_helper.from_array(np.array([1], np.int64), "last"),
        numpy_helper.from_array(np.array([scores], np.float32), "scores"),
    ]
    _write(target / "model.onnx", [flat, zero, column, added], constants, batch, len(scores))
    return target


def write_pixel_tagger(folder: Path, *, batch: int | str = "batch", name: str = "pixels") -> Path:
    """Write a tagger whose scores are the numbers it was fed, divided by 255."""
    target = folder / name
    target.mkdir(parents=True)
    write_labels(target / "selected_tags.csv", [(f"p{i}", 0) for i in range(NUM_PIXELS)])
    nodes = [
        helper.make_node("Reshape", ["input", "shape"], ["flat"]),
        helper.make_node("Div", ["flat", "white"], ["output"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1, NUM_PIXELS], np.int64), "shape"),
        numpy_helper.from_array(np.float32(255), "white"),
    ]
    _write(target / "model.onnx", nodes, constants, batch, NUM_PIXELS)
    return target


def write_graph(file: Path, shape: Sequence[int | str], *, kind: int = TensorProto.FLOAT) -> Path:
    """Write a graph that hands its input on, of any signature."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["output"])],
        "g",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", kind, shape)],
    )
    _save(graph, file)
    return file


def _write(file: Path, nodes: list, constants: list, batch: int | str, count: int) -> None:
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, count])],
        constants,
    )
    _save(graph, file)


def _save(graph: onnx.GraphProto, file: Path) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
