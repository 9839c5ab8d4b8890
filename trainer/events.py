"""What a run tells its caller, in order: Planned, Cached, then Step, Sampled and Saved, at last Finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .errors import LoraGraftError


@dataclass(frozen=True)
class Planned:
    """All that is known before step 1; ``lines`` say it in words."""

    total_steps: int
    first_step: int
    num_epochs: int
    batches_per_epoch: int
    num_modules: int
    num_parameters: int
    run_folder: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Cached:
    """Images or captions encoded so far; ``hits`` came from the cache."""

    what: str
    done: int
    total: int
    hits: int


@dataclass(frozen=True)
class Step:
    """One optimizer step; ``step`` counts from 1, ``epoch`` from 1; ``avr_loss`` as kohya counts it.

    ``key_norms`` is there with scale_weight_norms: keys_scaled, and average and maximum of the updates'
    lengths after it, under kohya's names.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    avr_loss: float
    learning_rates: dict[str, float]
    grad_norm: float
    seconds: float
    key_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """One image drawn with the LoRA as it is at ``step``."""

    step: int
    prompt: str
    seed: int
    image: Image.Image
    path: Path


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint at ``step``; ``zero_tensors`` counts LoRA tensors that are all zero."""

    step: int
    folder: Path
    lora_file: Path
    num_tensors: int
    zero_tensors: int


@dataclass(frozen=True)
class Validating:
    """So many of the images kept out of training were measured at ``step``."""

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class Validated:
    """The mean loss over the images kept out of training, with the same noise and timesteps each time.

    ``images`` are their names and losses; ``is_best`` says that this step is saved and no saved one before
    it was as good.
    """

    step: int
    loss: float
    num_images: int
    images: tuple[tuple[str, float], ...] = ()
    is_best: bool = False


@dataclass(frozen=True)
class Note:
    """One line that the user should read."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The product: the published LoRA file and where everything else lies.

    ``validations`` are pairs of step and loss; ``best_step`` is the saved step of the lowest one.
    ``model_file`` is the whole model, where that is made too.
    """

    lora_file: Path
    run_folder: Path
    step: int
    trigger_words: str
    losses: tuple[float, ...]
    reused: bool
    checkpoints: tuple[Path, ...]
    validations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    model_file: Path | None = None


@dataclass(frozen=True)
class Failed:
    """One of several runs side by side ended with an error; the others go on."""

    error: LoraGraftError


Event = Planned | Cached | Step | Sampled | Saved | Validating | Validated | Note | Finished | Failed
