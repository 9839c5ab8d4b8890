"""Every setting of a run, typed and strict; names are kohya's argument names.

Two frozen dataclasses hold them: ``DatasetConfig`` (what an image and its caption become) and
``TrainConfig`` (how the LoRA learns). The table in each field's metadata is the single source for
the command line, the node widgets and the documentation; trainer.checks builds the configs strictly.
"""

from __future__ import annotations

import dataclasses
import typing
from ast import literal_eval as read_literal  # literals only: nothing is run
from dataclasses import dataclass, field
from typing import Any

from .errors import LoraGraftError, one_line


@dataclass(frozen=True)
class Info:
    """What a setting means and which values it takes; ``minimum`` and ``maximum`` are inclusive."""

    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    advanced: bool = False


def _setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    advanced: bool = False,
) -> Any:
    return field(default=default, metadata={"info": Info(help, minimum, maximum, choices, advanced)})


LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("AdamW",)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SAVE_PRECISIONS = ("fp16", "bf16", "fp32")
ENGINES = ("auto", "eager", "fused", "captured")
ATTENTIONS = ("auto", "sdpa", "xformers", "plain")
STORAGES = ("as_is", "fp8", "int8", "nf4")
MEMORY = ("auto", "off")
NAME_TAKEN = ("number", "refuse")
MAX_LITERAL = 200
# What a LoRA is to learn, as far as the dataset report needs to know; "" is not said.
KINDS = ("", "character", "style", "concept", "face")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What a record becomes before training: its bucket, its crop and its caption."""

    resolution: int | tuple[int, int] = _setting(
        512,
        "Side of the training area in pixels, or (width, height). With buckets, width*height is the area "
        "that every bucket stays within.",
        minimum=16,
        maximum=4096,
    )
    enable_bucket: bool = _setting(
        True, "Sort images into buckets of similar aspect ratio instead of one size."
    )
    min_bucket_reso: int = _setting(
        256, "Shortest bucket side in pixels.", minimum=16, maximum=4096, advanced=True
    )
    max_bucket_reso: int = _setting(
        1024, "Longest bucket side in pixels.", minimum=16, maximum=8192, advanced=True
    )
    bucket_reso_steps: int = _setting(
        64, "Bucket sides are multiples of this many pixels.", minimum=8, maximum=512, advanced=True
    )
    bucket_no_upscale: bool = _setting(
        False, "Never enlarge an image: small images get buckets of their own size.", advanced=True
    )
    shuffle_caption: bool = _setting(False, "Shuffle the tags of a caption anew each time it is used.")
    keep_tokens: int = _setting(
        0, "Number of leading tags that stay in place (1 keeps a trigger word first).", minimum=0, maximum=255
    )
    caption_separator: str = _setting(",", "What separates the tags of a caption.", advanced=True)
    caption_dropout_rate: float = _setting(
        0.0, "Share of uses in which the caption is left empty.", minimum=0.0, maximum=1.0
    )
    caption_tag_dropout_rate: float = _setting(
        0.0, "Chance that a tag after the kept ones is left out.", minimum=0.0, maximum=1.0, advanced=True
    )
    flip_aug: bool = _setting(
        False,
        "Mirror a picture in about half of its uses. Not for subjects whose two sides differ, nor for text.",
        advanced=True,
    )
    balance_concepts: bool = _setting(
        False,
        "Choose repeats so that images x repeats come as near to equal over the concepts as whole numbers "
        "allow; folder names' repeats then do not count.",
        advanced=True,
    )
    validation_split: float = _setting(
        0.0,
        "Share of each concept's images that is kept out of training to measure the loss on.",
        minimum=0.0,
        maximum=0.9,
        advanced=True,
    )
    validation_seed: int = _setting(
        0,
        "Another number keeps other images out of training.",
        minimum=0,
        maximum=2**53 - 1,
        advanced=True,
    )
    prior_loss_weight: float = _setting(
        1.0,
        "Weight of regularisation images in the loss; 1 weighs them like training images.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    caption_dropout_every_n_epochs: int = _setting(
        0,
        "Leave all captions empty in every n-th epoch; 0 does not.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    caption_prefix: str = _setting("", "Text put before every caption.", advanced=True)
    caption_suffix: str = _setting("", "Text put behind every caption.", advanced=True)
    keep_tokens_separator: str = _setting(
        "",
        "Mark in a caption, usually |||: tags before it stay in place, as do those behind a second one.",
        advanced=True,
    )
    secondary_separator: str = _setting(
        "",
        "Mark in a caption, for instance ;;;, that joins tags which stay together when shuffled.",
        advanced=True,
    )
    enable_wildcard: bool = _setting(
        False,
        "Pick one of {red|blue} in a caption, and one line of several, anew at each use.",
        advanced=True,
    )
    token_warmup_min: int = _setting(
        1, "Number of tags that the token warm-up begins with.", minimum=0, maximum=255, advanced=True
    )
    token_warmup_step: int | float = _setting(
        0,
        "Token warm-up: show more and more tags over this many steps, or below 1 this share of all steps.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    caption_template: str = _setting(
        "",
        "Text around every caption, with {caption} where its tags go; one of several lines is picked at "
        "each use.",
        advanced=True,
    )
    num_bucket: int = _setting(
        0,
        "Number of buckets made from the images' own aspect ratios, as HCP-Diffusion does; 0 uses kohya's "
        "fixed list.",
        minimum=0,
        maximum=256,
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the LoRA is built, how it learns, and what is written on the way."""

    output_name: str = _setting("my_lora", "File name of the LoRA, without folder and suffix.")
    name_taken: str = _setting(
        "number",
        "If another run already wrote a LoRA of this name: 'number' appends _2, _3, ...; 'refuse' stops.",
        choices=NAME_TAKEN,
        advanced=True,
    )
    network_dim: int = _setting(32, "Rank of the LoRA.", minimum=1, maximum=1024)
    network_alpha: float = _setting(
        16.0, "Scale of the LoRA is network_alpha / network_dim.", minimum=0.001, maximum=4096
    )
    conv_dim: int | None = _setting(
        None, "Rank for 3x3 convolutions; empty trains none of them.", minimum=1, maximum=1024, advanced=True
    )
    conv_alpha: float | None = _setting(
        None, "Alpha for 3x3 convolutions; empty means 1.", minimum=0.001, maximum=4096, advanced=True
    )
    learning_rate: float = _setting(
        1e-4, "Learning rate where no own one is given.", minimum=0.0, maximum=10.0
    )
    unet_lr: float | None = _setting(
        None,
        "Learning rate of the denoiser; empty takes learning_rate, 0 leaves it out.",
        minimum=0.0,
        maximum=10.0,
    )
    text_encoder_lr: float | None = _setting(
        None,
        "Learning rate of the text encoder; empty takes learning_rate, 0 leaves it out.",
        minimum=0.0,
        maximum=10.0,
    )
    network_train_unet_only: bool = _setting(False, "Train no text encoder LoRA.", advanced=True)
    optimizer_type: str = _setting("AdamW", "Optimizer.", choices=OPTIMIZERS, advanced=True)
    optimizer_args: tuple[str, ...] = _setting(
        (), "Optimizer options as kohya writes them: key=value, literals only.", advanced=True
    )
    lr_scheduler: str = _setting("cosine", "Shape of the learning rate over the run.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | float = _setting(
        0, "Warm-up: a number of steps, or below 1 a share of all steps.", minimum=0, maximum=1_000_000
    )
    lr_scheduler_num_cycles: int = _setting(
        1, "Number of cycles for cosine_with_restarts.", minimum=1, maximum=1000, advanced=True
    )
    lr_scheduler_power: float = _setting(
        1.0,
        "Power for polynomial: a smaller one holds the rate up longer.",
        minimum=0.01,
        maximum=100,
        advanced=True,
    )
    max_train_steps: int = _setting(1600, "Number of optimizer steps.", minimum=1, maximum=10_000_000)
    max_train_epochs: int | None = _setting(
        None, "Number of epochs; if given, it replaces max_train_steps.", minimum=1, maximum=1_000_000
    )
    train_batch_size: int = _setting(1, "Images per micro-batch.", minimum=1, maximum=1024)
    gradient_accumulation_steps: int = _setting(
        1, "Micro-batches per optimizer step.", minimum=1, maximum=1024, advanced=True
    )
    gradient_checkpointing: bool = _setting(
        False, "Save memory by computing the forward pass twice.", advanced=True
    )
    max_grad_norm: float = _setting(
        1.0, "Clip the gradient to this norm; 0 does not.", minimum=0, maximum=1e6, advanced=True
    )
    min_snr_gamma: float | None = _setting(
        None,
        "Min-SNR loss weighting (5 is usual); empty weighs all timesteps alike.",
        minimum=0.001,
        maximum=1000,
    )
    mixed_precision: str = _setting(
        "auto",
        "Compute precision. auto: bf16 or fp16 on a GPU, fp32 on a CPU. The adapter stays in fp32.",
        choices=PRECISIONS,
    )
    engine: str = _setting(
        "auto",
        "How steps are executed. captured: as CUDA graphs, much faster for small batches; fused: fewer, "
        "larger kernels; eager: one after the other; auto: the first of them that can be. The LoRA is the "
        "same but for rounding.",
        choices=ENGINES,
        advanced=True,
    )
    deterministic: bool = _setting(
        False,
        "On a GPU, take only operations that give the same bits every time, so that a stopped and continued "
        "run ends in the same file. Slower; a CPU does so by itself.",
        advanced=True,
    )
    attention: str = _setting(
        "auto",
        "How the denoiser's attention is computed. auto measures on a GPU and takes the fastest; sdpa: "
        "PyTorch's own; xformers: where it is installed; plain: the formula, slow, to compare with.",
        choices=ATTENTIONS,
        advanced=True,
    )
    base_storage: str = _setting(
        "as_is",
        "How the frozen base is kept in memory. fp8 and int8 take half of fp16's, nf4 a quarter; all three "
        "lose precision, and the loss is measured and printed.",
        choices=STORAGES,
        advanced=True,
    )
    memory: str = _setting(
        "auto",
        "auto: where the run would not fit into the free memory, switch on what saves some without changing "
        "the result (checkpointing, then swapping blocks), and say so; off: only say what it will take.",
        choices=MEMORY,
        advanced=True,
    )
    blocks_to_swap: int = _setting(
        0,
        "Keep the frozen weights of so many blocks of the denoiser in the computer's memory and bring them "
        "to the GPU when they are used; these blocks are also checkpointed.",
        minimum=0,
        maximum=1000,
        advanced=True,
    )
    max_token_length: int = _setting(
        75, "Longest caption in tokens: 75, 150 or 225.", choices=("75", "150", "225"), advanced=True
    )
    clip_skip: int = _setting(
        1, "Use the n-th last layer of the text encoder (1 realistic, 2 anime).", minimum=1, maximum=12
    )
    cache_latents: bool = _setting(
        True, "Encode each image once and keep the result on disk, keyed by its content.", advanced=True
    )
    seed: int = _setting(42, "Seed of everything random in the run.", minimum=0, maximum=2**63 - 1)
    save_precision: str = _setting(
        "fp16", "Number format of the LoRA file.", choices=SAVE_PRECISIONS, advanced=True
    )
    save_every_n_steps: int | None = _setting(
        None, "Also save every n steps.", minimum=1, maximum=1_000_000, advanced=True
    )
    save_every_n_epochs: int | None = _setting(
        None, "Also save every n epochs.", minimum=1, maximum=1_000_000
    )
    sample_prompts: tuple[str, ...] = _setting((), "Prompts drawn during training, one image each.")
    sample_every_n_steps: int | None = _setting(
        None,
        "Draw the sample prompts every n steps; empty draws them at each save.",
        minimum=1,
        maximum=1_000_000,
        advanced=True,
    )
    sample_steps: int = _setting(
        20, "Sampling steps of a sample image.", minimum=1, maximum=1000, advanced=True
    )
    sample_cfg: float = _setting(
        7.0, "Guidance scale of a sample image.", minimum=1, maximum=100, advanced=True
    )
    preview_image: bool = _setting(
        True,
        "Draw one image at the end and put it beside the LoRA, where LoRA managers show it.",
        advanced=True,
    )
    metadata_title: str = _setting(
        "", "Title in the file's metadata; empty takes the file name.", advanced=True
    )
    metadata_trigger_phrase: str = _setting(
        "", "Trigger words in the file's metadata; empty takes the concepts' class words.", advanced=True
    )
    training_comment: str = _setting("", "A comment kept in the file's metadata.", advanced=True)
    embed_workflow: bool = _setting(
        True,
        "Keep the ComfyUI workflow inside the LoRA file, so that dropping the file on the canvas opens it.",
        advanced=True,
    )


