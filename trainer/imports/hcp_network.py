"""HCP-Diffusion's groups of both parts of a model become one network: its ranks, rates and what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hcp_layers import TEXT_ENCODER, UNET, Groups, read_groups
from .imported import Findings


def read_network(values: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    """Add what the groups of the denoiser and of the text encoder mean; faults go to ``found``."""
    whole = [name for name in ("unet", "text_encoder") if values.get(name)]
    ranks = [name for name in ("lora_unet", "lora_text_encoder") if values.get(name)]
    if whole and ranks:
        found.refuse(f"{whole[0]} and {ranks[0]}", "a run trains weights or a LoRA", f"remove {whole[0]}")
        return
    if not whole and not ranks:
        found.expect("lora_unet", None, "a list of groups to train", "lora_unet: and its groups")
        return
    prefix = "" if whole else "lora_"
    parts: dict[str, Groups] = {}
    for name, area in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
        if values.get(prefix + name):
            parts[name] = read_groups(prefix + name, values[prefix + name], area, found, low_rank=not whole)
    if whole:
        settings |= {"algo": "full", "preset": "everything", "save_as": "checkpoint"}
        found.notes.append(
            f"{whole[0]}: the change of every weight is trained (algo full) and saved as a LoRA file, and "
            "the whole model as one file (save_as checkpoint)."
        )
    _rates(parts, settings)
    _ranks(parts, settings, found)


def _rates(parts: Mapping[str, Groups], settings: dict[str, Any]) -> None:
    for name, setting in (("unet", "unet_lr"), ("text_encoder", "text_encoder_lr")):
        if name in parts and parts[name].rates:
            settings[setting] = parts[name].rates[0]
    settings["network_train_unet_only"] = "text_encoder" not in parts
    settings["network_train_text_encoder_only"] = "unet" not in parts
    several = [entry for part in parts.values() if len(set(part.rates)) > 1 for entry in part.lrs]
    if several:
        settings["network_reg_lrs"] = several


def _ranks(parts: Mapping[str, Groups], settings: dict[str, Any], found: Findings) -> None:
    both = list(parts.values())
    for name, values in (
        ("alpha", {a for part in both for a in part.alphas}),
        ("dropout", {d for part in both for d in part.dropouts}),
    ):
        if len(values) > 1:
            found.refuse(
                f"{name} {sorted(values)}", "it is one for all groups", f"give every group the same {name}"
            )
        elif values:
            settings[f"network_{name}"] = values.pop()
    if settings.get("network_dropout"):
        found.notes.append("dropout: it leaves out values inside the LoRA, HCP-Diffusion those behind it.")
    sizes = [size for part in both for size in part.sizes]
    if sizes and settings.get("algo") != "full":
        settings["network_dim"] = max(sizes)
        if any(part.convolutions for part in both):
            settings |= {"conv_dim": max(sizes), "conv_alpha": settings.get("network_alpha", 1.0)}
    rules = [entry for part in both for entry in part.ranks]
    if len(set(sizes)) > 1 or not all(part.everything for part in both):
        settings["network_reg_dims"] = rules
