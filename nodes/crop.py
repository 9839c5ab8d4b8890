"""Crop: which part of each picture is trained, with a picture of what is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..trainer.data.crop import CropSettings
from ..trainer.data.subjects import SEVERAL
from ..trainer.errors import LoraGraftError
from . import picture_widgets, widgets
from .sockets import Dataset
from .step_progress import teller

COMMON = ("mode", "align", "width", "height")
ADVANCED = ("max_aspect", "margin", "subject_shape", "min_side")
# ComfyUI's own type, as a plain socket. By itself the page would make it a widget, which sends a rectangle of
# 512 x 512 even where no detector is linked.
BoundingBox = io.Custom("BOUNDING_BOX")


class Crop(io.ComfyNode):
    """Crop a dataset by an edit of its records; no pixel is written unless small pictures are enlarged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftCrop",
            display_name="Crop",
            category="LoraGraft/dataset",
            description="Chooses which part of each picture is trained. Nothing is stretched, and no "
            "original is changed. The preview shows what is cut off, hatched, and flags pictures whose "
            "subject touches the edge. With an upscale model, small pictures are enlarged, at most twice.",
            search_aliases=["crop", "square", "face crop", "bounding box", "upscale dataset", "aspect ratio"],
            is_input_list=True,
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder or any later step."),
                *widgets.inputs(io, picture_widgets.widgets_of(CropSettings, COMMON)),
                BoundingBox.Input(
                    "bboxes",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip="Where the subject is, from any detector that gives ComfyUI's BOUNDING_BOX, for "
                    "the images of Dataset to Images. A single box holds for all pictures.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Instead of bboxes: where the subject is, as masks (white), one for each "
                    "picture.",
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="Enlarges pictures that are smaller than upscale_to, at most twice. From Load "
                    "Upscale Model.",
                ),
                *widgets.inputs(io, picture_widgets.widgets_of(CropSettings, ADVANCED)),
                io.Combo.Input(
                    "several",
                    options=list(SEVERAL),
                    default=SEVERAL[0],
                    optional=True,
                    advanced=True,
                    tooltip="Several boxes in one picture: take all together, or only the largest.",
                ),
                io.Int.Input(
                    "boxes_longest_side",
                    default=0,
                    min=0,
                    max=16384,
                    optional=True,
                    advanced=True,
                    tooltip="Where the detector saw shrunk images: the longest_side of Dataset to Images. 0: "
                    "they had their full size.",
                ),
                io.Int.Input(
                    "upscale_to",
                    default=1024,
                    min=64,
                    max=8192,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="With an upscale model: pictures of less area than this side squared are "
                    "enlarged up to it. Use the training resolution.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="With an upscale model: the folder below output/loragraft/datasets that enlarged "
                    "pictures are written into. Empty: named after the dataset.",
                ),
                io.String.Input(
                    "reg_caption",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Caption of the originals, usually the class word alone, for instance: girl. "
                    "Empty keeps each picture's own.",
                ),
            ],
            outputs=[
                Dataset.Output(
                    "dataset", display_name="dataset", tooltip="The dataset with the crops as edits."
                ),
                Dataset.Output(
                    "originals",
                    display_name="originals",
                    tooltip="The uncropped pictures of those that were cropped, marked as regularisation "
                    "images: training on both keeps subject and background apart.",
                ),
                io.Image.Output(
                    "preview",
                    display_name="preview",
                    tooltip="The flagged and most cropped pictures; what is cut off is hatched.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How much is cut off, and where the subject suffers.",
                ),
            ],
        )

    @classmethod
    def execute(cls, dataset: list[Any], **values: Any) -> io.NodeOutput:
        from ..trainer import api
        from . import grids, host, host_pictures

        bboxes, masks = values.pop("bboxes", None), values.pop("masks", None)
        models = values.pop("upscale_model", None) or [None]
        single = {name: _single(name, given) for name, given in values.items()}
        settings = picture_widgets.settings_of(CropSettings, single)
        whole = _single("dataset", dataset)
        tell = teller()
        subjects = _subjects(whole, settings, bboxes, masks, single)
        cropped = api.crop_dataset(whole, settings, subjects, reg_caption=single.get("reg_caption", ""))
        result = cropped.dataset
        if models[0] is not None:
            result = api.upscale_small(
                result,
                host.working_copy_folder(single.get("name", ""), whole, "upscaled"),
                host_pictures.upscaler(models[0]),
                target=single.get("upscale_to", 1024),
                progress=tell,
            )
        sheet = api.crop_preview(cropped.edits, progress=tell)
        path = grids.write(host.temp_folder(), "crop", sheet, None, None)
        report = "\n".join(result.lines)
        return io.NodeOutput(
            result,
            cropped.originals,
            host_pictures.image_tensor(sheet),
            report,
            ui={"images": [host.view(path)]},
        )


def _subjects(
    dataset: Any, settings: CropSettings, bboxes: list[Any] | None, masks: list[Any] | None, values: Any
) -> Sequence[Any] | None:
    """Return each picture's subject from whichever socket is linked, else from the dataset's own masks."""
    from ..trainer import api
    from . import host_pictures

    if bboxes is not None and masks is not None:
        raise LoraGraftError(
            "LG-DATA-057",
            "Both bboxes and masks are linked.",
            where="Crop: bboxes, masks",
            why="they may disagree about where the subject is.",
            fix="unlink one of them",
        )
    sizes = [record.size for record in dataset.records]
    if bboxes is not None:
        return api.subjects_from_boxes(
            bboxes,
            sizes,
            several=values.get("several", SEVERAL[0]),
            longest_side=values.get("boxes_longest_side", 0),
        )
    if masks is not None:
        found = host_pictures.masks_of(masks)
        found = found * len(sizes) if len(found) == 1 else found
        if len(found) != len(sizes):
            return [None] * len(found)  # refused for its number
        return [api.subject_from_mask(mask, size) for mask, size in zip(found, sizes, strict=True)]
    if settings.mode == "subject" and any(record.mask for record in dataset.records):
        return api.own_subjects(dataset)
    return None


def _single(name: str, given: Any) -> Any:
    """Return the one value of a widget; the node takes lists only for boxes and masks."""
    if not isinstance(given, list):
        return given
    if len(given) != 1:
        raise LoraGraftError(
            "LG-DATA-058",
            f"The input {name} got {len(given)} values, expected one.",
            where=f"Crop: {name}",
            why="a list is linked to it.",
            fix="link a single value; lists are for bboxes and masks",
        )
    return given[0]
