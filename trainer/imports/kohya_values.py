"""A value of kohya's, typed in TOML or written on a command line, as the kind that its argument takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ENCODER_RATES
from ..contradictions.network import WITHOUT_TEXT
from ..data.kohya_keys import NUMBER, SWITCH, TEXT, WHOLE
from ..errors import one_line
from ..settings.optimizers import KNOWN, OPTION_ALIASES, named
from .imported import Findings
from .kohya_scripts import Script
from .kohya_table import RATES, STEPS, WORDS

WRONG = object()
LARGEST = 2.0**63  # beyond it a whole number is none that can be computed with
CHUNK = 75  # tokens that CLIP reads at once
# A switch -> the rates of what it leaves out.
UNTRAINED: Mapping[str, Sequence[str]] = {
    "network_train_unet_only": tuple(ENCODER_RATES.values()),
    "network_train_text_encoder_only": ("unet_lr",),
}

# What the libraries that kohya's trainer takes use where optimizer_args say nothing, as far as the options
# here differ (dadaptation 3.2, prodigyopt 1.0).
LIBRARY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DAdaptAdam": {"weight_decouple": False, "weight_decay": 0.0, "betas": (0.9, 0.999)},
    "DAdaptLion": {"betas": (0.9, 0.999)},
    "Prodigy": {"weight_decay": 0.0, "d_coef": 1.0, "bias_correction": False, "safeguard_warmup": False},
}


def typed(kind: str, value: Any) -> Any:
    """Return a value of TOML as this kind, or WRONG; text that reads as a number is one."""
    if kind == SWITCH:
        return value if isinstance(value, bool) else WRONG
    if kind == WORDS:
        fits = isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value)
        return [str(item) for item in value] if fits else WRONG
    if kind == TEXT:
        return value if isinstance(value, str) else WRONG
    if kind in (WHOLE, NUMBER, STEPS):
        return _number(kind, value)
    return value  # kinds of one argument alone are read where it is translated


def written(kind: str, values: tuple[str, ...]) -> Any:
    """Return the values behind an argument of a command line as this kind, or WRONG."""
    if kind == SWITCH:
        return WRONG if values else True
    if kind == WORDS:
        return list(values)
    if kind == RATES:
        return [typed(NUMBER, value) for value in values] if values else WRONG
    return typed(kind, values[0]) if len(values) == 1 else WRONG


def instead_of(kind: str, value: Any) -> str:
    """Return what is nearest to a value that is none of this kind, as a file holds it."""
    text = str(value)
    found = re.search(r"\d+(\.\d+)?(e[+-]?\d+)?", text, re.IGNORECASE)
    if kind == SWITCH:
        return "false" if text.casefold() in ("no", "off", "false", "0", "0.0") else "true"
    if kind == WHOLE:
        return str(round(float(found[0]))) if found and math.isfinite(float(found[0])) else "1"
    if kind in (NUMBER, STEPS, RATES):
        return found[0] if found else "1e-4"
    if kind == WORDS:
        return f'["{one_line(text, 60)}"]'
    return f'"{one_line(text, 60)}"'


def _number(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        percent = kind == STEPS and value.endswith("%")
        try:
            value = float(value[:-1]) / 100 if percent else float(value)
        except ValueError:
            return WRONG
        if kind == STEPS and value >= 1 and value.is_integer():
            value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return WRONG
    if kind == WHOLE:
        return int(value) if float(value).is_integer() else WRONG
    return value


def resolution(value: Any, found: Findings) -> Any:
    """Return 512, "512", "512,768" or [512, 768] as a side or a pair."""
    sides = value if isinstance(value, list) else str(value).split(",")
    numbers = [typed(WHOLE, side.strip() if isinstance(side, str) else side) for side in sides]
    if isinstance(value, bool) or len(numbers) not in (1, 2) or WRONG in numbers:
        sides = re.findall(r"\d+", str(value))[:2] or ["512"]
        found.expect("resolution", value, "512 or 512,768", f"resolution {','.join(sides)}")
        return None
    return numbers[0] if len(numbers) == 1 or numbers[0] == numbers[1] else numbers


def encoder_rates(script: Script, value: Any, settings: dict[str, Any], found: Findings) -> dict[str, float]:
    """Return the text encoders' rates, by setting; takes train_t5xxl out of ``settings``.

    A T5 is trained only with train_t5xxl. Where nothing is said of a CLIP beside one, its rate is
    learning_rate, as the reference trainer takes it.
    """
    trains_t5 = settings.pop("train_t5xxl", False)
    if not script.encoders and trains_t5:
        found.refuse("network_args train_t5xxl=True", f"{script.base}'s T5 is not trained here", "remove it")
    rates = [typed(NUMBER, rate) for rate in (value if isinstance(value, list) else [value])]
    if value is None or rates == []:
        rates = [settings["learning_rate"]] if "t5" in script.encoders else []
    if WRONG in rates:
        found.expect("text_encoder_lr", value, "a number", "for instance text_encoder_lr 5e-5")
        return {}
    left_out = settings.get("network_train_unet_only") or settings.get("preset") in WITHOUT_TEXT
    if not rates or (left_out and value is None):
        return {}
    count = len(script.encoders)
    if len(rates) > count or (len(set(rates)) > 1 and count == 1):
        found.refuse(
            f"text_encoder_lr {one_line(repr(rates), 60)}",
            f"{script.base} has {'one text encoder' if count == 1 else f'{count} text encoders'}",
            "write one rate" if count == 1 else f"write at most {count} rates",
        )
        return {}
    if len(set(rates)) > 1 and script.encoders == ("clip", "clip"):
        found.notes.append(
            "text_encoder_lr: networks.lora takes the first rate for both text encoders; here each counts."
        )
    return _by_encoder(script.encoders, rates + rates[-1:] * (count - len(rates)), trains_t5)


def untrained_rates(settings: dict[str, Any], found: Findings) -> None:
    """Drop rates of what is switched off: kohya's trainer leaves that part out all the same."""
    for switch, names in UNTRAINED.items():
        for name in names if settings.get(switch) else ():
            if settings.pop(name, None) is not None:
                found.notes.append(f"{name}: {switch} leaves that part out, so it does nothing.")


