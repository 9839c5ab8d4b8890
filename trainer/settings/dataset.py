"""What a record becomes before training: its bucket, its crop and its caption."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

# What a LoRA is to learn, as far as the dataset report needs to know; "" is not said.
KINDS = ("", "character", "style", "concept", "face")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What a record becomes before training: its bucket, its crop and its caption."""

    resolution: int | tuple[int, int] = setting(
        512,
        "Side of the training area in pixels, or (width, height). With buckets, width*height is the area "
        "that every bucket stays within.",
        minimum=16,
        maximum=4096,
    )
    enable_bucket: bool = setting(
        True, "Sort images into buckets of similar aspect ratio instead of one size."
    )
    min_bucket_reso: int = setting(
        256, "Shortest bucket side in pixels.", minimum=16, maximum=4096, advanced=True
    )
    max_bucket_reso: int = setting(
        1024, "Longest bucket side in pixels.", minimum=16, maximum=8192, advanced=True
    )
    bucket_reso_steps: int = setting(
        64, "Bucket sides are multiples of this many pixels.", minimum=8, maximum=512, advanced=True
    )
    bucket_no_upscale: bool = setting(
        False, "Never enlarge an image: small images get buckets of their own size.", advanced=True
    )
    shuffle_caption: bool = setting(False, "Shuffle the tags of a caption anew each time it is used.")
    keep_tokens: int = setting(
        0, "Number of leading tags that stay in place (1 keeps a trigger word first).", minimum=0, maximum=255
    )
    caption_separator: str = setting(",", "What separates the tags of a caption.", advanced=True)
    caption_dropout_rate: float = setting(
        0.0, "Share of uses in which the caption is left empty.", minimum=0.0, maximum=1.0
    )
    caption_tag_dropout_rate: float = setting(
        0.0, "Chance that a tag after the kept ones is left out.", minimum=0.0, maximum=1.0, advanced=True
    )
    flip_aug: bool = setting(
        False,
        "Mirror a picture in about half of its uses. Not for subjects whose two sides differ, nor for text.",
        advanced=True,
    )
    balance_concepts: bool = setting(
        False,
        "Choose repeats so that images x repeats come as near to equal over the concepts as whole numbers "
        "allow; folder names' repeats then do not count.",
        advanced=True,
    )
    validation_split: float = setting(
        0.0,
        "Share of each concept's images that is kept out of training to measure the loss on.",
        minimum=0.0,
        maximum=0.9,
        advanced=True,
    )
    validation_seed: int = setting(
        0,
        "Another number keeps other images out of training.",
        minimum=0,
        maximum=2**53 - 1,
        advanced=True,
    )
    prior_loss_weight: float = setting(
        1.0,
        "Weight of regularisation images in the loss; 1 weighs them like training images.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    caption_dropout_every_n_epochs: int = setting(
        0,
        "Leave all captions empty in every n-th epoch; 0 does not.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    caption_prefix: str = setting("", "Text put before every caption.", advanced=True)
    caption_suffix: str = setting("", "Text put behind every caption.", advanced=True)
    keep_tokens_separator: str = setting(
        "",
        "Mark in a caption, usually |||: tags before it stay in place, as do those behind a second one.",
        advanced=True,
    )
    secondary_separator: str = setting(
        "",
        "Mark in a caption, for instance ;;;, that joins tags which stay together when shuffled.",
        advanced=True,
    )
    enable_wildcard: bool = setting(
        False,
        "Pick one of {red|blue} in a caption, and one line of several, anew at each use.",
        advanced=True,
    )
    token_warmup_min: int = setting(
        1, "Number of tags that the token warm-up begins with.", minimum=0, maximum=255, advanced=True
    )
    token_warmup_step: int | float = setting(
        0,
        "Token warm-up: show more and more tags over this many steps, or below 1 this share of all steps.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    caption_template: str = setting(
        "",
        "Text around every caption, with {caption} where its tags go; one of several lines is picked at "
        "each use.",
        advanced=True,
    )
    num_bucket: int = setting(
        0,
        "Number of buckets made from the images' own aspect ratios, as HCP-Diffusion does; 0 uses kohya's "
        "fixed list.",
        minimum=0,
        maximum=256,
        advanced=True,
    )
