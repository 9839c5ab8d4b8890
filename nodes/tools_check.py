"""Check LoRA: what a file holds, and whether it is whole and trained."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import tools_inputs as inputs


class CheckLoRA(io.ComfyNode):
    """Say whether a LoRA file is whole and trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftCheckLoRA",
            display_name="Check LoRA",
            category=inputs.CATEGORY,
            description="Looks into a LoRA file: broken numbers, modules that were never trained, sizes and "
            "norms "
            "of all tensors. At clip_skip 2 six zero tensors are right: the text encoder's last layer has "
            "no effect.",
            search_aliases=["check_lora_weights", "inspect", "nan", "zero", "black image"],
            is_output_node=True,
            inputs=[
                inputs.lora_name(),
                io.Int.Input(
                    "clip_skip",
                    default=0,
                    min=0,
                    max=12,
                    optional=True,
                    advanced=True,
                    tooltip="clip_skip of the training; 0: as the file says.",
                ),
            ],
            outputs=[
                io.Boolean.Output(
                    "good", display_name="good", tooltip="Whether nothing is wrong with the file."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The verdict, then a line for each tensor."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        """Refuse a name that means no file before anything runs."""
        return inputs.check_names(lora_name, None)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> str:
        """Change when the LoRA file changes."""
        from . import host_files

        return host_files.stamp("loras", lora_name or "")

    @classmethod
    def execute(cls, lora_name: str, clip_skip: int = 0) -> io.NodeOutput:
        from ..trainer import api
        from . import host_files

        path = host_files.existing("loras", lora_name, widget="Check LoRA: lora_name")
        found = api.check_lora(path, clip_skip=clip_skip or None)
        verdict = "\n".join((*found.remarks, *(f"zero: {key}" for key in found.zero)))
        table = "\n".join(("tensor,shape,mean(abs),min(abs),norm", *map(str, found.rows)))
        return io.NodeOutput(found.good, f"{verdict}\n\n{table}", ui={"text": [verdict]})
