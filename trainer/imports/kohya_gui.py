"""Read a config of bmaltais' kohya_ss GUI: what its LoRA tab saves becomes arguments of kohya's scripts.

What the GUI computes is computed as it does; from there on its config is one of kohya's. A key that a file
leaves out means what the window shows. Facts: kohya_ss 26.0.0, kohya_gui/lora_gui.py and common_gui.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data.kohya_keys import NUMBER, SWITCH, WHOLE
from ..errors import listed, one_line
from . import kohya_gui_table as gui_table
from . import kohya_table as table
from .command_text import read_options
from .imported import Findings, foreign, not_readable
from .kohya_gui_network import KEYS as NETWORK_KEYS
from .kohya_gui_network import network
from .kohya_scripts import FLUX, OTHERS, SCRIPTS, SD3, SDXL, Script
from .kohya_text import of_options, of_pairs
from .kohya_values import WRONG, instead_of, typed
from .lora_scripts import PROMPTS

Count = Callable[[str], int]

PLAIN_SCRIPT = "train_network.py"
EMPTY: tuple[Any, ...] = ("", None, [])
PICTURES, REPEATS = (".jpg", ".jpeg", ".png", ".webp"), re.compile("[0-9]{1,9}")
OF_EMBEDDINGS = ("num_vectors_per_token", "token_string")
# key -> the scripts for which it is handed on, why it cannot be honoured, what to do
REFUSED: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "train_inpainting": (
        (PLAIN_SCRIPT, SDXL),
        "it trains a base that is shown masks",
        'write "train_inpainting": false',
    ),
    "show_timesteps": (
        (FLUX, SD3),
        "it shows noise levels instead of training",
        'write "show_timesteps": ""',
    ),
}

# key of the window -> the argument that it is handed on as, whatever the model
ARGUMENTS: Mapping[str, str] = {**{name: name for name in gui_table.HANDED_ON}, **gui_table.RENAMED}
_HANDED_ON: Mapping[str, str] = {
    **ARGUMENTS,
    **{name: name for name in gui_table.NOISE},
    **{key: name for names in gui_table.BY_MODEL.values() for key, name in names.items()},
}
# key -> the kind of its value
KINDS: Mapping[str, str] = {
    **{key: table.kind_of(name) for key, name in _HANDED_ON.items()},
    **gui_table.COMPUTED,
    **gui_table.OLDER,
    **NETWORK_KEYS,
}
# Keys whose value in the window is said where a file leaves them out.
SAID = tuple(
    key
    for key in gui_table.WINDOW
    if ARGUMENTS.get(key) in {*table.HONOURED, *table.TRANSLATED}
    or key in ("LoRA_type", "lr_warmup", "max_train_steps", "text_encoder_lr")
)
EMPTY_IS_WINDOW = ("lr_scheduler_num_cycles", "lr_scheduler_power", "max_token_length")
_NOTHING: Mapping[str, Any] = {SWITCH: False, NUMBER: 0, WHOLE: 0}
KNOWN = (*KINDS, *gui_table.NOTED, *gui_table.UNSAID)


def read_gui(
    text: str, where: str, found: Findings, count: Count | None = None
) -> tuple[Script, dict[str, Any]]:
    """Return the script that the GUI starts and the arguments that it hands on, by kohya's names.

    ``count`` says how many pictures, with repeats, lie in a folder; without it epochs are counted. Faults and
    notes go to ``found``; raises LG-IMP-001 for what is no JSON of the GUI and LG-IMP-003 for another tab's.
    """
    gui = _values(_parsed(text, where), where, found)
    found.raise_any()
    script = _script(gui, where, found)
    found.raise_any()
    given = of_pairs(arguments(gui, script, found, count).items(), script, found)
    further = gui["additional_parameters"].replace('"', "").split()
    of_options(read_options(further, f"{where}: additional_parameters"), script, given, found)
    if lines := [line.strip() for line in gui[PROMPTS].splitlines() if line.strip() and line[0] != "#"]:
        given[PROMPTS] = lines
    return script, given


def arguments(
    gui: Mapping[str, Any], script: Script, found: Findings, count: Count | None = None
) -> dict[str, Any]:
    """Return the arguments that the GUI writes for ``script``, without additional_parameters and prompts.

    ``gui`` holds every key of KINDS. Left out is what is 0, off or empty, as in the GUI, and what the window
    shows by itself and means nothing here.
    """
    handed_on = {**ARGUMENTS, **gui_table.BY_MODEL.get(script.program, {})}
    handed_on |= {key: key for key, kind in gui_table.NOISE.items() if gui["noise_offset_type"] == kind}
    result = {
        name: gui[key]
        for key, name in handed_on.items()
        if not (name in table.NOTED and gui[key] == gui_table.WINDOW.get(key))
    }
    result |= (
        _older(gui) | _rates(gui, script, found) | _steps(gui, found, count) | network(gui, script, found)
    )
    result["lr_warmup_steps"] = _warmup(gui)
    for name in ("optimizer_args", "lr_scheduler_args"):
        result[name] = gui[name].replace('"', "").split()
    if gui["xformers"] == "sdpa":
        result["sdpa"] = True
    if script.program == FLUX:
        result |= _chroma(gui) | {"max_token_length": 0}
    for key, (scripts, why, fix) in REFUSED.items():
        if gui[key] and script.program in scripts:
            found.refuse(f"{key} {one_line(str(gui[key]), 40)}", why, fix)
    return {name: value for name, value in result.items() if value not in (*EMPTY, 0)}


def pictures_in(folder: str) -> int:
    """Return how many pictures the GUI counts in a folder: those of each subfolder N_name, N times each."""
    total = 0
    try:
        for place in Path(folder).iterdir():
            repeats = place.name.split("_")[0]
            if REPEATS.fullmatch(repeats) and place.is_dir():
                total += int(repeats) * sum(f.name.casefold().endswith(PICTURES) for f in place.iterdir())
    except (OSError, ValueError):
        return 0  # the run itself says what is wrong with the folder
    return total


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text.removeprefix("\ufeff"), parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise not_readable(where, f"{why}.") from None
    if not isinstance(parsed, dict):
        raise not_readable(where, "it is JSON, but no object with settings by name.")
    if len(parsed) > len(KNOWN):
        raise not_readable(where, "it is JSON, but holds more keys than kohya_ss' GUI has.")
    return parsed


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{one_line(repr(name), 60)} stands there twice")
        result[name] = value
    return result


def _values(parsed: Mapping[str, Any], where: str, found: Findings) -> dict[str, Any]:
    """Return a value for every key of KINDS: the file's, or what the window shows by itself."""
    if not {"LoRA_type", "network_dim"} & parsed.keys():
        raise _of_another_tab(parsed, where)
    gui: dict[str, Any] = {key: _NOTHING.get(kind, "") for key, kind in KINDS.items()}
    gui |= gui_table.WINDOW
    for key, value in parsed.items():
        if key not in KNOWN:
            found.not_known(key, KNOWN)
        elif key in KINDS and value is not None:
            if value not in EMPTY:
                gui[key] = _typed(key, value, found)
            elif key not in EMPTY_IS_WINDOW:
                gui[key] = _NOTHING.get(KINDS[key], "")
        elif key in gui_table.NOTED and value and value not in gui_table.NOTED[key][0]:
            found.notes.append(f"{key} {one_line(str(value), 40)}: {gui_table.NOTED[key][1]}.")
    if "optimizer" not in parsed and not gui["use_8bit_adam"]:
        gui["optimizer"] = "AdamW"
    filled = [key for key in SAID if parsed.get(key) is None]
    if filled:
        said = ", ".join(f"{key} {gui[key]}" for key in filled)
        found.notes.append(f"Not in the file, so what the GUI's window shows: {said}.")
    return gui


