"""What the MODEL predicts as ComfyUI samples it, against what the run is to train."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling

from ..trainer.errors import LoraGraftError

# Largest sigmas: of the betas that SD1.x was trained with (0.00085 to 0.012, scaled linear), and of these
# rescaled to a zero terminal signal, which ComfyUI holds at a small one so that it stays finite.
SIGMA_MAX, SIGMA_MAX_ZERO_SNR = 14.6146, 4518.7
KINDS = {False: comfy.model_sampling.EPS, True: comfy.model_sampling.V_PREDICTION}
SWITCH = {False: "off", True: "on"}


def check_prediction(model: Any, v_parameterization: bool, zero_terminal_snr: bool) -> None:
    """Raise LG-NODE-006 where the MODEL would be sampled otherwise than it is trained."""
    sampling = model.get_model_object("model_sampling")
    found = [c for c in type(sampling).__mro__ if c.__module__ == comfy.model_sampling.__name__]
    sigma = float(getattr(sampling, "sigma_max", 0.0))
    # In ComfyUI every other prediction type derives from EPS.
    prediction = next((c for c in found if issubclass(c, comfy.model_sampling.EPS)), None)
    is_v = next((v for v, kind in KINDS.items() if kind is prediction), None)
    is_zero = next(
        (z for z, most in ((False, SIGMA_MAX), (True, SIGMA_MAX_ZERO_SNR)) if _near(sigma, most)), None
    )
    wanted = {
        "v_parameterization": (v_parameterization, is_v),
        "zero_terminal_snr": (zero_terminal_snr, is_zero),
    }
    unfit = {name: has for name, (want, has) in wanted.items() if want is not has}
    if not unfit:
        return
    known = [
        f"set {name} to {SWITCH[has]} (Loss and Noise)" for name, has in unfit.items() if has is not None
    ]
    raise LoraGraftError(
        "LG-NODE-006",
        "The MODEL's sampling is not that of the settings.",
        where=f"MODEL: {', '.join(c.__name__ for c in found)}, largest sigma {sigma:.5g}",
        why="the LoRA would be trained for another prediction or other noise than it is sampled with.",
        fix=" and ".join(known)
        if len(known) == len(unfit)
        else "link the loader's MODEL, without ModelSampling nodes",
    )


def _near(sigma: float, most: float) -> bool:
    return abs(sigma - most) < 1e-3 * most
