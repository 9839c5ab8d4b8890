"""Read a config of kohya's sd-scripts: its TOML, lora-scripts' TOML, kohya_ss' JSON, or a command line.

A config that leaves a setting out means kohya's default, not this project's; what is filled in so, what
means nothing here and what cannot be honoured is said before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import TrainConfig
from ..contradictions.refusals import contradiction
from ..errors import one_line
from . import kohya_table as table
from .imported import MAX_BYTES, Findings, Imported, not_readable
from .kohya_flow import flow_settings
from .kohya_gui import Count, read_gui
from .kohya_network import read_network
from .kohya_scripts import FLUX, TRANSFORMERS, Script, of_model
from .kohya_text import read_values
from .kohya_values import (
    encoder_rates,
    library_options,
    optimizer,
    relative_steps,
    resolution,
    token_length,
    untrained_rates,
)
from .lora_scripts import PROMPTS, prompt_lines

# A setting, what it needs one of; kohya's trainer goes on without it where there is none of them.
WITHOUT_EFFECT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("save_last_n_epochs", ("save_every_n_epochs", "save_n_epoch_ratio")),
    ("save_last_n_epochs_state", ("save_every_n_epochs", "save_n_epoch_ratio")),
    ("save_last_n_steps", ("save_every_n_steps",)),
    ("save_last_n_steps_state", ("save_every_n_steps",)),
    ("sample_every_n_steps", ("sample_prompts",)),
    ("sample_every_n_epochs", ("sample_prompts",)),
    ("sample_at_first", ("sample_prompts",)),
)
SAVES = ("save_every_n_epochs", "save_n_epoch_ratio", "save_every_n_steps")
UNET_ONLY, KEPT = "network_train_unet_only", "cache_text_encoder_outputs"
# Settings that are made of several arguments: filled in where none of these is given.
MADE_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("timestep_sampling", "discrete_flow_shift"),
        ("timestep_sampling", "weighting_scheme", "discrete_flow_shift", "training_shift"),
    ),
    "model_prediction_type": ("model_prediction_type",),
    "text_encoder_lr": ("text_encoder_lr",),
}


def read_kohya(
    text: str, *, where: str = "config", is_json: bool = False, count: Count | None = None
) -> Imported:
    """Read a config; raises LG-IMP-001 to -003, LG-CFG-001 and LG-CFG-003, each with all that it concerns.

    Text in braces, or with ``is_json`` any, is a config of kohya_ss' GUI; ``count`` is read_gui's.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise not_readable(where, f"it is larger than {MAX_BYTES // 2**20} MiB.")
    found = Findings(where)
    if is_json or text.lstrip("\ufeff \t\r\n").startswith("{"):
        script, values = read_gui(text, where, found, count)
    else:
        script, values = read_values(text, where, found)
    found.raise_any()
    script = of_model(script, values)
    values = _looked_at(script, values, found)
    settings: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, value in values.items():
        if name == PROMPTS and (lines := value if isinstance(value, list) else prompt_lines(value)):
            settings[name] = lines
        elif name in table.PLACES:
            places[name] = value
        elif name in table.NOTED and value is not False:
            found.notes.append(f"{name}: {table.NOTED[name][1]}.")
        elif name in table.REFUSED and value not in table.REFUSED[name][1]:
            _, _, why, fix = table.REFUSED[name]
            found.refuse(f"{name} {one_line(str(value), 60)}", why, fix)
        elif name in table.HONOURED and not (value == 0 and name in table.ZERO_IS_OFF):
            settings[name] = value
    defaults = {**table.KOHYA_DEFAULTS, **script.defaults}
    filled = frozenset(name for name in defaults if name not in settings)
    _fill_defaults(settings, defaults, found)
    _translate(script, values, settings, found)
    _drop_idle(script, settings, places, found)
    made = {n for n, of in MADE_OF.items() if n in settings and not any(name in values for name in of)}
    reading = _reading(values, found)
    _one_dataset(values, places, found)
    found.raise_any()
    _check_kept_tokens(settings, places, where)
    return Imported(settings, places, reading, tuple(found.notes), filled | made)


