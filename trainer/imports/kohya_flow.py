"""What kohya's scripts for SD3 and Flux do with noise levels and losses, as settings here.

Their weighting_scheme names either how noise levels are drawn or how they count. Flux's script draws by it
only where timestep_sampling is sigma, from a schedule that falls, and weighs by it only where
model_prediction_type is sigma_scaled. SD3's always compares images. Facts: sd-scripts 0.10.1,
library/flux_train_utils.py and sd3_train_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .imported import Findings
from .kohya_scripts import FLUX, SD3, Script

DENSITIES = ("logit_normal", "mode")
WEIGHTS = ("sigma_sqrt", "cosmap")
SCHEMES = (*WEIGHTS, *DENSITIES, "none", "uniform")
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
PREDICTIONS = ("raw", "additive", "sigma_scaled")
MODELS = ("flux", "chroma")
# A number of a distribution -> the values of timestep_sampling or weighting_scheme that use it.
USERS: Mapping[str, tuple[str, ...]] = {
    "sigmoid_scale": ("sigmoid", "shift", "flux_shift"),
    "discrete_flow_shift": ("shift", "sigma"),
    "logit_mean": ("logit_normal",),
    "logit_std": ("logit_normal",),
    "mode_scale": ("mode",),
}
CHROMA = ("guidance_scale", "apply_t5_attn_mask")


def flow_settings(script: Script, values: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Return the settings of a script's flow; {} for scripts of U-Nets. Faults and notes go to ``found``."""
    readers = {FLUX: _flux, SD3: _sd3}
    return readers[script.program](values, found) if script.program in readers else {}


def _flux(values: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    sampling = _choice(values, "timestep_sampling", "sigma", SAMPLINGS, found)
    scheme = _choice(values, "weighting_scheme", "uniform", SCHEMES, found)
    prediction = _choice(values, "model_prediction_type", "sigma_scaled", PREDICTIONS, found)
    _choice(values, "model_type", "flux", MODELS, found)
    result: dict[str, Any] = {"model_prediction_type": prediction}
    _say_defaults(values, ("timestep_sampling", sampling), ("model_prediction_type", prediction), found)
    if scheme in DENSITIES and sampling == "sigma":
        result |= {"timestep_sampling": scheme, **_numbers(values, scheme)}
        result["discrete_flow_shift"] = values.get("discrete_flow_shift", 3.0)
        if "logit_mean" in result:
            result["logit_mean"] = -result["logit_mean"] or 0.0
            found.notes.append(
                f"logit_mean: this script draws from a schedule that falls, so {result['logit_mean']:g} "
                "means the same here, where above 0 is noisier."
            )
    else:
        result |= {"timestep_sampling": sampling, **_numbers(values, sampling)}
        if sampling in USERS["discrete_flow_shift"]:
            result["discrete_flow_shift"] = values.get("discrete_flow_shift", 3.0)
        if scheme in DENSITIES:
            found.notes.append(
                f"weighting_scheme {scheme}: beside timestep_sampling {sampling} it does nothing."
            )
    if scheme in WEIGHTS and prediction == "sigma_scaled":
        result["weighting_scheme"] = scheme
    elif scheme in WEIGHTS:
        found.notes.append(
            f"weighting_scheme {scheme}: with model_prediction_type {prediction} it does nothing."
        )
    if prediction != "raw":
        found.notes.append(
            f"model_prediction_type {prediction}: it teaches the model another output than samplers expect; "
            "raw is what kohya's documentation advises."
        )
    _say_idle(values, result, found)
    return result


def _sd3(values: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    scheme = _choice(values, "weighting_scheme", "uniform", SCHEMES, found)
    shift = values.get("training_shift", 1.0)
    result: dict[str, Any] = {"model_prediction_type": "denoised"}
    if scheme in DENSITIES:
        result |= {"timestep_sampling": scheme, "discrete_flow_shift": shift, **_numbers(values, scheme)}
    elif shift == 1:
        result["timestep_sampling"] = "uniform"
    else:
        result |= {"timestep_sampling": "sigma", "discrete_flow_shift": shift}
    if scheme in WEIGHTS:
        result["weighting_scheme"] = scheme
    found.notes.append(
        "model_prediction_type denoised: this script compares images, so noise levels count by their square."
    )
    _say_idle(values, result, found)
    return result


def _choice(
    values: Mapping[str, Any], name: str, default: str, choices: Sequence[str], found: Findings
) -> str:
    value = values.get(name, default)
    if value in choices:
        return str(value)
    found.expect(name, value, f"one of {', '.join(choices)}", f"{name} = {choices[0]}")
    return default


def _numbers(values: Mapping[str, Any], sampling: str) -> dict[str, Any]:
    """Return the numbers that are given and that this distribution uses."""
    return {
        name: values[name]
        for name, users in USERS.items()
        if name in values and sampling in users and name != "discrete_flow_shift"
    }


def _say_defaults(
    values: Mapping[str, Any], sampling: tuple[str, str], prediction: tuple[str, str], found: Findings
) -> None:
    filled = [f"{name} {value}" for name, value in (sampling, prediction) if name not in values]
    if filled:
        found.notes.append(f"Not given, so kohya's defaults: {', '.join(filled)}.")


def _say_idle(values: Mapping[str, Any], result: Mapping[str, Any], found: Findings) -> None:
    for name, users in USERS.items():
        if name in values and name not in result:
            found.notes.append(f"{name}: without {' or '.join(users)} it does nothing.")
