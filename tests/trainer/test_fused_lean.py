"""diffusers' blocks that keep less: the same values and gradients, and fewer bytes kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.checkpointing import blocks, checkpoint_blocks
from loragraft.trainer.engine.frozen import FrozenConv2d
from loragraft.trainer.engine.lean import LEAN, keep_less
from loragraft.trainer.engine.meter import track
from loragraft_tests.trainer import runs

Inputs = tuple[torch.Tensor | None, ...]


def random_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
    )
    return unet.requires_grad_(False).eval()


def inputs() -> Inputs:
    torch.manual_seed(1)
    return torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 24)


def with_bias_trained(unet: Any) -> nn.Parameter:
    """Let one number a channel be trained at the start, so that gradients go through every block."""
    unet.conv_in.bias.requires_grad_(True)
    trained: nn.Parameter = unet.conv_in.bias
    return trained


def loss_of(unet: Any, tensors: Inputs) -> torch.Tensor:
    noisy, t, text = tensors
    out: torch.Tensor = unet(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
    return out.square().mean()


def test_values_and_gradients_stay_and_less_is_kept() -> None:
    plain, lean = random_unet(), random_unet()
    lean.load_state_dict(plain.state_dict())
    trained = with_bias_trained(plain), with_bias_trained(lean)
    assert keep_less(lean) == 2 + 2 + 4 + 2 * (1 + 1 + 2), "resnets, and blocks with feed-forwards"
    assert isinstance(lean.conv_out, FrozenConv2d)
    assert type(lean.conv_in) is nn.Conv2d, "its bias is trained"
    found = [
        torch.autograd.grad(loss_of(u, inputs()), p)[0] for u, p in zip((plain, lean), trained, strict=True)
    ]
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm()
    cpu = torch.device("cpu")
    saved = [track(lambda x, u=u: loss_of(u, x), inputs(), [u], cpu).saved for u in (plain, lean)]  # type: ignore[misc]
    assert saved[1] < 0.7 * saved[0]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    unet = random_unet()
    trained = with_bias_trained(unet)
    keep_less(unet)
    (before,) = torch.autograd.grad(loss_of(unet, inputs()), trained)
    undo = checkpoint_blocks(blocks(unet))
    (after,) = torch.autograd.grad(loss_of(unet, inputs()), trained)
    undo()
    assert torch.equal(before, after)


def test_norms_that_are_trained_get_their_gradients() -> None:
    plain, lean = random_unet(), random_unet()
    lean.load_state_dict(plain.state_dict())
    keep_less(lean)
    grads = []
    for unet in (plain, lean):
        norms = [m for m in unet.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
        weights = [n.weight.requires_grad_() for n in norms]
        grads.append(torch.cat(torch.autograd.grad(loss_of(unet, inputs()), weights)))
    assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[0].norm() > 0


def test_a_unet_that_nobody_holds_is_gone_at_once() -> None:
    """A run may be refused while it is opened; a GPU's memory is not to wait for Python's next collection."""
    unet = random_unet()
    keep_less(unet)
    left = [weakref.ref(module) for module in unet.modules()]
    gc.disable()
    try:
        del unet
        assert not any(module() is not None for module in left)
    finally:
        gc.enable()


@pytest.mark.parametrize("form", ["scaled", "other class"])
def test_blocks_of_another_form_are_left_alone(form: str) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    class ResnetOfAnother(nn.Module):
        """A class of diffusers' name that is not diffusers' own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(32, 32, 3).requires_grad_(False)

    ResnetOfAnother.__name__ = "ResnetBlock2D"
    block = (
        ResnetBlock2D(in_channels=32, groups=8, output_scale_factor=2.0)
        if form == "scaled"
        else ResnetOfAnother()
    )
    assert keep_less(nn.Sequential(block)) == 0
    assert "forward" not in vars(block)
    if form == "other class":
        assert type(block.conv1) is nn.Conv2d, "a host's modules are not ours to change"


def test_the_blocks_of_a_run_keep_less(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(run: Any) -> None:
        known = [m for m in run.parts.denoiser.modules() if type(m).__name__ in LEAN]
        assert known and all("forward" in vars(block) for block in known)

    runs.look_inside(training, monkeypatch, look, max_train_steps=1)
