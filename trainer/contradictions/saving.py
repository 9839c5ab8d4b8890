"""What contradicts itself in what a run writes."""

from __future__ import annotations

from ..config import TrainConfig
from ..sample_prompts import parse_prompt
from .refusals import bad_value, contradiction

# A setting, what it needs one of, and what would be without effect otherwise.
NEEDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("save_last_n_epochs", ("save_every_n_epochs", "save_n_epoch_ratio"), "no save belongs to an epoch"),
    (
        "save_last_n_epochs_state",
        ("save_every_n_epochs", "save_n_epoch_ratio"),
        "no save belongs to an epoch",
    ),
    ("save_last_n_steps", ("save_every_n_steps",), "no save belongs to a step"),
    ("save_last_n_steps_state", ("save_every_n_steps",), "no save belongs to a step"),
    (
        "publish_checkpoints",
        ("save_every_n_epochs", "save_n_epoch_ratio", "save_every_n_steps"),
        "there is no save on the way",
    ),
    ("sample_at_first", ("sample_prompts",), "there is nothing to draw"),
    ("sample_every_n_steps", ("sample_prompts",), "there is nothing to draw"),
    ("sample_every_n_epochs", ("sample_prompts",), "there is nothing to draw"),
)


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-003 for a sample prompt that cannot be read, LG-CFG-004 for the first contradiction."""
    for prompt in config.sample_prompts:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            raise bad_value("sample_prompts", prompt, f"a prompt with known flags; {error}", where) from None
    if config.save_n_epoch_ratio is not None and config.save_every_n_epochs is not None:
        raise contradiction(
            "save_n_epoch_ratio and save_every_n_epochs are both given.",
            where,
            why="both say after how many epochs the run saves.",
            fix="take one of them away",
        )
    for name, needed, lacking in NEEDS:
        if getattr(config, name) and not any(getattr(config, other) for other in needed):
            raise contradiction(
                f"{name} is given without {' or '.join(needed)}.",
                where,
                why=f"{lacking}, so it would have no effect.",
                fix=f"set {needed[0]}, or take {name} away",
            )
