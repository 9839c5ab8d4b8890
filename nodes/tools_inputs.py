"""What the nodes that work on files share: their widgets, and lines of files with ratios."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..trainer.errors import LoraGraftError

CATEGORY = "LoraGraft/tools"
# As in trainer.api, which ComfyUI's start must not wait for.
PRECISIONS = ("same", "fp16", "bf16", "fp32")
NAMINGS = ("kohya", "diffusers", "comfyui")
LORA_TOOLTIP = "LoRA file below models/loras, with .safetensors; Train LoRA's lora_name can be linked."
REPORT_TOOLTIP = "What was done, a line for each module."


def lora_name(name: str = "lora_name", tooltip: str = LORA_TOOLTIP) -> Any:
    """Return the widget of a LoRA file."""
    return io.String.Input(name, default="", tooltip=tooltip)


def lora_lines(tooltip: str) -> Any:
    """Return the widget of several LoRA files with ratios."""
    return io.String.Input("loras", default="", multiline=True, tooltip=tooltip)


def output_name(default: str, folder: str = "models/loras") -> Any:
    """Return the widget of the result's name."""
    return io.String.Input("output_name", default=default, tooltip=f"Name of the new file in {folder}.")


def saving(*, precision: bool = True) -> list[Any]:
    """Return the widgets of how a result is written."""
    overwrite = io.Boolean.Input(
        "overwrite",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Replace a file of that name. Off: an existing file is never touched.",
    )
    if not precision:
        return [overwrite]
    number_format = io.Combo.Input(
        "save_precision",
        options=list(PRECISIONS),
        default="same",
        optional=True,
        advanced=True,
        tooltip="Number format of the new file; same keeps that of the old one.",
    )
    return [number_format, overwrite]


def report_output() -> Any:
    """Return the output with the job's report."""
    return io.String.Output("report", display_name="report", tooltip=REPORT_TOOLTIP)


def name_output(name: str = "lora_name") -> Any:
    """Return the output with the new file's name."""
    return io.String.Output(name, display_name=name, tooltip="Name of the new file, for loaders.")


def files_and_ratios(text: str, *, widget: str = "loras") -> list[tuple[str, float]]:
    """Read lines such as "style.safetensors: 0.8"; without a ratio it is 1. Raises LG-TOOL-016."""
    found = []
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        name, sign, ratio = line.rpartition(":")
        try:
            value = float(ratio) if sign else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise LoraGraftError(
                "LG-TOOL-016",
                f"{line[:60]!r} is no LoRA with a ratio.",
                where=widget,
                why=f"{ratio.strip()[:20]!r} is no number.",
                fix="write one file per line, such as style.safetensors: 0.8",
            )
        found.append((name.strip() if sign else line, value))
    return found


def refusal(check: Any) -> bool | str:
    """Call ``check``; return True, or the message with which it refuses."""
    try:
        check()
    except LoraGraftError as error:
        return str(error)
    return True


def check_names(lora: str | None, output: str | None, *, lines: str | None = None) -> bool | str:
    """Check what widgets name; None is an input that is linked, whose value is not known yet."""
    from . import host_files

    def check() -> None:
        if lora is not None:
            host_files.existing("loras", lora, widget="lora_name")
        for name, _ in files_and_ratios(lines or ""):
            host_files.existing("loras", name, widget="loras")
        if output is not None:
            host_files.new_file("loras", output)

    return refusal(check)


def done(written: Any) -> io.NodeOutput:
    """Return a job's outputs: the new file's name and the report, which the node shows too."""
    return io.NodeOutput(written.path.name, written.report, ui={"text": [written.report]})