def token_length(settings: dict[str, Any], found: Findings) -> None:
    """Replace a length such as lora-scripts' 255 by the multiple of 75 that kohya's trainer makes of it.

    It cuts the tokens, two marks among them, into chunks of 75 and leaves the rest unread.
    """
    given = settings.get("max_token_length", CHUNK)
    chunks = len(range(1, given - CHUNK + 2, CHUNK))
    if given % CHUNK and 1 <= chunks <= 3:
        settings["max_token_length"] = chunks * CHUNK
        found.notes.append(f"max_token_length {given}: kohya's trainer reads {chunks * CHUNK} of it.")


def _by_encoder(kinds: Sequence[str], rates: Sequence[float], trains_t5: bool) -> dict[str, float]:
    """Return the rates by setting, further ones only where they say something."""
    result: dict[str, float] = {}
    for name, kind, rate in zip(ENCODER_RATES.values(), kinds, rates, strict=False):
        is_said = trains_t5 if kind == "t5" else not result or rate != rates[0]
        if is_said:
            result[name] = rate
    return result


def optimizer(values: Mapping[str, Any], found: Findings) -> str:
    """Return the optimizer that optimizer_type or one of the older switches names."""
    chosen = str(values.get("optimizer_type") or "")
    older = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    for name in (name for name in older if values.get(name)):
        if chosen and chosen.casefold() != older[name].casefold():
            found.refuse(
                name, f"another optimizer is named beside it, {one_line(chosen, 40)}", f"remove {name}"
            )
        chosen = chosen or older[name]
    return chosen or "AdamW"


def relative_steps(settings: dict[str, Any], found: Findings) -> None:
    """Drop what kohya's trainer drops for Adafactor with relative_step, its default: rates and schedule."""
    options = [item.replace(" ", "") for item in settings.get("optimizer_args", [])]
    if settings["optimizer_type"].casefold() != "adafactor" or "relative_step=False" in options:
        return
    for name in ("learning_rate", "unet_lr", *ENCODER_RATES.values(), "lr_warmup_steps"):
        settings.pop(name, None)
    settings["lr_scheduler"] = "adafactor"
    found.notes.append(
        "optimizer_type Adafactor: with relative_step, its default, it makes its rates itself; learning "
        "rates and schedule do not count, as in kohya's trainer."
    )


def library_options(optimizer_type: str, given: list[str], found: Findings) -> list[str]:
    """Return ``given`` with what the optimizer's own library takes for the options it does not name."""
    known = named(optimizer_type)
    name = next((name for name, entry in KNOWN.items() if entry is known), "")
    named_options = {item.partition("=")[0].strip() for item in given}
    missing = {
        option: value
        for option, value in LIBRARY_DEFAULTS.get(name, {}).items()
        if not named_options & {option, OPTION_ALIASES.get(option, option)}
    }
    filled = [f"{option}={value}" for option, value in missing.items()]
    if filled:
        found.notes.append(
            f"optimizer_args: {name}'s own defaults are taken, as kohya does: {', '.join(filled)}."
        )
    return [*given, *filled]
