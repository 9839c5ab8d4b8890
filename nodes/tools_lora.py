"""Resize LoRA, Merge LoRAs and Convert LoRA: nodes from LoRA file to LoRA file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import tools_inputs as inputs


class ResizeLoRA(io.ComfyNode):
    """Bring a LoRA to another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftResizeLoRA",
            display_name="Resize LoRA",
            category=inputs.CATEGORY,
            description="Makes a LoRA smaller: keeps what matters most of every module, at a fixed rank or "
            "at "
            "one that each module needs. Works with every naming; LoHa and LoKr become plain LoRAs.",
            search_aliases=["rank", "dim", "shrink", "svd", "resize_lora"],
            is_output_node=True,
            inputs=[
                inputs.lora_name(),
                inputs.output_name("resized"),
                io.Int.Input(
                    "rank", default=32, min=1, max=4096, tooltip="The new rank; with sv_ methods the most."
                ),
                io.Combo.Input(
                    "method",
                    options=["fixed", "sv_ratio", "sv_fro", "sv_cumulative"],
                    default="fixed",
                    tooltip="fixed: the same rank everywhere. sv_fro, sv_cumulative, sv_ratio: each module "
                    "gets the "
                    "rank that parameter asks for.",
                ),
                io.Float.Input(
                    "parameter",
                    default=0.9,
                    min=0.0,
                    max=1000000.0,
                    step=0.01,
                    round=False,
                    tooltip="For the sv_ methods alone: the part to keep (0.9), for sv_ratio largest over "
                    "smallest (20).",
                ),
                io.Int.Input(
                    "conv_rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Rank of convolutions; 0: as rank.",
                ),
                *inputs.saving(),
            ],
            outputs=[inputs.name_output(), inputs.report_output()],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, output_name: str | None = None) -> bool | str:
        """Refuse names that mean no file before anything runs."""
        return inputs.check_names(lora_name, output_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> str:
        """Change when the LoRA file changes."""
        from . import host_files

        return host_files.stamp("loras", lora_name or "")

    @classmethod
    def execute(
        cls,
        lora_name: str,
        output_name: str,
        rank: int,
        method: str,
        parameter: float,
        conv_rank: int = 0,
        save_precision: str = "same",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host, host_files

        source = host_files.existing("loras", lora_name, widget="Resize LoRA: lora_name")
        output = api.Output(host_files.new_file("loras", output_name), save_precision, overwrite)
        settings = api.ResizeSettings(
            rank, conv_rank or None, method, None if method == "fixed" else parameter
        )
        return inputs.done(api.resize_lora(source, output, settings, device=str(host.device())))


class MergeLoRAs(io.ComfyNode):
    """Make one LoRA of several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftMergeLoRAs",
            display_name="Merge LoRAs",
            category=inputs.CATEGORY,
            description="Makes one LoRA of several, each at its ratio. concat is exact and adds the ranks; "
            "svd "
            "brings the result to the rank that is wanted; add is the simple sum of kohya's merge_lora.",
            search_aliases=["combine", "mix", "merge_lora", "svd_merge_lora"],
            is_output_node=True,
            inputs=[
                inputs.lora_lines(
                    "One LoRA below models/loras per line, a colon, and its ratio: style.safetensors: 0.8"
                ),
                inputs.output_name("merged"),
                io.Combo.Input(
                    "method",
                    options=["concat", "svd", "add"],
                    default="concat",
                    tooltip="concat: exact, the ranks are added. svd: brought to rank. add: equal ranks "
                    "alone, not "
                    "the same as both LoRAs together.",
                ),
                io.Int.Input(
                    "rank", default=0, min=0, max=4096, tooltip="The new rank of svd; 0 for the others."
                ),
                io.Int.Input(
                    "conv_rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Rank of 3x3 convolutions of svd; 0: as rank.",
                ),
                *inputs.saving(),
            ],
            outputs=[inputs.name_output(), inputs.report_output()],
        )

    @classmethod
    def validate_inputs(cls, loras: str | None = None, output_name: str | None = None) -> bool | str:
        """Refuse lines that cannot be read and names that mean no file before anything runs."""
        return inputs.check_names(None, output_name, lines=loras)

    @classmethod
    def fingerprint_inputs(cls, loras: str | None = None, **others: Any) -> str:
        """Change when a LoRA file changes."""
        from . import host_files

        return host_files.stamp(
            "loras", *(line.rpartition(":")[0] or line for line in (loras or "").splitlines())
        )

    @classmethod
    def execute(
        cls,
        loras: str,
        output_name: str,
        method: str,
        rank: int,
        conv_rank: int = 0,
        save_precision: str = "same",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host_files

        pairs = inputs.files_and_ratios(loras)
        files = [host_files.existing("loras", name, widget="Merge LoRAs: loras") for name, _ in pairs]
        output = api.Output(host_files.new_file("loras", output_name), save_precision, overwrite)
        settings = api.MergeSettings(method, rank or None, conv_rank or None)
        return inputs.done(api.merge_lora(files, [ratio for _, ratio in pairs], output, settings))


class ConvertLoRA(io.ComfyNode):
    """Write a LoRA under the names that another program reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftConvertLoRA",
            display_name="Convert LoRA",
            category=inputs.CATEGORY,
            description="Writes a LoRA under the names of kohya's trainer, of diffusers (PEFT) or of "
            "ComfyUI; what "
            "it does stays the same. For all supported base models.",
            search_aliases=["peft", "diffusers", "rename keys", "format"],
            is_output_node=True,
            inputs=[
                inputs.lora_name(),
                io.Combo.Input(
                    "naming",
                    options=list(inputs.NAMINGS),
                    default=inputs.NAMINGS[0],
                    tooltip="kohya: read by nearly everything. diffusers: its pipelines and PEFT. comfyui: "
                    "its generic "
                    "names.",
                ),
                inputs.output_name("converted"),
                *inputs.saving(),
            ],
            outputs=[inputs.name_output(), inputs.report_output()],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, output_name: str | None = None) -> bool | str:
        """Refuse names that mean no file before anything runs."""
        return inputs.check_names(lora_name, output_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> str:
        """Change when the LoRA file changes."""
        from . import host_files

        return host_files.stamp("loras", lora_name or "")

    @classmethod
    def execute(
        cls,
        lora_name: str,
        naming: str,
        output_name: str,
        save_precision: str = "same",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host_files

        source = host_files.existing("loras", lora_name, widget="Convert LoRA: lora_name")
        output = api.Output(host_files.new_file("loras", output_name), save_precision, overwrite)
        return inputs.done(api.convert_lora(source, output, naming))
