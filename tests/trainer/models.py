"""Models for tests of the engine: the tiny U-Net and text encoder with a LoRA, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from loragraft.trainer.adapters import network
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import tiny

CPU = torch.device("cpu")
Inputs = tuple[torch.Tensor, ...]


@dataclass
class Model:
    """A frozen base with a LoRA whose up tensors are not zero, and what trains it."""

    parts: Parts
    parameters: list[nn.Parameter]

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that the loss computes with."""
        return [self.parts.text_encoder, self.parts.denoiser]

    def loss(self, inputs: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Return the mean loss of (latents, t, token ids)."""
        latents, t, ids = inputs
        assert latents is not None and t is not None and ids is not None
        family = SD15()
        cond = family.encode_text(self.parts, (ids,), Reading(clip_skip=1))[0]
        return (family.predict(self.parts, latents, t, (cond,)) - latents).square().mean()

    def gradients(self, inputs: Inputs) -> list[torch.Tensor]:
        """Return the loss and all gradients, and clear them."""
        for p in self.parameters:
            p.grad = None
        loss = self.loss(inputs)
        loss.backward()
        found = [p.grad.clone() for p in self.parameters if p.grad is not None]
        for p in self.parameters:
            p.grad = None
        return [loss.detach(), *found]


def model(rank: int = 4) -> Model:
    """Build the tiny model with a LoRA on its U-Net and text encoder."""
    unet, vae, text = tiny.random_modules()
    for module in (unet, vae, text):
        module.requires_grad_(False)
    parts = tiny.parts_of(unet, vae, text)
    adapter = network.inject(
        parts, network.Settings(rank, 2.0, None, 1.0, 1), SD15().targets(parts, convolutions=False)
    )
    parameters = adapter.parameters("text_encoder") + adapter.parameters("denoiser")
    rng = torch.Generator().manual_seed(3)
    for p in parameters:
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    return Model(parts, parameters)


def inputs(batch: int = 2, side: int = 8) -> Inputs:
    """Return latents (B, 4, side, side), timesteps and token ids."""
    rng = torch.Generator().manual_seed(5)
    latents = torch.randn((batch, 4, side, side), generator=rng)
    t = torch.randint(0, 1000, (batch,), generator=rng)
    return latents, t, torch.randint(0, tiny.VOCABULARY, (batch, 1, 77), generator=rng)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Say whether two lists of tensors have the same bits."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counted(module: nn.Module, name: str, log: list[str]) -> Callable[[], None]:
    """Log ``name`` at each call of a module's own forward; returns what ends it."""
    inner = module.forward

    def run(*args: object, **kwargs: object) -> object:
        log.append(name)
        return inner(*args, **kwargs)

    module.forward = run
    return lambda: delattr(module, "forward")
