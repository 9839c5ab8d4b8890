"""Gradient checkpointing of chosen blocks: the same bits, less memory, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.engine import checkpointing
from loragraft.trainer.engine.checkpointing import blocks, checkpoint_blocks
from loragraft.trainer.engine.meter import track
from loragraft_tests.trainer import models


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.model()


def all_blocks(model: models.Model) -> list[nn.Module]:
    return [b for root in model.roots for b in blocks(root)]


def test_blocks_are_listed_in_the_order_in_which_they_run(model: models.Model) -> None:
    found = blocks(model.parts.denoiser)
    ran: list[nn.Module] = []
    hooks = [b.register_forward_pre_hook(lambda m, _: ran.append(m)) for b in found]
    model.loss(models.inputs())
    for hook in hooks:
        hook.remove()
    assert ran == found
    kinds = [type(b).__name__ for b in found]
    assert kinds.count("ResnetBlock2D") == 12 and kinds.count("Transformer2DModel") == 6


def test_a_transformers_layers_are_its_blocks() -> None:
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    assert blocks(flux) == [*flux.transformer_blocks, *flux.single_transformer_blocks]
    assert blocks(nn.Linear(2, 2)) == []


def test_a_unets_transformer_of_several_layers_counts_by_layers() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=8,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    kinds = [type(b).__name__ for b in blocks(unet)]
    assert "Transformer2DModel" not in kinds
    assert kinds[:4] == ["ResnetBlock2D", "ResnetBlock2D", "BasicTransformerBlock", "BasicTransformerBlock"]


@pytest.mark.parametrize("which", ["all", "some", "one"])
def test_gradients_have_the_same_bits(model: models.Model, which: str) -> None:
    found = all_blocks(model)
    chosen = {"all": found, "some": found[1::3], "one": found[-1:]}[which]
    plain = model.gradients(models.inputs())
    assert len(plain) > 40
    undo = checkpoint_blocks(chosen)
    again = model.gradients(models.inputs())
    undo()
    assert models.equal(plain, again)
    assert models.equal(plain, model.gradients(models.inputs()))


def test_less_is_kept_and_undoing_keeps_as_much_as_before(model: models.Model) -> None:
    fed = models.inputs()

    def saved() -> int:
        return track(model.loss, fed, model.roots, models.CPU).saved

    plain = saved()
    undo = checkpoint_blocks(all_blocks(model))
    assert saved() < plain / 4
    undo()
    assert saved() == plain
    assert not any("forward" in vars(m) for root in model.roots for m in root.modules())


def test_forward_runs_again_in_backward_and_never_without_gradients(
    model: models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(model.parts.denoiser)
    log: list[str] = []
    ends = [models.counted(b, str(i), log) for i, b in enumerate(found)]
    undo = checkpoint_blocks(found)
    model.gradients(models.inputs())
    names = [str(i) for i in range(len(found))]
    assert log[: len(found)] == names
    # The first resnets reach no adapter: nothing asks for them again.
    assert log[len(found) :] == names[:0:-1]
    log.clear()
    monkeypatch.setattr(checkpointing, "checkpoint", None)  # not called
    with torch.no_grad():
        model.loss(models.inputs())
    assert log == names
    undo()
    for end in ends:
        end()


class Odd(nn.Module):
    """Takes tuples and keywords, returns a dict with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, pair: tuple[Any, Any], *, shift: torch.Tensor, flag: bool) -> dict[str, Any]:
        a, b = pair
        y = torch.tanh(a @ self.weight + shift)
        return {"both": (y, b * y), "flag": flag}


def test_arguments_and_results_of_any_form_pass_through() -> None:
    odd, x = Odd(), torch.randn(2, 3)

    def gradient() -> torch.Tensor:
        result = odd((x, x + 1), shift=torch.ones(3), flag=True)
        assert result["flag"] is True
        (result["both"][0].sum() + result["both"][1].square().sum()).backward()
        assert odd.weight.grad is not None
        grad, odd.weight.grad = odd.weight.grad, None
        return grad

    plain = gradient()
    undo = checkpoint_blocks([odd])
    assert torch.equal(gradient(), plain)
    undo()
    undo()  # a second call does nothing
    assert torch.equal(gradient(), plain)


def test_an_earlier_wrapper_comes_back(model: models.Model) -> None:
    block = blocks(model.parts.denoiser)[0]
    log: list[str] = []
    end = models.counted(block, "called", log)
    wrapper = block.forward
    checkpoint_blocks([block])()
    assert block.forward is wrapper
    end()
