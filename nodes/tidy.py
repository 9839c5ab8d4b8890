"""Convert Images and Find Duplicates: a dataset's pictures in one format, and each of them once."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer.data.convert import FORMATS, NAMES
from .sockets import Dataset
from .step_progress import teller

LIST, SKIP = "list", "skip"
# What pictures looked like when they were last decoded.
_prints: dict[Any, Any] = {}


class ConvertImages(io.ComfyNode):
    """Write all pictures in one format into a working copy, numbered if wanted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftConvertImages",
            display_name="Convert Images",
            category="LoraGraft/dataset",
            description="Writes all pictures upright, in sRGB and in one format into a working copy below "
            "output/loragraft/datasets, with captions and masks. Originals are never changed; what is right "
            "already is not written again.",
            search_aliases=["rename images", "convert format", "png", "jpeg", "webp", "heic", "avif"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder or any later step."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="The format of all pictures. Those that have it already and need no change are "
                    "copied as they are.",
                ),
                io.Int.Input(
                    "quality",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Of jpeg and webp. 0 takes 97 for jpeg and 100 for webp, which is lossless.",
                ),
                io.Combo.Input(
                    "names",
                    options=list(NAMES),
                    default=NAMES[0],
                    tooltip="Keep the pictures' names, or number those of each subfolder: 0001, 0002, ... "
                    "Captions and masks go along.",
                ),
                io.String.Input(
                    "prefix", default="", tooltip="What stands before the numbers, for instance cat_."
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The working copy's folder below output/loragraft/datasets. Empty: named after "
                    "the dataset.",
                ),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The pictures of the copy."),
                io.String.Output(
                    "report", display_name="report", tooltip="How many were written, and how many unchanged."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, dataset: Any, format: str, quality: int, names: str, prefix: str, name: str = ""
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host

        copy = api.convert(
            dataset,
            host.working_copy_folder(name, dataset, "converted"),
            format=format,
            quality=quality,
            names=names,
            prefix=prefix,
            progress=teller(),
        )
        return io.NodeOutput(copy.dataset, "\n".join(copy.dataset.lines))


class FindDuplicates(io.ComfyNode):
    """List pictures that occur more than once, and go on with the best of each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftFindDuplicates",
            display_name="Find Duplicates",
            category="LoraGraft/dataset",
            description="Finds pictures that occur more than once: equal files, equal pixels in other "
            "formats, and scaled or recompressed copies. Of each group the largest is kept, then the least "
            "compressed, then the sharpest. No file is deleted.",
            search_aliases=["duplicates", "similar images", "perceptual hash", "dedup"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Image Folder or any later step."),
                io.Combo.Input(
                    "action",
                    options=[LIST, SKIP],
                    default=LIST,
                    tooltip="list: say what was found and let all pictures go on. skip: only the best of "
                    "each group goes on.",
                ),
                io.Boolean.Input(
                    "near",
                    default=True,
                    tooltip="Also find scaled, recompressed and slightly edited copies, not only equal ones.",
                ),
                io.Int.Input(
                    "distance",
                    default=4,
                    min=0,
                    max=16,
                    tooltip="In how many of 64 bits the perceptual hashes of near duplicates may differ. "
                    "More bits find more, also wrong ones.",
                ),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="What goes on."),
                Dataset.Output(
                    "duplicates",
                    display_name="duplicates",
                    tooltip="The pictures that the groups can do without.",
                ),
                io.Image.Output(
                    "preview",
                    display_name="preview",
                    tooltip="The first groups; the picture that is kept stands in front.",
                ),
                io.String.Output("report", display_name="report", tooltip="Every group in words."),
            ],
        )

    @classmethod
    def execute(cls, dataset: Any, action: str, near: bool, distance: int) -> io.NodeOutput:
        from ..trainer import api
        from . import grids, host, host_pictures

        groups = api.find_duplicates(dataset, near=near, distance=distance, prints=_prints, progress=teller())
        kept, rest = api.without_duplicates(dataset, groups)
        lines = api.duplicate_lines(groups)
        shown = kept if action == SKIP else dataset
        result = shown.replaced(shown.records, *lines)
        sheet = api.duplicate_sheet(groups)
        path = grids.write(host.temp_folder(), "duplicates", sheet, None, None)
        return io.NodeOutput(
            result,
            rest,
            host_pictures.image_tensor(sheet),
            "\n".join(result.lines),
            ui={"images": [host.view(path)]},
        )