def info_of(cls: type, name: str) -> Info:
    """Return the table entry of one setting."""
    return typing.cast(Info, cls.__dataclass_fields__[name].metadata["info"])  # type: ignore[attr-defined]


def as_dict(config: DatasetConfig | TrainConfig) -> dict[str, Any]:
    """Return the config as JSON-ready values; tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def resolution_wh(config: DatasetConfig) -> tuple[int, int]:
    """Return the training resolution as (width, height) in pixels."""
    r = config.resolution
    return (r, r) if isinstance(r, int) else r


def optimizer_kwargs(config: TrainConfig) -> dict[str, Any]:
    """Parse ``optimizer_args`` ("weight_decay=0.01", "betas=.9,.99"); literals only."""
    result: dict[str, Any] = {}
    for item in config.optimizer_args:
        key, equals, text = (part.strip() for part in item.partition("="))
        try:
            if not equals:
                raise ValueError("no '='")
            if key in result:
                raise ValueError("given twice")
            if len(text) > MAX_LITERAL:  # the parser's depth has no limit of its own
                raise ValueError(f"longer than {MAX_LITERAL} characters")
            result[key] = read_literal(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise LoraGraftError(
                "LG-CFG-002",
                f"Optimizer option '{one_line(item, 60)}' cannot be read.",
                where="optimizer_args",
                why=f"it is not of the form key=literal ({error}).",
                fix="write for instance weight_decay=0.01 or betas=(0.9,0.99)",
            ) from None
    return result


def denoiser_lr(config: TrainConfig) -> float:
    """Return the denoiser's learning rate; 0 means that it is not trained."""
    return config.learning_rate if config.unet_lr is None else config.unet_lr


def encoder_lr(config: TrainConfig) -> float:
    """Return the text encoder's learning rate; 0 means that it is not trained."""
    if config.network_train_unet_only:
        return 0.0
    return config.learning_rate if config.text_encoder_lr is None else config.text_encoder_lr
