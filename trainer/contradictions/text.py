"""What contradicts itself in how captions are read."""

from __future__ import annotations

from ..config import ENCODER_RATES, TrainConfig, trains_encoders
from ..errors import one_line
from ..paths import MAX_COMPONENT
from ..settings.words import parse_words
from .refusals import bad_value, contradiction

DEFAULT_LENGTH = 75
DEFAULT_EMBEDDING_LR = 1e-3


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-003 for a word that cannot be read, LG-CFG-004 for the first contradiction."""
    _check_length(config, where)
    if config.weighted_captions_keep_mean and not config.weighted_captions:
        raise contradiction(
            "weighted_captions_keep_mean is on, but weighted_captions is off.",
            where,
            why="without emphasis there is nothing to scale back.",
            fix="switch weighted_captions on, or weighted_captions_keep_mean off",
        )
    _check_words(config, where)
    if any(getattr(config, rate) for rate in ENCODER_RATES.values()) and trains_encoders(config):
        check_kept(config, where)


def check_kept(config: TrainConfig, where: str = "settings") -> None:
    """Raise LG-CFG-004 where captions are kept once encoded by a text encoder that is trained.

    Which encoders are, depends on the base model too where the settings give none of them a rate.
    """
    if config.cache_text_encoder_outputs:
        raise contradiction(
            "cache_text_encoder_outputs is on, but the text encoder is trained.",
            where,
            why="encoded captions would not change while the text encoder does.",
            fix="switch network_train_unet_only on, or cache_text_encoder_outputs off",
        )


def _check_length(config: TrainConfig, where: str) -> None:
    length, repeats = int(config.max_token_length), config.tokenizer_repeats
    if repeats is not None and length not in (DEFAULT_LENGTH, 75 * repeats):
        raise contradiction(
            f"tokenizer_repeats {repeats} is {75 * repeats} tokens, but max_token_length is {length}.",
            where,
            why="both say how long a caption may be.",
            fix=f"clear tokenizer_repeats, or set it to {length // 75}",
        )


def _check_words(config: TrainConfig, where: str) -> None:
    try:
        words = parse_words(config.train_embeddings)
    except ValueError as error:
        expected = f"words to train, such as zibu=cat*2; {error}"
        raise bad_value("train_embeddings", list(config.train_embeddings), expected, where) from None
    for word in words:
        file = f"{config.output_name}-{word.word}"
        if len(file.encode()) > MAX_COMPONENT:
            expected = f"words so short that the file {one_line(file, 40)} has at most {MAX_COMPONENT} bytes"
            raise bad_value("train_embeddings", word.word, expected, where)
    if words and config.cache_text_encoder_outputs:
        raise contradiction(
            "cache_text_encoder_outputs is on, but train_embeddings names words.",
            where,
            why="encoded captions would not change while the words' embeddings do.",
            fix="switch cache_text_encoder_outputs off, or clear train_embeddings",
        )
    if not words and config.embedding_lr != DEFAULT_EMBEDDING_LR:
        raise contradiction(
            "embedding_lr is given, but train_embeddings names no word.",
            where,
            why="nothing would be trained at that rate.",
            fix=f"name a word in train_embeddings, or set embedding_lr to {DEFAULT_EMBEDDING_LR:g}",
        )
