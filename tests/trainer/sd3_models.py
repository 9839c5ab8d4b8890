"""Our transformer of SD3 on weights with their authors' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loragraft.trainer.families.modules import sd3_blocks
from loragraft.trainer.families.modules.building import assign, built
from loragraft.trainer.families.names import sd3_keys
from loragraft.trainer.families.sources.weights import Renamed


def own_transformer(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Build it on these tensors, shared."""
    sd = Renamed(weights, sd3_keys.from_authors(weights))
    model = built("transformer", "SD3", lambda: sd3_blocks.build_mmdit(sd3_blocks.mmdit_config(sd)))
    assign(model, sd, "transformer", "SD3")
    return model
