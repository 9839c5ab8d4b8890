"""kohya's choice of layers in SD3 and Flux, by kind or by number of block, as patterns of module names here.

Facts: sd-scripts 0.10.1, networks/lora_flux.py and lora_sd3.py. There a rank of a pattern counts before that
of a kind, and a block that is left out before both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .imported import Findings

# Rank of a kind of layer -> the pattern of its modules' names.
DIMS: Mapping[str, Mapping[str, str]] = {
    "networks.lora_flux": {
        "img_attn_dim": "lora_unet_.*img_attn",
        "txt_attn_dim": "lora_unet_.*txt_attn",
        "img_mlp_dim": "lora_unet_.*img_mlp",
        "txt_mlp_dim": "lora_unet_.*txt_mlp",
        "img_mod_dim": "lora_unet_.*img_mod",
        "txt_mod_dim": "lora_unet_.*txt_mod",
        "single_dim": "lora_unet_single_blocks.*linear",
        "single_mod_dim": "lora_unet_.*modulation",
    },
    "networks.lora_sd3": {
        "context_attn_dim": "lora_unet_.*context_block.*attn",
        "context_mlp_dim": "lora_unet_.*context_block.*mlp",
        "context_mod_dim": "lora_unet_.*context_block.*adaLN_modulation",
        "x_attn_dim": "lora_unet_.*x_block.*attn",
        "x_mlp_dim": "lora_unet_.*x_block.*mlp",
        "x_mod_dim": "lora_unet_.*x_block.*adaLN_modulation",
    },
}
# Chosen blocks -> how their modules' names begin.
INDICES: Mapping[str, Mapping[str, str]] = {
    "networks.lora_flux": {
        "train_double_block_indices": "lora_unet_double_blocks_",
        "train_single_block_indices": "lora_unet_single_blocks_",
    },
    "networks.lora_sd3": {"train_block_indices": "lora_unet_joint_blocks_"},
}
TRAIN_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "all": ("train_double_block_indices", "train_single_block_indices"),
    "double": ("train_double_block_indices",),
    "single": ("train_single_block_indices",),
}
TEXT_ENCODERS = "lora_te"
MOST_BLOCKS = 64
_RANGE = re.compile(r"(\d{1,3})(?:\s*-\s*(\d{1,3}))?")


def block_settings(module: str, given: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Return ranks by pattern and the modules to train, for keys of DIMS, INDICES and train_blocks."""
    ranks = [f"{DIMS[module][name]}={value}" for name, value in given.items() if name in DIMS[module]]
    result: dict[str, Any] = {"network_reg_dims": ranks} if ranks else {}
    if only := _chosen(module, given, found):
        result["train_modules"] = only
    return result


def _chosen(module: str, given: Mapping[str, Any], found: Findings) -> list[str]:
    """Return patterns of the modules to train; none where all blocks are."""
    table = INDICES[module]
    kept = TRAIN_BLOCKS.get(str(given.get("train_blocks", "all")), tuple(table))
    if "train_blocks" in given and given["train_blocks"] not in TRAIN_BLOCKS:
        wrong = given["train_blocks"]
        found.expect("network_args train_blocks", wrong, "all, double or single", "train_blocks=all")
    patterns = [TEXT_ENCODERS]
    for name, beginning in table.items():
        chosen = _indices(name, str(given.get(name, "all")), found)
        if name in kept or module != "networks.lora_flux":
            patterns += [beginning] if chosen is None else [f"{beginning}{i}_" for i in chosen]
    whole = [TEXT_ENCODERS, *table.values()]
    return [] if patterns == whole else patterns


def _indices(name: str, text: str, found: Findings) -> Sequence[int] | None:
    """Read "all", "none" or a list such as 0,2,4-6; None stands for all."""
    if text == "all":
        return None
    if text in ("none", ""):
        return []
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_BLOCKS:
            expected = "blocks such as 0,2,4-6, all or none"
            found.expect(f"network_args {name}", text, expected, f"{name}=0,2,4-6")
            return None
        numbers |= set(range(first, last + 1))
    return sorted(numbers)
