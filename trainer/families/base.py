"""What a family (an architecture) offers to the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from ..block_weights import Blocks
from ..objective import NoiseSchedule
from ..parts import Parts, Target

Tensors = Mapping[str, torch.Tensor]


class Family(Protocol):
    """One architecture: how its weights are named, loaded, encoded, predicted with and sampled.

    ``blocks`` are those of the denoiser that settings can weigh; None where it has none of the kind.
    """

    name: str
    latent_multiple: int
    blocks: Blocks | None
    schedule: NoiseSchedule

    def detect(self, keys: Sequence[str]) -> bool:
        """Say whether single-file keys belong to this family."""

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into diffusers-named state dicts of the three parts (views)."""

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the three parts under single-file names (views): what `split` takes apart."""

    def load(self, state_dicts: Mapping[str, Tensors], tokenizer: Any) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into the moments of their latents, float32."""

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, C, H/8, W/8) from moments with standard normal ``noise`` of that shape."""

    def tokenize(self, parts: Parts, captions: Sequence[str], max_token_length: int) -> torch.Tensor:
        """Return token ids (B, chunks, 77), int64."""

    def tokenize_weighted(
        self, parts: Parts, captions: Sequence[str], max_token_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids of captions with emphasis, and the weights (B, chunks*75+2) of their places."""

    def encode_text(self, parts: Parts, ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
        """Return the conditioning (B, chunks*75+2, D) for token ids (B, chunks, 77)."""

    def word_rows(self, parts: Parts, text: str) -> torch.Tensor:
        """Return the embeddings (n, D) of a text's tokens, float32 on the CPU; of "", those of all tokens."""

    def add_words(self, parts: Parts, vectors: Mapping[str, nn.Parameter]) -> None:
        """Let captions mean ``vectors``, (n, D) a word, wherever they have one of the words."""

    def predict(self, parts: Parts, noisy: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's output, noise or velocity, for noisy latents at integer timesteps t (B,)."""

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that a LoRA trains, in the reference trainer's order.

        ``preset`` names another set, of which "everything" holds all; ``norms`` adds normalisation layers.
        """

    def sample(
        self,
        parts: Parts,
        prompts: Sequence[str],
        *,
        negative: str,
        seeds: Sequence[int],
        size: tuple[int, int],
        steps: int,
        cfg: float,
        clip_skip: int,
        velocity: bool = False,
        zero_terminal_snr: bool = False,
    ) -> list[Image.Image]:
        """Draw one image of ``size`` (height, width) pixels for each prompt and its seed."""

    metadata: Mapping[str, str]
