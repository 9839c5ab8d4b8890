"""SDXL's and SD2.x's losses and gradients are the reference trainer's, to the last digits of float64.

The numbers come from kohya's own U-Nets, network modules, text encoding and loss, on narrow models whose
weights are given by a formula, see `parity`; the batches have SDXL's sizes and the paddings of both encoders.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.engine.steps import Micro
from loragraft.trainer.families.names.ldm_keys import unet_to_ldm
from loragraft.trainer.families.sd2 import SD2
from loragraft.trainer.families.sdxl import SDXL
from loragraft.trainer.inputs import Fed, Inputs
from loragraft_tests.trainer import parity, tiny, tiny_sd2, tiny_sdxl
from loragraft_tests.trainer.test_parity_gradients import gradients, opened

GOLDEN = parity.GOLDEN.parent / "parity_sdxl.safetensors"
with safe_open(GOLDEN, framework="pt") as file:
    STORED: dict[str, dict[str, Any]] = json.loads(file.metadata()["cases"])
    VECTORS = {name: file.get_tensor(name) for name in STORED}

ORIGINAL, CROPS, TARGET = ((640, 513), (1333, 777)), ((0, 12), (64, 0)), ((64, 64), (64, 64))
NARROW: dict[str, Any] = {  # SDXL's own topology, but for the number of transformer blocks
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 1, 2),
    "transformer_layers_per_block": (1, 2, 3),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
SLOW = {"sdxl_two_chunks", "sdxl_weighted", "sdxl_unet_only", "sd2_two_chunks", "sd2_clip_skip_2"}
CASES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in STORED]
PARTS = {"denoiser": "unet.", "text_encoder": "text.", "text_encoder_2": "text_2."}


class Sinusoids(nn.Module):
    """Sinusoids of numbers in float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t: (N,) -> (N, width)."""
        steps = torch.arange(self.half, dtype=torch.float64) / self.half
        angles = t.double()[:, None] * torch.exp(-math.log(10000.0) * steps)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ExactSDXL(SDXL):
    """SDXL in float64."""

    objective = parity.ExactSchedule()


class ExactSD2(SD2):
    """SD2.x in float64."""

    objective = parity.ExactSchedule()


class Case(parity.Case):
    """A stored case of either family."""

    @property
    def stored(self) -> dict[str, Any]:
        return STORED[self.name]

    def fed(self, inputs: Inputs, tag: str = "", timesteps: list[int] | None = None) -> Any:
        row = super().fed(inputs, tag, timesteps)
        if self.stored["family"] != "sdxl":
            return row
        sizes = [[*a, *b, *c] for a, b, c in zip(ORIGINAL, CROPS, TARGET, strict=True)]
        return Fed.of(row)._replace(sizes=torch.tensor(sizes, dtype=torch.float32)).tensors

    def tokens(self, inputs: Inputs, tag: str) -> tuple[torch.Tensor, ...]:
        """Return ids for each encoder, those of OpenCLIP padded with 0, and with emphasis the weights."""
        ids = self._tokens(tag)
        ends = ids.flatten(0, 1).eq(tiny.VOCABULARY - 1).int().argmax(dim=1)
        behind = torch.arange(77)[None] > ends[:, None]
        padded = ids.masked_fill(behind.view_as(ids), 0)
        each = (ids, padded) if self.stored["family"] == "sdxl" else (padded,)
        if not inputs.config.weighted_captions:
            return each
        return tuple(x for one in each for x in (one, self._emphasis()))


def by_formula(part: str, weights: Mapping[str, torch.Tensor], ldm: bool) -> dict[str, torch.Tensor]:
    """Return weights of a part whose values are given by their names, by LDM's where it is ``ldm``."""
    names = {old: new for new, old in unet_to_ldm(weights).items()} if ldm else {}
    made = {}
    for key, weight in weights.items():
        name, shape = PARTS[part] + names.get(key, key), tuple(weight.shape)
        scale = 0.125 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        middle = float(len(shape) == 1 and name.endswith("weight"))
        made[key] = middle + parity.uniform(name, shape, scale)
    return made


def narrow(family: str, folder: Path, tokenizer: Path) -> api.Base:
    """Return a narrow base of a family with weights by formula."""
    if family == "sdxl":
        lots = {"text_encoder": 12, "text_encoder_2": 3}  # the reference reads CLIP-L's eleventh layer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_sdxl, "LAYERS", lots)
            weights = tiny_sdxl.single_file_weights(tiny_sdxl.random_modules(**NARROW))
    else:
        weights = tiny_sd2.single_file_weights(tiny_sd2.random_modules())
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{family}.safetensors")
    base = api.open_base(folder / f"{family}.safetensors", tokenizer=tokenizer)
    filled = {
        part: by_formula(part, sd, ldm=(family, part) == ("sdxl", "denoiser")) if part in PARTS else sd
        for part, sd in base.state_dicts.items()
    }
    return dataclasses.replace(base, state_dicts=filled)


def ready(base: api.Base) -> api.Base:
    """Return the base with its parts loaded once, and copied for each run."""
    parts = base.load()
    if isinstance(base.family, (ExactSDXL, ExactSD2)):
        parts.denoiser.time_proj = Sinusoids(32)
        if base.family.uses_sizes:
            parts.denoiser.add_time_proj = Sinusoids(256)
    copied = dataclasses.replace(base)
    copied.load = lambda: dataclasses.replace(  # type: ignore[method-assign]
        parts,
        denoiser=copy.deepcopy(parts.denoiser),
        text_encoders=copy.deepcopy(parts.text_encoders),
    )
    return copied


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, api.Base]:
    """Return both families' bases."""
    folder = tmp_path_factory.mktemp("narrow")
    return {family: ready(narrow(family, folder, tokenizer)) for family in ("sdxl", "sd2")}


@pytest.fixture(scope="module")
def double(single: dict[str, api.Base]) -> dict[str, api.Base]:
    """Return the same bases, whose schedule and sinusoids are made in float64."""
    exact = {"sdxl": ExactSDXL(), "sd2": ExactSD2()}
    return {name: ready(dataclasses.replace(base, family=exact[name])) for name, base in single.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_float64(
    name: str, double: dict[str, api.Base], train_set: api.TrainSet, tmp_path: Path
) -> None:
    case = Case(name)
    with parity.in_float64():
        run = opened(double[case.stored["family"]], train_set, tmp_path, case, "auto")
        (loss,) = run.engine.backward([Micro(0, case.fed(run.inputs), 1)])
        found = gradients(run)
        error, tensor = parity.worst(found, name, vectors=VECTORS)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(case.stored["loss"], rel=1e-10)
    assert error < 1e-8, tensor


@pytest.mark.parametrize("name", ["sdxl_locon_min_snr", "sd2_v"])
def test_gradients_in_float32(
    name: str, single: dict[str, api.Base], train_set: api.TrainSet, tmp_path: Path
) -> None:
    case = Case(name)
    run = opened(single[case.stored["family"]], train_set, tmp_path, case, "auto")
    (loss,) = run.engine.backward([Micro(0, case.fed(run.inputs), 1)])
    assert loss.item() == pytest.approx(case.stored["loss"], rel=1e-5)
    error, tensor = parity.worst(gradients(run), name, vectors=VECTORS)
    assert error < 1e-4, tensor