def _typed(key: str, value: Any, found: Findings) -> Any:
    kind = KINDS[key]
    plain = {gui_table.EITHER: (str, int, float), gui_table.CHOICE: (str, bool)}.get(kind)
    if plain:
        wrong = not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain)
        taken = WRONG if wrong else value
    else:
        taken = typed(kind, value)
    if taken is WRONG:
        found.expect(key, value, kind, f'"{key}": {instead_of(kind, value)}')
    return taken


def _of_another_tab(parsed: Mapping[str, Any], where: str) -> Exception:
    known = {*KNOWN, *OF_EMBEDDINGS}
    if sum(key in known for key in parsed) * 2 < len(parsed) or not parsed:
        return not_readable(where, "it is JSON, but most of its keys are none of kohya_ss' GUI.")
    what = "an embedding" if any(key in parsed for key in OF_EMBEDDINGS) else "the whole model"
    return foreign(
        "This is a config of another tab of kohya_ss' GUI.",
        where,
        why=f"it has no LoRA_type and no network_dim, so it trains {what}.",
        fix="give a config that the LoRA tab has saved",
    )


def _script(gui: Mapping[str, Any], where: str, found: Findings) -> Script:
    ticked = [box for box in gui_table.SCRIPTS if gui[box]]
    if len(ticked) > 1:
        found.refuse(listed(ticked), "the window lets one model be ticked", f"keep one of {listed(ticked)}")
    program = gui_table.SCRIPTS[ticked[0]] if ticked else PLAIN_SCRIPT
    if program in OTHERS:
        raise foreign(
            f"This config of kohya_ss' GUI is for {OTHERS[program]}.",
            f"{where}: {ticked[0]}",
            why=f"it starts {program}; the scripts whose arguments are known are {listed(SCRIPTS)}.",
            fix="give a config for Stable Diffusion, SDXL, SD3 or Flux, or set the values by hand",
        )
    return SCRIPTS[program]


