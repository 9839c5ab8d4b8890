"""What the MODEL predicts as ComfyUI samples it, against what the run is to train."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling

from ..trainer.errors import LoraGraftError
from .host_names import family_of

# Largest sigmas: of the betas that SD was trained with (0.00085 to 0.012, scaled linear), and of these
# rescaled to a zero terminal signal, which ComfyUI holds at a small one so that it stays finite.
SIGMA_MAX, SIGMA_MAX_ZERO_SNR = 14.6146, 4518.7
KINDS = {False: comfy.model_sampling.EPS, True: comfy.model_sampling.V_PREDICTION}
SWITCH = {False: "off", True: "on"}
# In ComfyUI every other prediction type derives from one of these; a flow's is CONST.
PREDICTIONS = (comfy.model_sampling.EPS, comfy.model_sampling.CONST)


def prediction(model: Any) -> tuple[bool | None, bool | None]:
    """Return whether the MODEL is sampled as velocity, and up to a zero terminal signal; None for neither."""
    sampling = model.get_model_object("model_sampling")
    kind = _kind(sampling)
    is_v = next((v for v, known in KINDS.items() if known is kind), None)
    if is_v is None:
        return None, None
    sigma = float(getattr(sampling, "sigma_max", 0.0))
    known_sigmas = ((False, SIGMA_MAX), (True, SIGMA_MAX_ZERO_SNR))
    return is_v, next((z for z, most in known_sigmas if _near(sigma, most)), None)


def check_prediction(model: Any, v_parameterization: bool, zero_terminal_snr: bool) -> None:
    """Raise LG-NODE-006 where the MODEL would be sampled otherwise than it is trained.

    A flow has one prediction, and ModelSampling nodes only shift the levels that it is sampled at.
    """
    known = family_of(model)
    if known is None:  # it is trained as it is sampled, by ComfyUI itself
        return
    sampling = model.get_model_object("model_sampling")
    unfit: dict[str, bool | None]
    if known.flow:
        unfit = {} if _kind(sampling) is comfy.model_sampling.CONST else {"its sampling": None}
    else:
        is_v, is_zero = prediction(model)
        wanted = {
            "v_parameterization": (v_parameterization, is_v),
            "zero_terminal_snr": (zero_terminal_snr, is_zero),
        }
        # What the MODEL says of itself and the settings leave off, is switched on when the run is opened.
        unfit = {name: has for name, (want, has) in wanted.items() if has is None or (want and not has)}
    if not unfit:
        return
    found = [c.__name__ for c in _classes(sampling)]
    fixes = [
        f"set {name} to {SWITCH[has]} (Loss and Noise)" for name, has in unfit.items() if has is not None
    ]
    raise LoraGraftError(
        "LG-NODE-006",
        "The MODEL's sampling is not that of the settings.",
        where=f"MODEL: {', '.join(found)}, largest sigma {float(getattr(sampling, 'sigma_max', 0.0)):.5g}",
        why="the LoRA would be trained for another prediction or other noise than it is sampled with.",
        fix=" and ".join(fixes)
        if len(fixes) == len(unfit)
        else "link the loader's MODEL, without ModelSampling nodes",
    )


def _classes(sampling: Any) -> list[type]:
    return [c for c in type(sampling).__mro__ if c.__module__ == comfy.model_sampling.__name__]


def _kind(sampling: Any) -> type | None:
    """Return what the model predicts, as a class of ComfyUI's."""
    return next((c for c in _classes(sampling) if issubclass(c, PREDICTIONS)), None)


def _near(sigma: float, most: float) -> bool:
    return abs(sigma - most) < 1e-3 * most
