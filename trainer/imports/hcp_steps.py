"""What a step of HCP-Diffusion is: one batch of every dataset, and what follows of each from its file.

Facts: HCP-Diffusion's hcpdiff/train_ac.py (train_one_step, scale_lr) and hcpdiff/utils/ema.py. A step's
gradient is the sum over the datasets of loss_weight times their mean loss, and scale_lr multiplies by all
their images. Here a class dataset's batches come behind the training images' as micro-batches of their own,
whose mean is taken, so that the same step has half the gradient: an adaptive optimizer does not see that, and
the clipping is halved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.hcp_keys import is_class
from .hcp_layers import number
from .imported import Findings

RATES = ("learning_rate", "unet_lr", "text_encoder_lr")


def read_averages(model: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    """Add the average of the weights; HCP-Diffusion has a decay for each part, here there is one for all."""
    trained = {
        "ema_unet": not settings.get("network_train_text_encoder_only"),
        "ema_text_encoder": not settings.get("network_train_unet_only"),
    }
    decays = {}
    for key, is_trained in trained.items():
        value = number(model.get(key) or 0)
        if value is None:
            found.expect(f"model.{key}", model[key], "a number", f"{key}: 0.9999, or 0 for none")
        elif is_trained:
            decays[key] = value
    if len(set(decays.values())) > 1:
        found.refuse(
            " and ".join(f"model.{key} {value:g}" for key, value in decays.items()),
            "one average is kept of all that is trained",
            "give both the same number",
        )
    elif any(decays.values()):
        settings["ema_decay"] = next(iter(decays.values()))


def read_steps(data: Any, settings: dict[str, Any], found: Findings) -> None:
    """Add what the datasets' batch sizes mean; what is wrong with a dataset is said when it is read."""
    if not isinstance(data, Mapping):
        return
    sizes = {
        name: int(value)
        for name, dataset in data.items()
        if isinstance(dataset, Mapping) and (value := number(dataset.get("batch_size", 1)))
    }
    training = [size for name, size in sizes.items() if not is_class(name)]
    if not training or min(sizes.values()) < 1:
        return
    settings["train_batch_size"] = training[0]
    if len(training) == len(sizes):
        return
    accumulated = settings["gradient_accumulation_steps"]
    settings["gradient_accumulation_steps"] = 2 * accumulated
    settings["max_grad_norm"] = settings["max_grad_norm"] / 2
    told = "a step takes a batch of training and a batch of class images: gradient_accumulation_steps "
    told += f"{2 * accumulated}, and max_grad_norm {settings['max_grad_norm']:g} for their mean"
    if settings["scale_lr"]:
        images = sum(sizes.values()) * accumulated
        settings["scale_lr"] = False
        settings |= {name: _times(settings[name], images) for name in RATES if settings.get(name)}
        if given := settings.get("network_reg_lrs"):
            pairs = [entry.rpartition("=") for entry in given]
            scaled = [f"{name}={_times(float(rate), images)!r}" for name, _, rate in pairs]
            settings["network_reg_lrs"] = scaled
        told += f"; train.scale_lr: the rates are multiplied by the {images} images of a step"
    found.notes.append(f"data: {told}.")


def _times(rate: float, images: int) -> float:
    """Return the product as a user would write it."""
    return float(f"{rate * images:.10g}")
