"""How the LoRA is built: its network, ranks and which parts of the base it trains."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting
from .presets import PRESETS

ALGORITHMS = ("lora", "locon", "loha", "lokr", "dylora", "ia3", "oft", "boft", "glora", "full")
MOST = 0.99  # of a dropout: all of it would leave nothing to train


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """How the LoRA is built: its network, ranks and which parts of the base it trains."""

    network_dim: int = setting(
        32,
        "Rank of the LoRA; for oft and boft the largest side of a block.",
        minimum=1,
        maximum=1024,
    )
    network_alpha: float = setting(
        16.0,
        "Scale of the LoRA is network_alpha / network_dim; 0 takes network_dim, a scale of 1.",
        minimum=0.0,
        maximum=4096,
    )
    conv_dim: int | None = setting(
        None,
        "Rank for 3x3 convolutions; empty trains none of them. With a preset that has convolutions, empty "
        "takes network_dim and network_alpha.",
        minimum=1,
        maximum=1024,
        advanced=True,
    )
    conv_alpha: float | None = setting(
        None, "Alpha for 3x3 convolutions; empty means 1.", minimum=0.001, maximum=4096, advanced=True
    )
    network_train_unet_only: bool = setting(False, "Train no text encoder LoRA.", advanced=True)
    network_train_text_encoder_only: bool = setting(False, "Train no denoiser LoRA.", advanced=True)
    algo: str = setting(
        "lora",
        "Kind of network. lora: the usual one; locon: with convolutions; loha, lokr: products of small "
        "matrices, smaller files; dylora: all ranks at once; ia3: a factor a channel; oft, boft: rotations; "
        "glora: LoRA on weight and input; full: every weight.",
        choices=ALGORITHMS,
        advanced=True,
    )
    preset: str = setting(
        "",
        "Which modules are trained, as LyCORIS names it; empty trains what kohya's LoRA does, everything the "
        "whole denoiser with its normalisation layers.",
        choices=("", *PRESETS),
        advanced=True,
    )
    train_norm: bool = setting(False, "Also train the denoiser's normalisation layers.", advanced=True)
    dora_wd: bool = setting(
        False, "DoRA: train the length of the weights apart from their direction.", advanced=True
    )
    wd_on_output: bool = setting(
        False,
        "Measure DoRA's lengths over each output instead of each input, as LyCORIS does by default. ComfyUI "
        "applies such files with other lengths than they were trained with.",
        advanced=True,
    )
    use_tucker: bool = setting(
        False, "Decompose 3x3 convolutions further (lora, loha, lokr): smaller files.", advanced=True
    )
    rs_lora: bool = setting(
        False,
        "Scale by network_alpha / sqrt(network_dim) instead of network_alpha / network_dim.",
        advanced=True,
    )
    factor: int = setting(
        -1,
        "lokr: side of the small matrix; -1 takes the two nearest to a square.",
        minimum=-1,
        maximum=1024,
        advanced=True,
    )
    decompose_both: bool = setting(False, "lokr: also decompose the small matrix.", advanced=True)
    full_matrix: bool = setting(False, "lokr: decompose neither matrix.", advanced=True)
    unbalanced_factorization: bool = setting(
        False, "lokr: the small matrix has the larger number of outputs.", advanced=True
    )
    unit: int = setting(
        1,
        "dylora: ranks are trained in blocks of this many; it must divide network_dim.",
        minimum=1,
        maximum=1024,
        advanced=True,
    )
    constraint: float = setting(
        0.0,
        "oft, boft: how far a rotation may go, as a share of the number of outputs; 0 is any.",
        minimum=0.0,
        maximum=100.0,
        advanced=True,
    )
    rescaled: bool = setting(False, "boft: also train one factor for each output.", advanced=True)
    network_dropout: float = setting(
        0.0,
        "Chance that a value inside the LoRA is left out of a step.",
        minimum=0.0,
        maximum=MOST,
        advanced=True,
    )
    rank_dropout: float = setting(
        0.0,
        "Chance that one rank (loha, lokr, full: one output) is left out of a step.",
        minimum=0.0,
        maximum=MOST,
        advanced=True,
    )
    rank_dropout_scale: bool = setting(
        False, "Make up for outputs left out by rank_dropout (loha, lokr, full).", advanced=True
    )
    module_dropout: float = setting(
        0.0,
        "Chance that a whole module is left out of a step.",
        minimum=0.0,
        maximum=MOST,
        advanced=True,
    )
    scale_weight_norms: float | None = setting(
        None,
        "After each step, scale modules whose change of the weight is longer than this down to it (1 is a "
        "usual start); empty does not.",
        minimum=0.001,
        maximum=1000.0,
        advanced=True,
    )
    network_reg_dims: tuple[str, ...] = setting(
        (),
        "Ranks of single modules: pattern=rank, the pattern a regular expression that is looked for in the "
        "module's name; the first that is found counts, and rank 0 leaves a module out.",
        advanced=True,
    )
    block_dims: str = setting(
        "",
        "Ranks of the denoiser's 25 blocks (SDXL: 23), as 2,4,4,...: 12 down, 1 middle, 12 up; 0 leaves a "
        "block out.",
        advanced=True,
    )
    block_alphas: str = setting("", "Alphas of the 25 blocks; empty takes network_alpha.", advanced=True)
    conv_block_dims: str = setting("", "Ranks of the 25 blocks for 3x3 convolutions.", advanced=True)
    conv_block_alphas: str = setting(
        "", "Alphas of the 25 blocks for 3x3 convolutions; empty takes conv_alpha.", advanced=True
    )
    network_weights: str = setting("", "LoRA file to start from instead of from nothing.", advanced=True)
    dim_from_weights: bool = setting(
        False, "Take modules, ranks and alphas from the file of network_weights.", advanced=True
    )
    train_modules: tuple[str, ...] = setting(
        (),
        "Train only modules in whose name one of these regular expressions is found, such as attn2 or "
        "up_blocks; empty trains all that the preset has.",
        advanced=True,
    )