def _looked_at(script: Script, values: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Return the values without those that the script has and never looks at."""
    for name, why in script.idle.items():
        if values.get(name):
            shown = one_line(str(values[name]).lower(), 40)
            found.notes.append(f"{name} {shown}: {script.program} does nothing with it ({why}).")
    return {name: value for name, value in values.items() if name not in script.idle}


def _fill_defaults(settings: dict[str, Any], defaults: Mapping[str, Any], found: Findings) -> None:
    if settings.get("lr_scheduler_type"):
        if settings.pop("lr_scheduler", None):
            found.notes.append("lr_scheduler: lr_scheduler_type takes its place, as in kohya's trainer.")
        settings["lr_scheduler"] = TrainConfig().lr_scheduler
    filled = {name: value for name, value in defaults.items() if name not in settings}
    settings.update(filled)
    if filled:
        said = ", ".join(f"{name} {value}" for name, value in filled.items())
        found.notes.append(f"Not given, so kohya's defaults: {said}.")
    if "seed" not in settings:
        found.notes.append(f"seed: {TrainConfig().seed} is taken; {table.KEPT_DEFAULTS['seed']}.")


def _translate(script: Script, values: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    """Add the settings of TRANSLATED arguments."""
    if "resolution" in values:
        side = resolution(values["resolution"], found)
        if side is not None:
            settings["resolution"] = side
    settings["optimizer_type"] = optimizer(values, found)
    options = library_options(settings["optimizer_type"], settings.get("optimizer_args", []), found)
    if options:
        settings["optimizer_args"] = options
    if values.get("fp8_base") or values.get("fp8_base_unet"):
        settings["base_storage"] = "fp8"
    if log := values.get("log_with"):
        if log == "tensorboard":
            found.notes.append("log_with tensorboard: where it is installed; log.jsonl holds the same.")
        else:
            found.refuse(
                f"log_with {one_line(log, 40)}", "nothing is sent anywhere", "set log_with to tensorboard"
            )
    settings |= read_network(
        values.get("network_module"),
        values.get("network_args", []),
        settings["network_dim"],
        settings["network_alpha"] or settings["network_dim"],
        found,
        script,
    )
    settings |= encoder_rates(script, values.get("text_encoder_lr"), settings, found)
    untrained_rates(settings, found)
    token_length(settings, found)
    relative_steps(settings, found)
    if (
        "clip" in script.encoders
        and script.program == FLUX
        and settings["lr_scheduler"] == "adafactor"
        and not settings.get(UNET_ONLY)
    ):
        found.refuse(
            "optimizer_type Adafactor with relative_step while CLIP is trained",
            "it takes no rates, and without one Flux's text encoders are left out",
            "set network_train_unet_only, or add relative_step=False to optimizer_args",
        )
    settings |= flow_settings(script, values, found)
    _of_text(script, values, settings, found)
    _explain(settings, found)
    if any(settings.get(name) for name in SAVES):
        settings["publish_checkpoints"] = True


def _of_text(script: Script, values: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    """Add what one setting of the texts means for another."""
    if values.get("cache_text_encoder_outputs_to_disk"):
        settings[KEPT] = True
    if script.program in TRANSFORMERS and settings.get(KEPT) and settings.get("text_encoder_lr"):
        del settings[KEPT]
        found.notes.append(f"{KEPT}: CLIP is trained, so captions are encoded at each step.")


def _explain(settings: Mapping[str, Any], found: Findings) -> None:
    """Note what guides say of a setting that it does not do."""
    power = settings.get("lr_scheduler_power", 1)
    if settings.get("lr_scheduler") == "polynomial" and power != 1:
        way = "holds the rate up longer" if power < 1 else "lets the rate fall earlier"
        found.notes.append(
            f"lr_scheduler_power {power:g}: {way} than 1 does; a guide has it the other way round."
        )
    for name in ("down_lr_weight", "up_lr_weight"):
        if re.match(r"[a-z_]+\s*-", settings.get(name, "")):
            found.notes.append(
                f"{name} {settings[name]}: kohya's trainer fails on the minus; here it is subtracted."
            )


def _drop_idle(script: Script, settings: dict[str, Any], places: Mapping[str, str], found: Findings) -> None:
    """Drop what has no effect in kohya's trainer either, and say so."""
    for name, needed in WITHOUT_EFFECT:
        if settings.get(name) and not any(settings.get(other) or places.get(other) for other in needed):
            del settings[name]
            found.notes.append(f"{name}: without {' or '.join(needed)} it does nothing.")
    if PROMPTS in places or PROMPTS in settings:
        settings |= {"sample_steps": script.sample_steps, "sample_cfg": script.sample_cfg}


def _check_kept_tokens(settings: Mapping[str, Any], places: Mapping[str, str], where: str) -> None:
    moving = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
    if (
        settings.get("keep_tokens")
        and not any(settings.get(name) for name in moving)
        and "dataset_config" not in places
    ):
        raise contradiction(
            f"keep_tokens is {settings['keep_tokens']}, but there is nothing to keep in place.",
            where,
            why="tags are neither shuffled nor left out.",
            fix="set shuffle_caption to true, or keep_tokens to 0",
        )


def _reading(values: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Return how kohya's trainer reads images, as options of a scan."""
    reading: dict[str, Any] = {}
    extension = values.get("caption_extension") or values.get("caption_extention")
    if extension:
        reading["captions"] = (extension.removeprefix("."), "folder")
    if values.get("alpha_mask"):
        reading["masks"] = "alpha"
    elif values.get("masked_loss") and "dataset_config" not in values:
        found.notes.append("masked_loss: without alpha_mask there are no masks, so it does nothing.")
    if "dataset_config" in values:
        return reading
    if not extension and "in_json" not in values:
        reading["captions"] = ("caption", "folder")
        found.notes.append(
            "caption_extension: kohya's default .caption is taken, so .txt files are not read."
        )
    if values.get("enable_wildcard"):
        reading["caption_lines"] = "all"
    if "in_json" in values:
        reading |= {"captions": ("json",), "caption_json": values["in_json"]}
        reading["default_repeats"] = values.get("dataset_repeats") or 1
    elif values.get("dataset_repeats", 1) > 1:
        found.notes.append("dataset_repeats: without in_json it does nothing.")
    return reading


def _one_dataset(values: Mapping[str, Any], places: dict[str, str], found: Findings) -> None:
    if "dataset_config" not in places:
        if "resolution" not in values:
            found.notes.append("resolution: 512 is taken; kohya's trainer has no default and wants it named.")
        return
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        if name in values:
            places.pop(name, None)
            found.notes.append(f"{name}: dataset_config names the folders, and kohya's trainer takes those.")
