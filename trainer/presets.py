"""Named starting values from the guides; each number has its source, which a tooltip can show.

A preset is made of up to four parts: what the LoRA is to learn, with which network, on which base model, and
for how much memory. Parts touch different settings where they can, and the later part wins where they cannot.

Guides: S1 lora-scripts-windows, S3 training notes, S4 the anonymous LoRA guide of October 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LoraGraftError, listed, nearest

KIND, NETWORK, BASE, MEMORY = "kind", "network", "base", "memory"
PARTS = (KIND, NETWORK, BASE, MEMORY)  # the order in which they are laid over each other


@dataclass(frozen=True)
class Preset:
    """Settings and the source of each; ``relative_time`` is what a step takes against plain LoRA."""

    part: str
    title: str
    settings: Mapping[str, Any]
    sources: Mapping[str, str]
    relative_time: float = 1.0


# A setting's value and where it is from.
Row = tuple[Any, str]

RATES: dict[str, Row] = {
    "learning_rate": (1e-4, "S3, steps; S4, learning_rate"),
    "unet_lr": (1e-4, "S3, steps: 1e-4 for the U-Net"),
    "text_encoder_lr": (5e-5, "S3, steps: 5e-5; S4, text_encoder_lr: a half to a third of unet_lr"),
    "lr_warmup_steps": (0.05, "S3, lr_scheduler: 5 to 10 % of all steps"),
    "min_snr_gamma": (5.0, "S4, min_snr_gamma: 5"),
    "noise_offset": (0.0, "S4, noise_offset: advised against"),
    "shuffle_caption": (True, "S4, shuffle_caption: useful, switch it on"),
    "flip_aug": (False, "S4 does not use it; two sides that differ would be mixed"),
    "train_batch_size": (4, "S1, training 1: 2 or 4 learn more steadily"),
}
# The smaller network of S1 carries one subject.
SUBJECT: dict[str, Row] = {
    "network_dim": (32, "S1, training 1: usually 32 is enough"),
    "network_alpha": (16.0, "S1, training 1: 0.25 to 0.5 of network_dim"),
    "lr_scheduler": ("cosine", "S3, lr_scheduler: cosine is recommended"),
    "lr_scheduler_num_cycles": (1, "cosine has no restarts; another preset may have left some"),
    "keep_tokens": (1, "S4, keep_tokens: where the subject's name is the first tag"),
}
KINDS: dict[str, tuple[str, dict[str, Row]]] = {
    "character": (
        "Character",
        {
            **SUBJECT,
            "max_train_steps": (
                1000,
                "S3, steps: at least 1000; times 4 pictures it is in S4's 2000 to 7000",
            ),
        },
    ),
    "style": (
        "Style",
        {
            "network_dim": (64, "S4, network_dim: 64 is a good value"),
            "network_alpha": (32.0, "S4, network_alpha: 1/1 to 1/4 of network_dim for styles"),
            "lr_scheduler": ("cosine_with_restarts", "S4, lr_scheduler: restarts suit long runs on styles"),
            "lr_scheduler_num_cycles": (4, "S3, lr_scheduler: at most 4; S4: 4 are three restarts"),
            "keep_tokens": (0, "S4, keep_tokens: 0 for styles"),
            "max_train_steps": (
                2500,
                "S3, steps: at least 2500; times 4 pictures it is in S4's 8000 to 12000",
            ),
        },
    ),
    "concept": (
        "Concept",
        {**SUBJECT, "max_train_steps": (3000, "S3, steps: at least 3000")},
    ),
}

_LOCON_RATE = "S1, LyCORIS: lora / locon / loha 1e-4 / 8e-5 / 5e-5"
_LOHA_RANK = "S1, LyCORIS: loha multiplies two networks, so the square root of LoCon's rank"
_ALPHA = "the same share of its rank as the kind's network_alpha"
_HALF = "S4, text_encoder_lr: a half of unet_lr"
# The rates of a network are the same for every kind; ranks follow the kind's (see _ranks).
NETWORKS: dict[str, tuple[str, float, dict[str, Row]]] = {
    "locon": (
        "LoCon: with convolutions",
        1.44,
        {
            "algo": ("locon", "S4, LoCon: very good for styles"),
            "learning_rate": (8e-5, _LOCON_RATE),
            "unet_lr": (8e-5, _LOCON_RATE),
            "text_encoder_lr": (4e-5, _HALF),
        },
    ),
    "loha": (
        "LoHa: a product of two networks",
        2.0,
        {
            "algo": ("loha", "S3, network: LoHa for styles"),
            "learning_rate": (5e-5, _LOCON_RATE),
            "unet_lr": (5e-5, _LOCON_RATE),
            "text_encoder_lr": (2.5e-5, _HALF),
        },
    ),
}

_TRAINED_AT = "what the base model was trained at"
_SENTENCES = "these models learnt from sentences, whose parts are not shuffled"
TRANSFORMER = "transformer"
BASES: dict[str, tuple[str, dict[str, Row]]] = {
    "sd1": (
        "SD1.x",
        {
            "resolution": (512, _TRAINED_AT),
            "max_bucket_reso": (1024, "the reference trainer's default"),
            "text_encoder_lr": (5e-5, "S3, steps: 5e-5; S4, text_encoder_lr: a half to a third of unet_lr"),
            "min_snr_gamma": (5.0, "S4, min_snr_gamma: 5"),
            "shuffle_caption": (True, "S4, shuffle_caption: useful, switch it on"),
            "keep_tokens": (1, "S4, keep_tokens: where the subject's name is the first tag"),
        },
    ),
    "sdxl": (
        "SDXL",
        {
            "resolution": (1024, _TRAINED_AT),
            "max_bucket_reso": (2048, "twice the side, as for SD1.x"),
            "text_encoder_lr": (0.0, "the reference trainer's page on SDXL: the U-Net alone is recommended"),
            "min_snr_gamma": (5.0, "S4, min_snr_gamma: 5"),
            "shuffle_caption": (True, "S4, shuffle_caption: useful, switch it on"),
            "keep_tokens": (1, "S4, keep_tokens: where the subject's name is the first tag"),
        },
    ),
    TRANSFORMER: (
        "SD3.5, Flux and newer",
        {
            "resolution": (1024, _TRAINED_AT),
            "max_bucket_reso": (2048, "twice the side, as for SD1.x"),
            "text_encoder_lr": (
                0.0,
                "the reference trainer's pages on Flux and SD3: text encoders are optional",
            ),
            "min_snr_gamma": (None, "a flow has no signal-to-noise ratio to weigh by"),
            "shuffle_caption": (False, _SENTENCES),
            "keep_tokens": (0, _SENTENCES),
        },
    ),
}

_SAME = "a step still sees four pictures, in so many passes"
MEMORIES: dict[str, tuple[str, dict[str, Row]]] = {
    "8gb": (
        "8 GB",
        {
            "train_batch_size": (1, f"S4, train_batch_size: 1 or 2 on small cards; {_SAME}"),
            "gradient_accumulation_steps": (4, f"S4, gradient_accumulation_steps; {_SAME}"),
            "gradient_checkpointing": (True, "S4, gradient_checkpointing: less memory for time"),
        },
    ),
    "12gb": (
        "12 GB",
        {
            "train_batch_size": (2, f"S4, train_batch_size; {_SAME}"),
            "gradient_accumulation_steps": (2, f"S4, gradient_accumulation_steps; {_SAME}"),
            "gradient_checkpointing": (False, "12 GB hold a step of two pictures"),
        },
    ),
    "24gb": (
        "24 GB",
        {
            "train_batch_size": (4, f"S4, train_batch_size: as large as fits; {_SAME}"),
            "gradient_accumulation_steps": (1, f"S4, gradient_accumulation_steps; {_SAME}"),
            "gradient_checkpointing": (False, "24 GB hold a step of four pictures"),
        },
    ),
}
CONVOLUTIONS = ("conv_dim", "conv_alpha")
MEMORY_SETTINGS = frozenset(name for _, rows in MEMORIES.values() for name in rows)
RELATIVE_TIME_SOURCE = "S1, LyCORIS: lora / locon / loha take 1 / 1.44 / 2 times as long"


def _preset(part: str, title: str, rows: Mapping[str, Row], time: float = 1.0) -> Preset:
    return Preset(
        part,
        title,
        {name: value for name, (value, _) in rows.items()},
        {name: source for name, (_, source) in rows.items()},
        time,
    )


def presets() -> dict[str, Preset]:
    """Return every part of a preset by its name."""
    return {
        **{name: _preset(KIND, title, {**RATES, **rows}) for name, (title, rows) in KINDS.items()},
        **{name: _preset(NETWORK, title, rows, time) for name, (title, time, rows) in NETWORKS.items()},
        **{name: _preset(BASE, title, rows) for name, (title, rows) in BASES.items()},
        **{name: _preset(MEMORY, title, rows) for name, (title, rows) in MEMORIES.items()},
    }


def preset(names: Iterable[str]) -> Preset:
    """Return the parts of these names laid over each other, in the order of PARTS.

    Raises LG-CFG-003 for an unknown name, for two names of one part, and for parts that do not fit.
    """
    known = presets()
    chosen: dict[str, str] = {}
    for name in names:
        if name not in known:
            guess = next(iter(nearest(name, known)), None)
            raise _refused(name, "no preset has this name", f"did you mean '{guess}'?" if guess else None)
        part = known[name].part
        if part in chosen:
            raise _refused(
                f"{chosen[part]} {name}", f"both say the {part}", f"take one of {chosen[part]}, {name}"
            )
        chosen[part] = name
    parts = [known[chosen[part]] for part in PARTS if part in chosen]
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    time = 1.0
    for found in parts:
        settings |= found.settings
        sources |= found.sources
        time *= found.relative_time
    if NETWORK in chosen:
        is_transformer = chosen.get(BASE) == TRANSFORMER
        if is_transformer and chosen[NETWORK] == "locon":
            raise _refused(
                "locon transformer", "these base models have no convolutions", "take one of the two"
            )
        for name, (value, source) in _ranks(chosen[NETWORK], settings).items():
            if not (is_transformer and name in CONVOLUTIONS):
                settings[name], sources[name] = value, source
    return Preset(", ".join(PARTS), ", ".join(p.title for p in parts), settings, sources, time)


def _ranks(network: str, settings: Mapping[str, Any]) -> dict[str, Row]:
    """Return the ranks of a network with convolutions, from the rank that a plain LoRA would have."""
    rank = settings.get("network_dim", SUBJECT["network_dim"][0])
    share = settings.get("network_alpha", SUBJECT["network_alpha"][0]) / rank
    conv = rank // 4
    source = "S4, LoCon: a half to a quarter of network_dim"
    if network == "loha":
        rank, conv, source = round(rank**0.5), round(conv**0.5), _LOHA_RANK
    return {
        "network_dim": (rank, _LOHA_RANK if network == "loha" else "as the kind's"),
        "network_alpha": (rank * share, _ALPHA),
        "conv_dim": (conv, source),
        "conv_alpha": (conv * share, _ALPHA),
    }


def _refused(name: str, why: str, fix: str | None) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Preset '{name}' cannot be taken.",
        where=f"preset: {name}",
        why=f"{why}.",
        fix=fix or f"presets are {listed(presets())}: one each of {', '.join(PARTS)}",
    )
