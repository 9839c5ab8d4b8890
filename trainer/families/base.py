"""What a family (an architecture) offers to the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..block_weights import Blocks
from ..objective import Objective
from ..parts import Parts, Target

Tensors = Mapping[str, torch.Tensor]
Texts = tuple[torch.Tensor, ...]  # of captions, each (B, ...): their tokens, or what the denoiser sees
PLACES_STEP = 64  # lengths of captions are rounded up to it, so that few differ


@dataclass(frozen=True)
class Reading:
    """How captions are read.

    ``max_token_length`` is CLIP's, 75, 150 or 225 and so on; ``t5_length`` that of encoders of whole
    sentences, None for the family's own. ``weighted`` reads brackets as emphasis, and ``keep_mean`` scales
    the result back to its mean. ``mask_padding`` hides padded places from the denoiser.
    """

    max_token_length: int = 75
    clip_skip: int = 1
    weighted: bool = False
    keep_mean: bool = False
    t5_length: int | None = None
    mask_padding: bool = False


@dataclass(frozen=True)
class Room:
    """How many tokens captions have for the text encoder that reads the most of them, and how many it reads.

    ``lengths`` are counted as ``setting`` counts, of which ``limit`` is the value; it goes to ``most`` in
    steps of ``step``. ``padding`` is how many places behind a caption the denoiser sees: where there are
    more, they change nothing. None where it sees all of them, so that their number belongs to the model.
    """

    lengths: Sequence[int]
    limit: int
    most: int
    setting: str = "t5xxl_max_token_length"
    step: int = PLACES_STEP
    padding: int | None = None

    def up(self, tokens: int) -> int:
        """Return the least length that the setting has in its steps for so many tokens."""
        return -(-tokens // self.step) * self.step


@dataclass(frozen=True)
class Look:
    """What a family's images are usually drawn with: steps, guidance by a negative prompt, and distilled."""

    steps: int
    cfg: float
    guidance: float | None = None


def untold(weights: Tensors) -> None:
    """Return None: what a family's weights say of their prediction, where they say nothing."""


def without_clip(title: str, brackets: str, encoder: str = "its text encoder") -> dict[str, str]:
    """Return what `Family.ignored` says for a transformer that reads captions with no CLIP.

    ``brackets`` says why captions cannot be weighted, ``encoder`` what t5xxl_max_token_length is about.
    """
    length = f"{title} has no CLIP; t5xxl_max_token_length is {encoder}'s"
    return {
        "clip_skip": f"{title} has no CLIP",
        "max_token_length": length,
        "tokenizer_repeats": length,
        "conv_dim": f"{title} has no convolutions",
        "weighted_captions": brackets,
        "train_embeddings": f"{title} has no CLIP to learn words",
    }


class Family(Protocol):
    """One architecture: how its weights are named, loaded, encoded, predicted with and sampled.

    A size in pixels is a multiple of ``latent_multiple``. ``encoders`` maps text encoders to the kind of
    tokenizer they need, ``optional`` are those a base may lack; ``folders`` maps parts to the folders in
    which diffusers keeps them. ``blocks`` are those of the denoiser that settings can weigh; None where it
    has none of the kind. ``metadata`` are a LoRA's, and ``velocity_metadata`` what else is said of one of a
    base that predicts velocity. ``ignored`` are settings without a meaning here, and why; ``defaults`` what a
    setting's "auto" or empty value means here.
    """

    name: str
    latent_multiple: int
    blocks: Blocks | None
    objective: Objective
    metadata: Mapping[str, str]
    velocity_metadata: Mapping[str, str]
    encoders: Mapping[str, str]
    optional: tuple[str, ...]
    folders: Mapping[str, str]
    trains_text: bool
    uses_sizes: bool
    look: Look
    ignored: Mapping[str, str]
    defaults: Mapping[str, Any]

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to this family, by names and shapes."""

    def velocity_of(self, weights: Tensors) -> bool | None:
        """Say whether single-file weights predict velocity and not noise; None where they do not tell."""

    def zero_terminal_of(self, weights: Tensors) -> bool | None:
        """Say whether single-file weights were trained to a last timestep of noise alone; None: not told."""

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views where that can be)."""

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names: what `split` takes apart."""

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the names and shapes of the parts' modules."""

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (C, h, w) of an image's latents; height and width in pixels."""

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into the moments of their latents, float32."""

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, C, h, w) from moments with standard normal ``noise`` of that shape."""

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32, for scaled latents."""

    def tokenize(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
        """Return the tokens of captions, tensors (B, ...) whose shapes depend on ``reading`` alone."""

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with lengths that cut none of these captions, where that can be."""

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room | None:
        """Return how long captions are and how much of them is read; None where nothing is ever cut."""

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the conditioning, tensors (B, ...), for what `tokenize` returned with this reading."""

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return the shapes of `encode_text`'s tensors without the batch."""

    def predict(
        self,
        parts: Parts,
        noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Texts,
        sizes: torch.Tensor | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return the denoiser's output for noisy latents at timesteps t (B,), in the objective's terms.

        ``sizes`` (B, 6) hold the original height and width, the crop's top and left, and the target height
        and width, for families with ``uses_sizes``. ``guidance`` None stands for the family's.
        """

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that a LoRA trains, in the reference trainer's order.

        ``preset`` names another set, of which "everything" holds all; ``norms`` adds normalisation layers.
        """
