"""Every setting of a run, typed and strict; names are kohya's argument names.

Two frozen dataclasses hold them: ``DatasetConfig`` (what an image and its caption become) and
``TrainConfig`` (how the LoRA learns), the latter joined of the groups in trainer.settings. The table in each
field's metadata is the single source for the command line, the node widgets and the documentation;
trainer.checks builds the configs strictly.
"""

from __future__ import annotations

import dataclasses
from ast import literal_eval as read_literal  # literals only: nothing is run
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LoraGraftError, one_line
from .settings.dataset import KINDS, DatasetConfig
from .settings.flow import FlowSettings
from .settings.info import Info, info_of
from .settings.learning import LearningSettings
from .settings.loss import LossSettings
from .settings.network import NetworkSettings
from .settings.running import RunningSettings
from .settings.saving import SavingSettings
from .settings.text import TextSettings

__all__ = ["KINDS", "DatasetConfig", "Info", "TrainConfig", "as_dict", "info_of"]

MAX_LITERAL = 200
# text encoder -> the setting of its learning rate
ENCODER_RATES: Mapping[str, str] = {
    "text_encoder": "text_encoder_lr",
    "text_encoder_2": "text_encoder_2_lr",
    "text_encoder_3": "text_encoder_3_lr",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    SavingSettings,
    RunningSettings,
    TextSettings,
    FlowSettings,
    LossSettings,
    LearningSettings,
    NetworkSettings,
):
    """How the LoRA is built, how it learns, and what is written on the way."""


def as_dict(config: DatasetConfig | TrainConfig) -> dict[str, Any]:
    """Return the config as JSON-ready values; tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def resolution_wh(config: DatasetConfig) -> tuple[int, int]:
    """Return the training resolution as (width, height) in pixels."""
    r = config.resolution
    return (r, r) if isinstance(r, int) else r


def optimizer_kwargs(config: TrainConfig) -> dict[str, Any]:
    """Parse ``optimizer_args`` ("weight_decay=0.01", "betas=.9,.99"); literals only."""
    return literals("optimizer_args", config.optimizer_args, "weight_decay=0.01 or betas=(0.9,0.99)")


def scheduler_kwargs(config: TrainConfig) -> dict[str, Any]:
    """Parse ``lr_scheduler_args`` ("T_0=400", "decay=0.9"); literals only, step_rules also as bare text."""
    items = [_quoted(item) for item in config.lr_scheduler_args]
    return literals("lr_scheduler_args", items, "T_0=400 or step_rules=1:10,0.1:20,0.01")


def literals(setting: str, items: Iterable[str], example: str) -> dict[str, Any]:
    """Parse entries of the form key=literal; raises LG-CFG-002, naming the setting and giving the example."""
    result: dict[str, Any] = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        try:
            if not equals:
                raise ValueError("no '='")
            if key in result:
                raise ValueError("given twice")
            if len(text) > MAX_LITERAL:  # the parser's depth has no limit of its own
                raise ValueError(f"longer than {MAX_LITERAL} characters")
            result[key] = read_literal(text)
            if "inf" in repr(result[key]):  # 1e999
                raise ValueError("not finite")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise LoraGraftError(
                "LG-CFG-002",
                f"Option '{one_line(item, 60)}' of {setting} cannot be read.",
                where=setting,
                why=f"it is not of the form key=literal ({error}).",
                fix=f"write for instance {example}",
            ) from None
    return result


def _quoted(item: str) -> str:
    """Return an entry with its text in quotes where it is the rules of piecewise_constant, bare."""
    key, equals, text = (part.strip() for part in item.partition("="))
    bare = key == "step_rules" and equals and not text.startswith(("'", '"'))
    return f"{key}={text!r}" if bare else item


def token_length(config: TrainConfig) -> int:
    """Return the longest caption in tokens, a multiple of 75, without start and end."""
    return int(config.max_token_length) if config.tokenizer_repeats is None else 75 * config.tokenizer_repeats


def denoiser_lr(config: TrainConfig) -> float:
    """Return the denoiser's learning rate; 0 means that it is not trained."""
    if config.network_train_text_encoder_only:
        return 0.0
    return config.learning_rate if config.unet_lr is None else config.unet_lr


def encoder_lr(config: TrainConfig, part: str = "text_encoder") -> float:
    """Return a text encoder's learning rate, by default the first one's; 0 means that it is not trained.

    The second and the third have the first one's where they have none of their own. Encoders of whole
    sentences are trained only where they have one: see `trained_encoders`.
    """
    if config.network_train_unet_only:
        return 0.0
    given = (getattr(config, ENCODER_RATES[part]), config.text_encoder_lr)
    return next((rate for rate in given if rate is not None), config.learning_rate)


def trains_encoders(config: TrainConfig) -> bool:
    """Say whether a text encoder is trained, if the base model has those that the settings name."""
    return any(encoder_lr(config, part) > 0 for part in ENCODER_RATES)


def trained_encoders(config: TrainConfig, kinds: Mapping[str, str]) -> frozenset[str]:
    """Return the text encoders that are trained, of a base model with encoders of these ``kinds``.

    A CLIP is trained unless its rate is 0; T5 and its like only where their own rate is given, as the
    reference trainer leaves them out unless it is asked for them.
    """
    return frozenset(
        part
        for part, kind in kinds.items()
        if (kind == "clip" or getattr(config, ENCODER_RATES[part])) and encoder_lr(config, part) > 0
    )
