"""Which tensors learn at which rate: part, block weight, pattern and LoRA+ role, one group for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..block_weights import Blocks, block_lr_weights
from ..config import TrainConfig, denoiser_lr, encoder_lr
from ..errors import LoraGraftError
from ..parts import DENOISER, TEXT_ENCODERS, Target
from ..patterns import first, rules

PARTS = (*TEXT_ENCODERS, DENOISER)  # the order of the groups, as the reference has it


@dataclass
class Group:
    """Tensors of one learning rate, and how the log names them."""

    label: str
    lr: float
    tensors: list[nn.Parameter] = field(default_factory=list)


def group_tensors(
    config: TrainConfig, modules: Iterable[tuple[Target, Mapping[str, nn.Parameter]]], blocks: Blocks | None
) -> list[Group]:
    """Sort the tensors of trained modules, given by name, into groups; those of rate 0 are left out.

    A module's rate is its part's (unet_lr, text_encoder_lr) times its block's weight, or that of the first of
    network_reg_lrs that fits it, as it is. LoRA+ multiplies the rate of the up matrices (Hayou et al. 2024,
    arXiv:2402.12354). Raises LG-CFG-004 where no group is left, or a setting fits nothing of this base model.
    """
    modules = list(modules)
    weights = None if blocks is None else block_lr_weights(config, blocks)
    if blocks is None and any((config.down_lr_weight, config.mid_lr_weight, config.up_lr_weight)):
        raise LoraGraftError(
            "LG-CFG-004",
            "Block weights are set, but this base model has no blocks that they could mean.",
            where="down_lr_weight, mid_lr_weight, up_lr_weight",
            why="they would have no effect.",
            fix="clear them; network_reg_lrs sets the rates of single modules",
        )
    patterns = rules(config.network_reg_lrs)
    part_lr = {part: encoder_lr(config, part) for part in TEXT_ENCODERS} | {DENOISER: denoiser_lr(config)}
    scale = lr_scale(config)
    groups: dict[tuple[str, ...], Group] = {}
    used = set()
    for part in PARTS:
        ratio = _plus_ratio(config, part)
        for target, tensors in modules:
            if target.part != part:
                continue
            label, lr = part, part_lr[part] * scale
            found = first(patterns, target.key, target.path)
            if found is not None:
                used.add(found.text)
                label, lr = f"{part} {found.text}", found.value * scale
            elif part == DENOISER and weights and blocks is not None and target.block is not None:
                label, lr = f"denoiser {blocks.names[target.block]}", lr * weights[target.block]
            for name, tensor in tensors.items():
                is_plus = ratio is not None and is_up(name)
                own = f"{label} up" if is_plus else label
                fresh = Group(own, lr * ratio if is_plus and ratio is not None else lr)
                groups.setdefault((part, own), fresh).tensors.append(tensor)
    unused = [rule.text for rule in patterns if rule.text not in used]
    if unused:
        raise LoraGraftError(
            "LG-CFG-004",
            f"The pattern '{unused[0]}' fits no trained module.",
            where="network_reg_lrs",
            why="its learning rate would have no effect.",
            fix=f"names look like {modules[0][0].key if modules else 'lora_unet_...'}; correct or remove it",
        )
    trained = [group for group in _in_order(groups) if group.lr > 0]
    if not trained:
        raise LoraGraftError(
            "LG-CFG-004",
            "Every learning rate and block weight is 0.",
            where="learning_rate, unet_lr, text_encoder_lr, down_lr_weight, mid_lr_weight, up_lr_weight",
            why="nothing would be trained.",
            fix="give one of them a value above 0, or lower block_lr_zero_threshold",
        )
    return trained


def is_up(name: str) -> bool:
    """Say whether a tensor is what LoRA+ trains faster: the factor that starts at zero."""
    return name.startswith("lora_up")


def lr_scale(config: TrainConfig) -> float:
    """Return the factor on all learning rates: with scale_lr, the images of a step, as HCP multiplies."""
    return config.train_batch_size * config.gradient_accumulation_steps if config.scale_lr else 1.0


def as_pairs(groups: Sequence[Group]) -> list[tuple[list[nn.Parameter], float]]:
    """Return the groups as `build_optimizer` takes them."""
    return [(group.tensors, group.lr) for group in groups]


def _plus_ratio(config: TrainConfig, part: str) -> float | None:
    own = config.loraplus_unet_lr_ratio if part == DENOISER else config.loraplus_text_encoder_lr_ratio
    return own or config.loraplus_lr_ratio


def _in_order(groups: Mapping[tuple[str, ...], Group]) -> list[Group]:
    """Return the groups part by part; within one, as their first tensors come."""
    return [group for part in PARTS for (own, _), group in groups.items() if own == part]
