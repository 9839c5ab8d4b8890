"""What a run writes: its files, their names and format, and the images drawn on the way."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

SAVE_PRECISIONS = ("fp16", "bf16", "fp32")
NAME_TAKEN = ("number", "refuse")


@dataclass(frozen=True, kw_only=True)
class SavingSettings:
    """What a run writes: its files, their names and format, and the images drawn on the way."""

    output_name: str = setting("my_lora", "File name of the LoRA, without folder and suffix.")
    name_taken: str = setting(
        "number",
        "If another run already wrote a LoRA of this name: 'number' appends _2, _3, ...; 'refuse' stops.",
        choices=NAME_TAKEN,
        advanced=True,
    )
    save_precision: str = setting(
        "fp16", "Number format of the LoRA file.", choices=SAVE_PRECISIONS, advanced=True
    )
    save_every_n_steps: int | None = setting(
        None, "Also save every n steps.", minimum=1, maximum=1_000_000, advanced=True
    )
    save_every_n_epochs: int | None = setting(None, "Also save every n epochs.", minimum=1, maximum=1_000_000)
    sample_prompts: tuple[str, ...] = setting((), "Prompts drawn during training, one image each.")
    sample_every_n_steps: int | None = setting(
        None,
        "Draw the sample prompts every n steps; empty draws them at each save.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    sample_steps: int = setting(
        20, "Sampling steps of a sample image.", minimum=1, maximum=1000, advanced=True
    )
    sample_cfg: float = setting(
        7.0, "Guidance scale of a sample image.", minimum=1, maximum=100, advanced=True
    )
    preview_image: bool = setting(
        True,
        "Draw one image at the end and put it beside the LoRA, where LoRA managers show it.",
        advanced=True,
    )
    metadata_title: str = setting(
        "", "Title in the file's metadata; empty takes the file name.", advanced=True
    )
    metadata_trigger_phrase: str = setting(
        "", "Trigger words in the file's metadata; empty takes the concepts' class words.", advanced=True
    )
    training_comment: str = setting("", "A comment kept in the file's metadata.", advanced=True)
    embed_workflow: bool = setting(
        True,
        "Keep the ComfyUI workflow inside the LoRA file, so that dropping the file on the canvas opens it.",
        advanced=True,
    )
