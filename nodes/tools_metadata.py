"""LoRA Metadata: show what a LoRA file says of itself, and change it."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io

from ..trainer.errors import LoraGraftError
from . import tools_inputs as inputs


class LoRAMetadata(io.ComfyNode):
    """Show and edit a LoRA's metadata; its tensors are not touched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftLoRAMetadata",
            display_name="LoRA Metadata",
            category=inputs.CATEGORY,
            description="Shows what a LoRA file says of itself: trigger words, settings, tags. With lines "
            "in set, or a "
            "thumbnail, it writes them into the file; tensors, hash and workflow stay.",
            search_aliases=["modelspec", "trigger words", "thumbnail", "show_metadata", "edit metadata"],
            is_output_node=True,
            inputs=[
                inputs.lora_name(),
                io.String.Input(
                    "changes",
                    default="",
                    multiline=True,
                    tooltip="One field per line, a colon, and its text: title, trigger_phrase, author, "
                    "description, "
                    "license, tags, usage_hint, comment. An empty text removes the field.",
                ),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip="Name of the changed file in models/loras; empty: the file itself, with "
                    "overwrite on.",
                ),
                io.Image.Input(
                    "thumbnail", optional=True, tooltip="Picture to put into the file, shrunk to 256 pixels."
                ),
                *inputs.saving(precision=False),
            ],
            outputs=[
                io.String.Output("metadata", display_name="metadata", tooltip="All of it, as JSON."),
                io.String.Output(
                    "trigger_phrase", display_name="trigger_phrase", tooltip="The trigger words, for prompts."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, lora_name: str | None = None, changes: str | None = None, output_name: str | None = None
    ) -> bool | str:
        """Refuse names that mean no file, and lines that cannot be read, before anything runs."""
        from . import host_files

        def check() -> None:
            if lora_name is not None:
                host_files.existing("loras", lora_name, widget="lora_name")
            if output_name:
                host_files.new_file("loras", output_name)
            parse_changes(changes or "")

        return inputs.refusal(check)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> str:
        """Change when the LoRA file changes."""
        from . import host_files

        return host_files.stamp("loras", lora_name or "")

    @classmethod
    def execute(
        cls,
        lora_name: str,
        changes: str,
        output_name: str,
        thumbnail: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import grids, host_files

        path = host_files.existing("loras", lora_name, widget="LoRA Metadata: lora_name")
        given = parse_changes(changes)
        if given or thumbnail is not None:
            told = api.edit_metadata(
                path,
                given,
                thumbnail=None if thumbnail is None else grids.to_pil(thumbnail[0].cpu()),
                output=host_files.new_file("loras", output_name) if output_name.strip() else None,
                overwrite=overwrite,
            )
        else:
            told = api.lora_metadata(path)
        text = json.dumps(told, ensure_ascii=False, indent=1, sort_keys=True)
        shown = "\n".join(api.metadata_lines(told))
        return io.NodeOutput(text, told.get("modelspec.trigger_phrase", ""), ui={"text": [shown]})


def parse_changes(text: str) -> dict[str, str]:
    """Read lines such as "title: My LoRA"; raises LG-TOOL-014."""
    found = {}
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        key, sign, value = line.partition(":")
        if not sign:
            raise LoraGraftError(
                "LG-TOOL-014",
                f"{line[:60]!r} changes nothing.",
                where="LoRA Metadata: changes",
                why="a line is a field, a colon and a text.",
                fix="write for instance title: My LoRA",
            )
        found[key.strip()] = value.strip()
    return found
