"""What a run writes: its files, their names and format, and the images drawn on the way."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

SAVE_PRECISIONS = ("fp16", "bf16", "fp32")
NAME_TAKEN = ("number", "refuse")
PRODUCTS = ("lora", "checkpoint")
LOGGERS = ("auto", "tensorboard", "none")


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
    save_n_epoch_ratio: int | None = setting(
        None,
        "Save at least n times, spread evenly over the epochs, instead of every n epochs.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    save_last_n_epochs: int | None = setting(
        None,
        "Keep only the last n saves of save_every_n_epochs; the best and the newest ones stay.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    save_last_n_steps: int | None = setting(
        None,
        "Delete saves of save_every_n_steps once they are more than n steps old; the best and the newest "
        "ones stay.",
        minimum=1,
        maximum=10_000_000,
        advanced=True,
    )
    save_last_n_epochs_state: int | None = setting(
        None,
        "Keep the training states of the last n saves of save_every_n_epochs, to resume from; empty keeps 2.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    save_last_n_steps_state: int | None = setting(
        None,
        "Keep the training states of saves of save_every_n_steps until they are more than n steps old; empty "
        "keeps 2.",
        minimum=1,
        maximum=10_000_000,
        advanced=True,
    )
    publish_checkpoints: bool = setting(
        False,
        "Also put every save on the way into the loras folder, named as kohya does: name-000002 after epoch "
        "2, name-step00000200 at step 200.",
        advanced=True,
    )
    sample_prompts: tuple[str, ...] = setting(
        (),
        "Prompts drawn during training, one image each; --w --h --d --s --l --n after a prompt set its "
        "width, height, seed, steps, guidance scale and negative prompt.",
    )
    sample_at_first: bool = setting(
        False, "Also draw the sample prompts before the first step.", advanced=True
    )
    sample_every_n_steps: int | None = setting(
        None,
        "Draw the sample prompts every n steps; without this and sample_every_n_epochs, at each save.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    sample_every_n_epochs: int | None = setting(
        None, "Draw the sample prompts every n epochs.", minimum=1, maximum=1_000_000, advanced=True
    )
    sample_steps: int | None = setting(
        None,
        "Sampling steps of a sample image; empty takes what is usual for the base model (SD 20, Flux "
        "schnell 4).",
        minimum=1,
        maximum=1000,
        advanced=True,
    )
    sample_cfg: float | None = setting(
        None,
        "Guidance scale of a sample image; empty takes what is usual for the base model (SD 7, Flux 1).",
        minimum=1,
        maximum=100,
        advanced=True,
    )
    validate_every_n_steps: int | None = setting(
        None,
        "Measure the loss on the images kept out of training every n steps; each save is measured anyway.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    validate_every_n_epochs: int | None = setting(
        None,
        "Measure the loss on the images kept out of training every n epochs; each save is measured anyway.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    validation_timesteps: int = setting(
        8,
        "At how many timesteps, evenly spread, each kept-out image is measured.",
        minimum=1,
        maximum=1000,
        advanced=True,
    )
    max_validation_steps: int | None = setting(
        None,
        "Measure at most so many of the kept-out images, always the same ones.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    log_with: str = setting(
        "auto",
        "TensorBoard files in the run folder, beside log.jsonl and log.log, which are always written. auto: "
        "where tensorboard is installed.",
        choices=LOGGERS,
        advanced=True,
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
    save_as: str = setting(
        "lora",
        "What is made. lora: the LoRA file; checkpoint: beside it the whole model with the training in it, "
        "one file in the checkpoints folder in save_precision. algo full with preset everything is full "
        "fine-tuning.",
        choices=PRODUCTS,
        advanced=True,
    )
