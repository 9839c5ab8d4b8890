"""Edit Captions and Set Captions: captions changed by operations, or taken from other nodes' texts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .sockets import Dataset


class EditCaptions(io.ComfyNode):
    """Apply an ordered list of caption operations."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..trainer.data.caption_ops import PRESETS

        return io.Schema(
            node_id="LoraGraftEditCaptions",
            display_name="Edit Captions",
            category="LoraGraft/dataset",
            description="Changes captions by an ordered list of operations, one per line: trigger "
            "words, pruning, replacing, merging, templates. Caption files are not changed. The report "
            "shows what each line did and the tag frequencies before and after.",
            search_aliases=["caption", "prune tags", "trigger word", "delete tags", "tag editor"],
            inputs=[
                Dataset.Input("dataset", tooltip="The images whose captions are edited."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="none",
                    tooltip="Done first. all tags: trigger word first. prune features: also delete "
                    "hair, eyes and body. keep list: keep only people, action, view, expression, "
                    "background and framing. trigger only: nothing but the trigger word.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Trigger words of the preset. Empty: the words of each image's folder.",
                ),
                io.String.Input(
                    "operations",
                    default="",
                    multiline=True,
                    tooltip="One operation per line, done in order, for instance 'delete: [hair], *hat' "
                    "or 'merge: shirt'. The node's help lists all.",
                ),
                io.String.Input(
                    "separator",
                    default=",",
                    optional=True,
                    advanced=True,
                    tooltip="What stands between two tags.",
                ),
            ],
            outputs=[
                Dataset.Output(
                    "dataset", display_name="dataset", tooltip="The images with their new captions."
                ),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The captions, one per image.",
                ),
                io.String.Output(
                    "prompts",
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="The captions as prompts, brackets escaped. Training reads brackets as they are.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What each line did, and the tag frequencies before and after.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, dataset: Any, preset: str, trigger: str, operations: str, separator: str = ","
    ) -> io.NodeOutput:
        from ..trainer import api

        edited = api.edit_captions(dataset, operations, preset=preset, trigger=trigger, separator=separator)
        captions = [record.caption for record in edited.dataset.records]
        prompts = [api.escape_brackets(caption) for caption in captions]
        return io.NodeOutput(edited.dataset, captions, prompts, "\n".join(edited.lines))


class SetCaptions(io.ComfyNode):
    """Take captions from a list of texts, one per image in order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftSetCaptions",
            display_name="Set Captions",
            category="LoraGraft/dataset",
            description="Sets captions from a list of texts, for instance of a captioning model "
            "(Florence2, JoyCaption, Qwen-VL) that ran on the dataset's images: the first text goes to "
            "the first image, and so on.",
            search_aliases=["vlm caption", "florence2", "joycaption", "caption list"],
            is_input_list=True,
            inputs=[
                Dataset.Input("dataset", tooltip="The images, in the order in which they were captioned."),
                io.String.Input(
                    "captions", force_input=True, tooltip="A list of texts, exactly one for each image."
                ),
                io.String.Input(
                    "template",
                    default="{caption}",
                    multiline=True,
                    tooltip="How a caption is put together. Names in braces: caption is the text, tags "
                    "the caption so far, trigger the trigger words, class the folder's words.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="The trigger words that the template may name. Empty: the words of each "
                    "image's folder.",
                ),
            ],
            outputs=[
                Dataset.Output(
                    "dataset", display_name="dataset", tooltip="The images with their new captions."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was set, and the tag frequencies before and after.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, dataset: list[Any], captions: list[str], template: list[str], trigger: list[str]
    ) -> io.NodeOutput:
        from ..trainer import api

        edited = api.set_captions(dataset[0], captions, template=template[0], trigger=trigger[0])
        return io.NodeOutput(edited.dataset, "\n".join(edited.lines))
