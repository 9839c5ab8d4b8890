"""Build Dataset: from records to a frozen train set with its report in text and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..trainer.config import KINDS
from . import widgets
from .sockets import Dataset, TrainSet
from .step_progress import teller

ANY_KIND = "not said"
KIND_TOOLTIP = "What the LoRA is to learn; the report then knows how many pictures the guides ask for."


class BuildDataset(io.ComfyNode):
    """Sort a dataset into buckets, fix how its captions are used, and report all of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftBuildDataset",
            display_name="Build Dataset",
            category="LoraGraft/dataset",
            description="Sorts images into buckets of similar aspect ratio and fixes how captions are used. "
            "The "
            "report shows every bucket, what is cropped and the captions before anything is trained.",
            search_aliases=["buckets", "resolution", "shuffle caption", "training set", "regularisation"],
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder or any later step."),
                *widgets.inputs(io, widgets.dataset_widgets()),
                kind_input(),
                Dataset.Input(
                    "regularisation",
                    optional=True,
                    tooltip="Images of the class in general, for instance the uncropped originals. They are "
                    "repeated or left out until they are as many as the training images.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The base's text encoder: captions are then counted in its own tokens.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls, dataset: Any, kind: str = ANY_KIND, regularisation: Any = None, clip: Any = None, **values: Any
    ) -> io.NodeOutput:
        from ..trainer import api

        config = widgets.dataset_config(values)
        if regularisation is not None:
            dataset = api.add_regularisation(dataset, regularisation)
        return shown(api.build_train_set(dataset, config), kind, clip)


def kind_input() -> Any:
    """Return the widget that says what the LoRA is to learn."""
    return io.Combo.Input(
        "kind",
        options=[ANY_KIND, *KINDS[1:]],
        default=ANY_KIND,
        optional=True,
        advanced=True,
        tooltip=KIND_TOOLTIP,
    )


def outputs() -> list[Any]:
    """Return the outputs of the nodes that freeze a train set."""
    return [
        TrainSet.Output("train_set", display_name="train_set", tooltip="What Train LoRA trains on."),
        io.String.Output("report", display_name="report", tooltip="Buckets, crops and captions in words."),
        io.String.Output(
            "report_json",
            display_name="report_json",
            tooltip="The same as JSON: counts, buckets, tags, lengths, steps and warnings.",
        ),
        io.Image.Output(
            "pictures",
            display_name="pictures",
            tooltip="What training sees by bucket, the images' sizes, the most frequent tags.",
            is_output_list=True,
        ),
    ]


def shown(train_set: Any, kind: str, clip: Any) -> io.NodeOutput:
    """Return a frozen train set with its report: text, JSON, pictures on the node, and an HTML file."""
    import json

    from ..trainer import api
    from ..trainer.data.report_html import save_report_html
    from . import grids, host, host_pictures

    tell = teller()
    report = api.report_data(train_set, _viewpoint(kind, clip))
    pictures = api.report_pictures(train_set, report, tell)
    file = host.output_folder() / "reports" / f"dataset-{train_set.fingerprint[:8]}.html"
    save_report_html(report, file, pictures)
    views = [host.view(grids.write(host.temp_folder(), "report", p, None, None)) for _, p in pictures]
    text = "\n".join((*api.report_lines(report), f"As a page: output/loragraft/reports/{file.name}"))
    return io.NodeOutput(
        train_set,
        text,
        json.dumps(report, ensure_ascii=False, indent=1),
        [host_pictures.image_tensor(picture) for _, picture in pictures],
        ui={"images": views, "text": [text]},
    )


def _viewpoint(kind: str, clip: Any) -> Any:
    from ..trainer import api
    from ..trainer.data.tagger_models import read_labels
    from . import host_names, host_taggers

    count = None if clip is None else host_names.token_counter(clip)
    taggers: Mapping[str, Any] = host_taggers.find()
    tags = next((read_labels(files.labels).names for files in taggers.values()), ())
    return api.Viewpoint(
        kind=kind if kind in KINDS else "", num_tokens=count, known_word=api.known_word(tags, count)
    )
