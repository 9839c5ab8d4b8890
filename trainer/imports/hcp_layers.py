"""HCP-Diffusion's groups of layers become ranks and learning rates by pattern.

A group names modules by a regular expression that must fit from the name's beginning ("re:.*\\.to_k$") or
by their exact name, '' being all; every layer inside them is trained. Here a pattern is looked for in the
name of each layer, so it is bound to its part of the model and made to reach the layers inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import one_line
from .imported import Findings

# How the names of a part's modules begin.
UNET = "(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)"
TEXT_ENCODER = "text_model"
DEFAULT_LR, DEFAULT_RANK = 1e-5, 1
INSIDE = r"(?:\.|$)"
CONVOLUTIONS = re.compile(r"resnets|conv|sampler|resnet")
GROUP_KEYS = (
    "lr",
    "rank",
    "layers",
    "alpha",
    "dropout",
    "type",
    "bias",
    "svd_init",
    "alpha_auto_scale",
    "branch",
)


@dataclass
class Groups:
    """What the groups of one part say; ``ranks`` and ``lrs`` are entries pattern=number."""

    ranks: list[str] = field(default_factory=list)
    lrs: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    convolutions: bool = False
    everything: bool = False


def read_groups(name: str, groups: Any, area: str, found: Findings, *, low_rank: bool = True) -> Groups:
    """Read a list of groups; ``low_rank`` says that they have a rank. Faults go to ``found``."""
    result = Groups()
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        found.expect(name, groups, "a list of groups", f"{name}: [{{lr: 1e-4, layers: [...]}}]")
        return result
    for i, group in enumerate(groups):
        _read_group(f"{name}[{i}]", group, area, result, found, low_rank=low_rank)
    if not result.everything:  # what no group names is not trained
        result.ranks.append(f"^{area}=0")
    return result


def _read_group(
    path: str, group: Mapping[str, Any], area: str, result: Groups, found: Findings, *, low_rank: bool
) -> None:
    for key in group:
        if key not in (GROUP_KEYS if low_rank else ("lr", "layers")):
            found.not_known(f"{path}.{key}", GROUP_KEYS)
    rate = number(group.get("lr", DEFAULT_LR))
    rank = number(group.get("rank", DEFAULT_RANK))
    if rate is None or not 0 < rate <= 10:
        found.expect(f"{path}.lr", group.get("lr"), "a number above 0 and up to 10", "for instance lr: 1e-4")
        return
    if rank is None or rank <= 0:
        found.expect(f"{path}.rank", group.get("rank"), "1 or more", "for instance rank: 8")
        return
    if not rank.is_integer():
        found.refuse(
            f"{path}.rank {rank:g}",
            "a rank is the same for all layers of a group",
            "write it as a whole number",
        )
        return
    _refuse_kinds(path, group, found)
    layers = group.get("layers", [])
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        found.expect(f"{path}.layers", layers, "a list", "for instance layers: ['re:.*\\.to_k$']")
        return
    for layer in layers:
        pattern = pattern_of(str(layer), area)
        if pattern is None:
            found.refuse(
                f"{path}.layers {one_line(str(layer), 40)!r}",
                "it chooses layers by their class or hooks into one",
                "name them by a regular expression, such as 're:.*\\.to_k$'",
            )
            continue
        result.everything |= layer == ""
        result.convolutions |= layer == "" or CONVOLUTIONS.search(str(layer)) is not None
        result.ranks.append(f"{pattern}={rank:g}")
        result.lrs.append(f"{pattern}={rate:g}")
    result.rates.append(rate)
    result.sizes.append(int(rank))
    result.alphas.append(number(group.get("alpha", 1.0)) or 1.0)
    result.dropouts.append(number(group.get("dropout", 0.0)) or 0.0)


def _refuse_kinds(path: str, group: Mapping[str, Any], found: Findings) -> None:
    if group.get("type", "lora") != "lora":
        found.refuse(
            f"{path}.type {one_line(str(group['type']), 40)}",
            "HCP-Diffusion builds it otherwise than LyCORIS, whose networks are here",
            "remove it, and choose algo",
        )
    for key, harmless in (("bias", False), ("svd_init", False), ("alpha_auto_scale", True), ("branch", None)):
        if group.get(key, harmless) != harmless:
            found.refuse(
                f"{path}.{key} {one_line(str(group[key]), 40)}", "a LoRA here has none", f"remove {key}"
            )


def pattern_of(layer: str, area: str) -> str | None:
    """Return the pattern found in the names of the layers that ``layer`` means; None if it has none."""
    *marks, name = layer.split(":")
    if any(mark != "re" for mark in marks):
        return None
    if not marks:
        return f"^{re.escape(name)}{INSIDE}" if name else f"^{area}"
    body = f"{area}{name}" if name.startswith(".*") else name
    return f"^{body.removesuffix('$')}{INSIDE}" if body.endswith("$") else f"^{body}"


def number(value: Any) -> float | None:
    """Return a number; YAML reads 1e-4 as text. None for what is none."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
