"""Which tensors learn at which rate: part, block weight, pattern and LoRA+ role, one group for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..block_weights import Blocks, block_lr_weights
from ..config import TrainConfig, denoiser_lr, encoder_lr
from ..errors import LoraGraftError
from ..parts import DENOISER, TEXT_ENCODERS, Target
from ..patterns import Rule, first, rules

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
    named_blocks = _weighted_blocks(config, blocks)
    patterns = rules(config.network_reg_lrs)
    fitting = [first(patterns, target.key, target.path) for target, _ in modules]
    _refuse_unused(patterns, fitting, modules)
    groups: dict[tuple[str, str], Group] = {}
    for (target, tensors), rule in zip(modules, fitting, strict=True):
        label, lr = _rate(config, target, rule, named_blocks)
        ratio = _plus_ratio(config, target.part)
        for name, tensor in tensors.items():
            is_plus = ratio is not None and is_up(name)
            own = f"{label} up" if is_plus else label
            fresh = Group(own, lr * ratio if is_plus and ratio is not None else lr)
            groups.setdefault((target.part, own), fresh).tensors.append(tensor)
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


def _rate(
    config: TrainConfig, target: Target, rule: Rule | None, named_blocks: Mapping[int, tuple[str, float]]
) -> tuple[str, float]:
    """Return how the log names a module's group, and the rate of it; ``rule`` is the pattern that fits."""
    part, scale = target.part, lr_scale(config)
    if rule is not None:
        return f"{part} {rule.text}", rule.value * scale
    lr = (denoiser_lr(config) if part == DENOISER else encoder_lr(config, part)) * scale
    if part != DENOISER or target.block is None or not named_blocks:
        return part, lr
    name, weight = named_blocks[target.block]
    return f"denoiser {name}", lr * weight


def _weighted_blocks(config: TrainConfig, blocks: Blocks | None) -> dict[int, tuple[str, float]]:
    """Return name and weight of each block, by its index; nothing where no weight is set."""
    if blocks is not None:
        weights = block_lr_weights(config, blocks)
        return {} if weights is None else dict(enumerate(zip(blocks.names, weights, strict=True)))
    if any((config.down_lr_weight, config.mid_lr_weight, config.up_lr_weight)):
        raise LoraGraftError(
            "LG-CFG-004",
            "Block weights are set, but this base model has no blocks that they could mean.",
            where="down_lr_weight, mid_lr_weight, up_lr_weight",
            why="they would have no effect.",
            fix="clear them; network_reg_lrs sets the rates of single modules",
        )
    return {}


def _refuse_unused(
    patterns: Sequence[Rule],
    fitting: Sequence[Rule | None],
    modules: Sequence[tuple[Target, Mapping[str, nn.Parameter]]],
) -> None:
    used = {rule.text for rule in fitting if rule is not None}
    unused = [rule.text for rule in patterns if rule.text not in used]
    if unused:
        raise LoraGraftError(
            "LG-CFG-004",
            f"The pattern '{unused[0]}' fits no trained module.",
            where="network_reg_lrs",
            why="its learning rate would have no effect.",
            fix=f"names look like {modules[0][0].key if modules else 'lora_unet_...'}; correct or remove it",
        )


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


def _in_order(groups: Mapping[tuple[str, str], Group]) -> list[Group]:
    """Return the groups part by part; within one, as their first tensors come."""
    return [group for part in PARTS for (own, _), group in groups.items() if own == part]