def _older(gui: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the GUI makes of keys that were named otherwise, or of values that are choices no more."""
    result: dict[str, Any] = {}
    if gui["use_wandb"] == "True":
        result["log_with"] = "wandb"
    if gui["lora_network_weights"]:
        result["network_weights"] = gui["lora_network_weights"]
    if gui["save_model_as"] not in ("safetensors", "ckpt"):
        result["save_model_as"] = "safetensors"
    if gui["resume_from_huggingface"]:
        result["resume_from_huggingface"] = True
    return result


def _rates(gui: Mapping[str, Any], script: Script, found: Findings) -> dict[str, Any]:
    """Return the text encoders' rates, and which part a rate of 0 leaves out."""
    text, t5, unet = gui["text_encoder_lr"], gui["t5xxl_lr"], gui["unet_lr"]
    if t5 > 0 and not text:
        found.refuse("t5xxl_lr without text_encoder_lr", "the GUI does not start with it", "set both")
    if not any((gui["learning_rate"], text, unet)):
        found.refuse("learning_rate, text_encoder_lr and unet_lr 0", "nothing would learn", "set one of them")
    result = {
        "network_train_unet_only": text == 0 and unet != 0,
        "network_train_text_encoder_only": text != 0 and unet == 0,
    }
    if text <= 0:
        return result
    if t5 > 0 and "t5" not in script.encoders:
        found.notes.append(
            f"t5xxl_lr {t5:g}: {script.base} has no T5, so kohya's trainer does not look at it."
        )
    return {**result, "text_encoder_lr": [text, t5 or text] if "t5" in script.encoders else [text]}


def _steps(gui: Mapping[str, Any], found: Findings, count: Count | None) -> dict[str, Any]:
    """Return max_train_steps, counted from the pictures where the file says 0, or the epochs."""
    if gui["max_train_steps"] or gui["max_train_epochs"]:
        named = next(name for name in ("max_train_epochs", "max_train_steps") if gui[name])
        if gui["epoch"] not in (1, gui[named]):
            found.notes.append(f"epoch {gui['epoch']}: {named} {gui[named]} decides, as in the GUI.")
        return {"max_train_steps": 0 if gui["max_train_epochs"] else gui["max_train_steps"]}
    if gui["dataset_config"]:
        found.notes.append("max_train_steps 0: beside a dataset_config it means kohya's 1600 steps.")
        return {}
    pictures = count(gui["train_data_dir"]) if count and gui["train_data_dir"] else 0
    if pictures == 0 or min(gui["train_batch_size"], gui["gradient_accumulation_steps"]) < 1:
        found.notes.append(
            f"max_train_steps 0: the GUI counts pictures; max_train_epochs {gui['epoch']} takes its place."
        )
        return {"max_train_epochs": gui["epoch"]}
    batches = float(pictures) / gui["train_batch_size"] / gui["gradient_accumulation_steps"]
    steps = math.ceil(batches * gui["epoch"] * (2 if gui["reg_data_dir"] else 1))
    found.notes.append(f"max_train_steps {steps}: made of {pictures} pictures with repeats, as the GUI does.")
    return {"max_train_steps": steps}


def _warmup(gui: Mapping[str, Any]) -> float:
    """Return the steps of warmup, or their share of all steps; the steps win over lr_warmup's percents."""
    percent, steps = gui["lr_warmup"], gui["lr_warmup_steps"]
    if gui["dataset_config"] and gui["max_train_steps"] > 0 and steps <= 0:
        return round(percent * gui["max_train_steps"] / 100)
    if steps > 0 and not (gui["dataset_config"] and gui["max_train_steps"] == 0):
        return int(steps)
    return float(percent / 100)


def _chroma(gui: Mapping[str, Any]) -> dict[str, Any]:
    if gui["model_type"].casefold() != "chroma":
        return {}
    return {"model_type": "chroma", "clip_l": "", "apply_t5_attn_mask": True}
