"""Merge into Checkpoint, Extract LoRA and Convert Checkpoint: nodes that read or write whole models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import tools_inputs as inputs
from .step_progress import teller

CHECKPOINT_TOOLTIP = (
    "Checkpoint file below models/checkpoints, or a denoiser's below models/diffusion_models, "
    "with .safetensors."
)
MODELS = ("checkpoints", "diffusion_models")  # folders in which a name is looked for


class MergeIntoCheckpoint(io.ComfyNode):
    """Put LoRAs into a checkpoint for good."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftMergeIntoCheckpoint",
            display_name="Merge into Checkpoint",
            category=inputs.CATEGORY,
            description="Writes a copy of a checkpoint with LoRAs in it, each at its ratio: it draws as the "
            "checkpoint "
            "with these LoRAs loaded. Memory stays small whatever the checkpoint's size.",
            search_aliases=["bake lora", "merge_lora", "save checkpoint with lora"],
            is_output_node=True,
            inputs=[
                io.String.Input("checkpoint", default="", tooltip=CHECKPOINT_TOOLTIP),
                inputs.lora_lines(
                    "One LoRA below models/loras per line, a colon, and its ratio: style.safetensors: 0.8"
                ),
                inputs.output_name("merged", "models/checkpoints"),
                *inputs.saving(),
            ],
            outputs=[inputs.name_output("checkpoint_name"), inputs.report_output()],
        )

    @classmethod
    def validate_inputs(
        cls, checkpoint: str | None = None, loras: str | None = None, output_name: str | None = None
    ) -> bool | str:
        """Refuse names that mean no file before anything runs."""
        from . import host_files

        def check() -> None:
            _check_models(checkpoint=checkpoint)
            for name, _ in inputs.files_and_ratios(loras or ""):
                host_files.existing("loras", name, widget="loras")
            if output_name is not None:
                host_files.new_file("checkpoints", output_name)

        return inputs.refusal(check)

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str | None = None, loras: str | None = None, **others: Any
    ) -> str:
        """Change when a file changes."""
        from . import host_files

        names = (line.rpartition(":")[0] or line for line in (loras or "").splitlines())
        stamp = host_files.stamp(_kind(checkpoint or ""), checkpoint or "")
        return stamp + "\n" + host_files.stamp("loras", *names)

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        loras: str,
        output_name: str,
        save_precision: str = "same",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host, host_files

        where = "Merge into Checkpoint"
        kind = _kind(checkpoint)
        source = host_files.existing(kind, checkpoint, widget=f"{where}: checkpoint")
        pairs = inputs.files_and_ratios(loras)
        files = [
            (host_files.existing("loras", name, widget=f"{where}: loras"), ratio) for name, ratio in pairs
        ]
        target = host_files.new_file(kind, output_name, source=source)
        output = api.Output(target, save_precision, overwrite)
        return inputs.done(
            api.merge_checkpoint(source, files, output, device=str(host.device()), tell=teller())
        )


