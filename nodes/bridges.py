"""Dataset to Images and Images to Dataset: any image node can take part between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from .sockets import Dataset
from .step_progress import teller

FORMATS = ("png", "jpeg", "webp")


class DatasetToImages(io.ComfyNode):
    """Unpack a dataset into lists of images, masks and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftDatasetToImages",
            display_name="Dataset to Images",
            category="LoraGraft/dataset",
            description="Unpacks a dataset's pictures (upright, cropped), masks and captions into lists, for "
            "any node that works on images: detectors, background removal, captioners. Images to Dataset "
            "brings them back.",
            search_aliases=["dataset to list", "image list", "unpack", "captions list"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder or any later step."),
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Number of the first picture; 0 is the first.",
                ),
                io.Int.Input(
                    "count", default=0, min=0, max=1_000_000, tooltip="How many pictures; 0 takes all."
                ),
                io.Int.Input(
                    "longest_side",
                    default=0,
                    min=0,
                    max=16384,
                    step=64,
                    tooltip="Shrink pictures so that no side is longer; 0 keeps their size. For detectors "
                    "and captioners, which need no more than 1024.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", is_output_list=True, tooltip="One image for each record."
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    is_output_list=True,
                    tooltip="Where each picture is learned: white fully, black not at all. White all over "
                    "without a mask.",
                ),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Each picture's caption.",
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    is_output_list=True,
                    tooltip="Each picture's name, with its folder.",
                ),
                Dataset.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="The records of these very pictures, for Images to Dataset and Crop.",
                ),
            ],
        )

    @classmethod
    def execute(cls, dataset: Any, first: int, count: int, longest_side: int) -> io.NodeOutput:
        from ..trainer import api
        from . import host_pictures

        chosen = api.chosen_records(dataset, first, count)
        api.check_memory(chosen.records, longest_side, host_pictures.free_memory())
        tell = teller()
        images, masks = [], []
        for number, record in enumerate(chosen.records, 1):
            picture, mask = api.to_picture(record, longest_side)
            images.append(host_pictures.image_tensor(picture))
            masks.append(host_pictures.mask_tensor(mask))
            tell(number, len(chosen.records))
        captions = [record.caption for record in chosen.records]
        return io.NodeOutput(images, masks, captions, [record.name for record in chosen.records], chosen)


class ImagesToDataset(io.ComfyNode):
    """Write lists of images, captions and masks into a working copy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftImagesToDataset",
            display_name="Images to Dataset",
            category="LoraGraft/dataset",
            description="Writes images into a working copy (output/loragraft/datasets/NAME) that is a "
            "dataset again. With a dataset linked, each image keeps its record's name, concept, repeats, "
            "caption and mask. What has not changed since the last run is not written again.",
            search_aliases=["images to dataset", "save dataset", "image list", "captions list"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images, as a list or as batches."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="The working copy: a folder below output/loragraft/datasets. With a dataset, "
                    "empty means: named after it.",
                ),
                io.Combo.Input(
                    "image_format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="png loses nothing; jpeg and webp are written at quality 97.",
                ),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="The records that the images were made of, in the same order.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="New captions, one for each image; they replace the dataset's.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="New masks, one for each image: white is learned fully, black not at all.",
                ),
                io.String.Input(
                    "class_tokens",
                    default="",
                    optional=True,
                    tooltip="Without a dataset: trigger words, which are the caption where none is given.",
                ),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The working copy as a dataset."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was written and what was there already."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[Any],
        name: list[str],
        image_format: list[str],
        dataset: list[Any] | None = None,
        captions: list[str] | None = None,
        masks: list[Any] | None = None,
        class_tokens: list[str] | None = None,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host_pictures

        if image_format[0] not in FORMATS:
            raise api.bad_option("image_format", image_format[0], f"one of {', '.join(FORMATS)}")
        like = dataset[0] if dataset else None
        made = api.from_pictures(
            host_pictures.pictures_of(images),
            _copy(name[0], like),
            like=like,
            captions=captions,
            masks=None if masks is None else host_pictures.masks_of(masks),
            class_tokens=class_tokens[0] if class_tokens else "",
            encoding=api.Encoding(image_format[0]),
            progress=teller(),
        )
        return io.NodeOutput(made, "\n".join(made.lines))


def _copy(name: str, like: Any | None) -> Path:
    """Return the working copy's folder; an empty name means one of the dataset's own."""
    from ..trainer import api
    from . import host

    if like is None:  # a name is needed: nothing else could be found again
        api.safe_name(name, what="name of the working copy")
    return host.working_copy_folder(name, like or api.Dataset(Path(name), (), ()), "edited")
