"""Build Dataset: from records to a frozen train set with its report."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import widgets
from .sockets import Dataset, TrainSet


class BuildDataset(io.ComfyNode):
    """Sort a dataset into buckets and fix how its captions are used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftBuildDataset",
            display_name="Build Dataset",
            category="LoraGraft/dataset",
            description="Sorts images into buckets of similar aspect ratio and fixes how captions are used. "
            "The "
            "report shows every bucket, what is cropped and the captions before anything is trained.",
            search_aliases=["buckets", "resolution", "shuffle caption", "training set"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder."),
                *widgets.inputs(io, widgets.dataset_widgets()),
            ],
            outputs=[
                TrainSet.Output("train_set", display_name="train_set", tooltip="What Train LoRA trains on."),
                io.String.Output(
                    "report", display_name="report", tooltip="Buckets, crops and captions in words."
                ),
            ],
        )

    @classmethod
    def execute(cls, dataset: Any, **values: Any) -> io.NodeOutput:
        from ..trainer import api

        train_set = api.build_train_set(dataset, widgets.dataset_config(values))
        return io.NodeOutput(train_set, "\n".join(train_set.lines))