class ExtractLoRA(io.ComfyNode):
    """Take the difference of two checkpoints as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftExtractLoRA",
            display_name="Extract LoRA",
            category=inputs.CATEGORY,
            description="Makes a LoRA of what a tuned checkpoint has learnt: the difference to the "
            "checkpoint that it "
            "was trained from, approximated at a rank. The report says how much of it each module lacks.",
            search_aliases=["extract_lora_from_models", "difference", "svd"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "original", default="", tooltip=f"{CHECKPOINT_TOOLTIP} The one that was trained from."
                ),
                io.String.Input("tuned", default="", tooltip=f"{CHECKPOINT_TOOLTIP} The trained one."),
                inputs.output_name("extracted"),
                io.Int.Input("rank", default=32, min=1, max=4096, tooltip="The LoRA's rank."),
                io.Int.Input(
                    "conv_rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Rank of 3x3 convolutions; 0 leaves them out.",
                ),
                io.Float.Input(
                    "clamp_quantile",
                    default=0.99,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="Values beyond this quantile are cut off, as kohya does; 1 cuts nothing.",
                ),
                io.Float.Input(
                    "min_diff",
                    default=0.01,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="A text encoder whose weights differ by no more than this is left out.",
                ),
                *inputs.saving(),
            ],
            outputs=[inputs.name_output(), inputs.report_output()],
        )

    @classmethod
    def validate_inputs(
        cls, original: str | None = None, tuned: str | None = None, output_name: str | None = None
    ) -> bool | str:
        """Refuse names that mean no file before anything runs."""
        from . import host_files

        def check() -> None:
            _check_models(original=original, tuned=tuned)
            if output_name is not None:
                host_files.new_file("loras", output_name)

        return inputs.refusal(check)

    @classmethod
    def fingerprint_inputs(cls, original: str | None = None, tuned: str | None = None, **others: Any) -> str:
        """Change when a checkpoint changes."""
        from . import host_files

        return "\n".join(host_files.stamp(_kind(name or ""), name or "") for name in (original, tuned))

    @classmethod
    def execute(
        cls,
        original: str,
        tuned: str,
        output_name: str,
        rank: int,
        conv_rank: int,
        clamp_quantile: float = 0.99,
        min_diff: float = 0.01,
        save_precision: str = "same",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host, host_files

        where = "Extract LoRA"
        first = host_files.existing(_kind(original), original, widget=f"{where}: original")
        second = host_files.existing(_kind(tuned), tuned, widget=f"{where}: tuned")
        output = api.Output(host_files.new_file("loras", output_name), save_precision, overwrite)
        settings = api.ExtractSettings(rank, conv_rank or None, clamp_quantile, min_diff)
        return inputs.done(
            api.extract_lora_file(first, second, output, settings, device=str(host.device()), tell=teller())
        )


class ConvertCheckpoint(io.ComfyNode):
    """Turn a diffusers folder into a single file, or a single file into a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftConvertCheckpoint",
            display_name="Convert Checkpoint",
            category=inputs.CATEGORY,
            description="Turns a diffusers folder below models/diffusers into a single file in "
            "models/checkpoints, or "
            "a checkpoint into such a folder; every value stays as it is. Folders of all supported base "
            "models, files of SD1.x, SD2.x and SDXL; with another VAE if wanted.",
            search_aliases=["diffusers to ckpt", "ckpt to diffusers", "single file", "replace vae"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "model",
                    default="",
                    tooltip="A checkpoint below models/checkpoints with .safetensors, or a folder below "
                    "models/diffusers.",
                ),
                inputs.output_name(
                    "converted", "models/checkpoints, or of the new folder in models/diffusers"
                ),
                io.String.Input(
                    "vae",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="VAE file below models/vae that replaces the model's own; empty keeps it.",
                ),
                *inputs.saving(precision=False),
            ],
            outputs=[
                io.String.Output(
                    "path", display_name="path", tooltip="The new file or folder, below models."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, model: str | None = None, output_name: str | None = None, vae: str | None = None
    ) -> bool | str:
        """Refuse names that mean no file before anything runs."""
        from . import host_files

        def check() -> None:
            if model is not None:
                _model(model)
            if output_name is not None:
                host_files.new_file("checkpoints", output_name)
            if vae:
                host_files.existing("vae", vae, widget="vae")

        return inputs.refusal(check)

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, **others: Any) -> str:
        """Change when the model changes."""
        from . import host_files

        return host_files.stamp("checkpoints" if _is_file(model or "") else "diffusers", model or "")

    @classmethod
    def execute(cls, model: str, output_name: str, vae: str = "", overwrite: bool = False) -> io.NodeOutput:
        from ..trainer import api
        from . import host_files

        source = _model(model)
        file = host_files.existing("vae", vae, widget="Convert Checkpoint: vae") if vae.strip() else None
        if _is_file(model):
            target = host_files.new_file("diffusers", output_name, suffix="")
        else:
            target = host_files.new_file("checkpoints", output_name)
        lines = api.convert_checkpoint(source, target, vae=file, overwrite=overwrite, tell=teller())
        path = f"{target.parent.name}/{target.name}"
        return io.NodeOutput(path, ui={"text": ["\n".join((path, *lines))]})


def _is_file(model: str) -> bool:
    return model.strip().endswith(".safetensors")


def _model(name: str) -> Any:
    from . import host_files

    kind = "checkpoints" if _is_file(name) else "diffusers"
    return host_files.existing(kind, name, widget="Convert Checkpoint: model", folder_too=kind == "diffusers")


def _kind(name: str) -> str:
    """Return which of MODELS has a file of this name; the first where none has."""
    from . import host_files

    return next((kind for kind in MODELS if host_files.stamp(kind, name) != "missing"), MODELS[0])


def _check_models(**models: str | None) -> None:
    """Check checkpoints by their widgets' names; None is an input that is linked."""
    from . import host_files

    for widget, name in models.items():
        if name is not None:
            host_files.existing(_kind(name), name, widget=widget)
