"""How captions are read: length, layer, embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How captions are read: length, layer, embeddings."""

    max_token_length: int = setting(
        75, "Longest caption in tokens: 75, 150 or 225.", choices=("75", "150", "225"), advanced=True
    )
    tokenizer_repeats: int | None = setting(
        None,
        "Longest caption in chunks of 75 tokens, as HCP-Diffusion counts; empty takes max_token_length.",
        minimum=1,
        maximum=10,
        advanced=True,
    )
    clip_skip: int = setting(
        1, "Use the n-th last layer of the text encoder (1 realistic, 2 anime).", minimum=1, maximum=12
    )
    weighted_captions: bool = setting(
        False,
        "Read (word), (word:1.2) and [word] in captions as emphasis; \\( and \\) stand for brackets.",
        advanced=True,
    )
    weighted_captions_keep_mean: bool = setting(
        False,
        "After emphasis, scale the encoded caption back to the mean it had, as webui and HCP-Diffusion do; "
        "kohya's trainer does not.",
        advanced=True,
    )
    cache_text_encoder_outputs: bool = setting(
        False,
        "Also keep encoded captions that vary from use to use: all texts that the run will draw are encoded "
        "before step 1. Captions that never vary are always kept.",
        advanced=True,
    )
    train_embeddings: tuple[str, ...] = setting(
        (),
        "Words whose embeddings are trained along with the LoRA, as word, word*vectors or "
        "word=text to begin from*vectors.",
        advanced=True,
    )
    embedding_lr: float = setting(
        1e-3, "Learning rate of the trained embeddings.", minimum=1e-8, maximum=10.0, advanced=True
    )
