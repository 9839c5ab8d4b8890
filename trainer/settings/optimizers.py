"""The optimizers that a run can have: where each is found, its options where none are given, how it behaves.

Data only: whether a library is there is asked when a run opens (trainer.optim.find).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Known:
    """One optimizer. ``options`` hold unless optimizer_args say otherwise; ``fixed`` cannot be changed.

    ``adaptive``: it finds the rate itself, learning_rate is a factor near 1 and the same everywhere.
    ``schedule_free``: it averages instead of following a schedule; what is saved is the average.
    ``elementwise``: it may see many tensors as one long tensor. ``separable``: it may take its step for one
    tensor and later for the next. ``usual_lr`` is what a message proposes, ``too_high`` from where it warns.
    """

    module: str
    cls: str
    package: str = ""  # what pip installs it with; empty: it is always there
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    adaptive: bool = False
    schedule_free: bool = False
    elementwise: bool = False
    separable: bool = False
    usual_lr: float = 1e-4
    too_high: float = 0.1


TORCH, OWN, BITS = "torch.optim", "loragraft", "bitsandbytes.optim"
MANY, DADAPT = "pytorch_optimizer", "dadaptation"

# Betas, decay and warm-up of the adaptive ones: the advice of the guides that LoRA trainers follow. Without
# decoupled decay they drift, without safeguard_warmup Prodigy's estimate suffers from a warm-up.
DADAPT_ADAM = {"weight_decouple": True, "weight_decay": 0.01, "betas": (0.9, 0.99)}
PRODIGY = {
    "weight_decouple": True,
    "weight_decay": 0.01,
    "d_coef": 2.0,
    "bias_correction": True,
    "safeguard_warmup": True,
}


def _bits(cls: str, **more: Any) -> Known:
    return Known(BITS, cls, "bitsandbytes", **more)


def _adaptive(module: str, cls: str, **options: Any) -> Known:
    package = module.partition(".")[0]
    return Known(module, cls, package, options, adaptive=True, usual_lr=1.0, too_high=10.0)


def _free(cls: str, usual_lr: float, too_high: float) -> Known:
    return Known(MANY, cls, MANY, schedule_free=True, usual_lr=usual_lr, too_high=too_high)


def _many(cls: str, usual_lr: float = 1e-4) -> Known:
    return Known(MANY, cls, MANY, usual_lr=usual_lr)


# The names are kohya's where it has the optimizer; in config files their case does not matter.
KNOWN: Mapping[str, Known] = {
    "AdamW": Known(TORCH, "AdamW", elementwise=True, separable=True),
    "AdamW8bit": _bits("AdamW8bit"),
    "PagedAdamW": _bits("PagedAdamW"),
    "PagedAdamW8bit": _bits("PagedAdamW8bit"),
    "PagedAdamW32bit": _bits("PagedAdamW32bit"),
    "AdEMAMix8bit": _bits("AdEMAMix8bit"),
    "PagedAdEMAMix8bit": _bits("PagedAdEMAMix8bit"),
    "Lion": Known(OWN, "Lion", elementwise=True, separable=True, usual_lr=1e-5, too_high=0.01),
    "Lion8bit": _bits("Lion8bit", usual_lr=1e-5, too_high=0.01),
    "PagedLion8bit": _bits("PagedLion8bit", usual_lr=1e-5, too_high=0.01),
    "SGDNesterov": Known(
        TORCH,
        "SGD",
        options={"momentum": 0.9},
        fixed={"nesterov": True},
        elementwise=True,
        separable=True,
        usual_lr=0.1,
        too_high=100.0,
    ),
    "SGDNesterov8bit": _bits(
        "SGD8bit", options={"momentum": 0.9}, fixed={"nesterov": True}, usual_lr=0.1, too_high=100.0
    ),
    "Adafactor": Known("transformers.optimization", "Adafactor", separable=True),
    "DAdaptAdam": _adaptive(MANY, "DAdaptAdam", **DADAPT_ADAM),
    "DAdaptAdaGrad": _adaptive(MANY, "DAdaptAdaGrad", eps=1e-6),
    "DAdaptLion": _adaptive(MANY, "DAdaptLion", betas=(0.9, 0.99)),
    "DAdaptSGD": _adaptive(MANY, "DAdaptSGD", momentum=0.0),
    "DAdaptAdan": _adaptive(DADAPT, "DAdaptAdan"),
    "DAdaptAdanIP": _adaptive(f"{DADAPT}.experimental", "DAdaptAdanIP"),
    "DAdaptAdamPreprint": _adaptive(f"{DADAPT}.experimental", "DAdaptAdamPreprint"),
    "Prodigy": _adaptive(MANY, "Prodigy", **PRODIGY),
    "AdamWScheduleFree": _free("ScheduleFreeAdamW", 2.5e-3, 0.5),
    "RAdamScheduleFree": _free("ScheduleFreeRAdam", 2.5e-3, 0.5),
    "SGDScheduleFree": _free("ScheduleFreeSGD", 1.0, 100.0),
    "CAME": _many("CAME"),
    "Adan": _many("Adan"),
    "AdEMAMix": _many("AdEMAMix"),
    "StableAdamW": _many("StableAdamW"),
    "SOAP": _many("SOAP"),
    "ADOPT": _many("ADOPT"),
}
OPTIMIZERS = tuple(KNOWN)

# Classes of torch.optim that may be named without it, as in the reference.
PLAIN = ("Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "ASGD", "RMSprop", "Rprop", "SGD", "Muon")

# Other spellings; kohya calls the first D-Adaptation by two names.
ALIASES: Mapping[str, str] = {"dadaptation": "DAdaptAdamPreprint"}

# Modules whose classes may be named, with what pip installs them with. Nothing else is ever imported.
MODULES: Mapping[str, str] = {
    TORCH: "",
    MANY: MANY,
    BITS: "bitsandbytes",
    "transformers.optimization": "transformers",
    DADAPT: DADAPT,
    f"{DADAPT}.experimental": DADAPT,
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
    "lion_pytorch": "lion-pytorch",
}
# One option under the names of several libraries: kohya's users write those of the libraries it takes.
OPTION_ALIASES: Mapping[str, str] = {
    "decouple": "weight_decouple",
    "use_bias_correction": "bias_correction",
    "weight_decouple": "decouple",
    "bias_correction": "use_bias_correction",
}


def named(optimizer_type: str) -> Known | None:
    """Return the optimizer of this name, whatever its case, or the class of a dotted name; None if neither.

    A dotted name must begin with one of MODULES; whether the class is there is found out later.
    """
    folded = {name.lower(): name for name in KNOWN}
    name = ALIASES.get(optimizer_type.lower(), folded.get(optimizer_type.lower()))
    if name is not None:
        return KNOWN[name]
    module, _, cls = optimizer_type.rpartition(".")
    module = TORCH if cls in PLAIN and not module else module
    module = {"bitsandbytes": BITS, "transformers": "transformers.optimization"}.get(module, module)
    if module not in MODULES or not cls.isidentifier() or cls.startswith("_"):
        return None
    for known in KNOWN.values():  # also under its full name it is what it is
        if (known.module, known.cls) == (module, cls) and not known.fixed:
            return known
    lower = cls.lower()
    adaptive = lower.startswith("dadapt") or lower.startswith("prodigy")
    return Known(
        module,
        cls,
        MODULES[module],
        adaptive=adaptive,
        schedule_free="schedulefree" in lower,
        usual_lr=1.0 if adaptive else 1e-4,
        too_high=10.0 if adaptive else 0.1,
    )


def canonical(optimizer_type: str) -> str:
    """Return a known optimizer's name as the table spells it; any other text as it is."""
    folded = {name.lower(): name for name in KNOWN}
    return ALIASES.get(optimizer_type.lower(), folded.get(optimizer_type.lower(), optimizer_type))


def has_relative_steps(entry: Known, options: Mapping[str, Any]) -> bool:
    """Say whether this is Adafactor with steps of its own size, which takes no learning rate."""
    is_adafactor = entry.module.startswith("transformers") and entry.cls == "Adafactor"
    return is_adafactor and options.get("relative_step", True) is True
