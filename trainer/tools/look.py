"""How images are drawn: what is asked for, what is usual for the base, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import LoraGraftError
from ..families.base import Family
from ..objective import Flow
from .samplers import ANCESTRAL, SAMPLERS
from .sigmas import OWN, SCHEDULES

SMALL, LARGE = 512, 1024  # the side of usual images: of SD1.x and SD2.x, and of all larger models


@dataclass(frozen=True)
class SampleSettings:
    """How to draw; ``size`` is (height, width) in pixels. None is what is usual for the base.

    ``guidance`` is the distilled one of models that are told it. ``velocity``: the base predicts v; some
    bases tell by themselves.
    """

    size: tuple[int, int] | None = None
    steps: int | None = None
    cfg: float | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    negative: str = ""
    clip_skip: int = 1
    velocity: bool = False
    keep_mean: bool = True
    mixed_precision: str = "auto"
    batch: int = 4


@dataclass(frozen=True)
class Look:
    """How images are drawn, all of it decided; ``guidance`` None for a model that is told none."""

    size: tuple[int, int]
    steps: int
    cfg: float
    guidance: float | None
    sampler: str
    schedule: str

    def __str__(self) -> str:
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.sampler} {self.schedule}, {self.steps} steps, cfg {self.cfg:g}{guidance}"


def look_of(family: Family, settings: SampleSettings) -> Look:
    """Return the settings with what is usual for the family where they say nothing."""
    usual, flows = family.look, isinstance(family.objective, Flow)
    side = SMALL if family.latent_multiple == 8 and not family.uses_sizes else LARGE
    return Look(
        size=settings.size or (side, side),
        steps=usual.steps if settings.steps is None else settings.steps,
        cfg=usual.cfg if settings.cfg is None else settings.cfg,
        guidance=usual.guidance if settings.guidance is None else settings.guidance,
        sampler=settings.sampler or ("euler" if flows else "dpmpp_2m"),
        schedule=settings.schedule or (OWN if flows else "karras"),
    )


def check_look(family: Family, look: Look, settings: SampleSettings, *, has_embeddings: bool) -> None:
    """Raise LG-TOOL-005 for what cannot be drawn, or would have no effect."""
    reason = next(_reasons(family, look, settings, has_embeddings), None)
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            "No image can be drawn so.",
            where=f"{family.name}: {look.sampler} {look.schedule}, {look.steps} steps, {look.size}",
            why=reason,
            fix="leave the setting out: what is usual for the base is taken",
        )


def _reasons(family: Family, look: Look, settings: SampleSettings, has_embeddings: bool) -> Iterator[str]:
    multiple = family.latent_multiple
    if look.sampler not in SAMPLERS:
        yield f"the sampler {look.sampler[:30]!r} is none of {', '.join(SAMPLERS)}."
    if look.schedule not in (OWN, *SCHEDULES):
        yield f"the schedule {look.schedule[:30]!r} is none of {', '.join((OWN, *SCHEDULES))}."
    if look.sampler in ANCESTRAL and isinstance(family.objective, Flow):
        yield f"{look.sampler} adds noise anew, for which a flow's images would have to be scaled."
    if not 1 <= look.steps <= 1000:
        yield "steps are 1 to 1000."
    if any(side % multiple or not multiple <= side <= 4096 for side in look.size):
        yield f"width and height are multiples of {multiple}, at most 4096."
    if not 0 <= look.cfg <= 100:
        yield "cfg is 0 to 100."
    if settings.negative and look.cfg == 1:
        yield "at cfg 1 there is no guidance, so that a negative prompt has no effect."
    if settings.guidance is not None and family.look.guidance is None:
        yield f"guidance: {family.ignored.get('guidance_scale', 'the model is not told one')}."
    if settings.clip_skip > 1 and "clip_skip" in family.ignored:
        yield f"clip_skip: {family.ignored['clip_skip']}."
    if has_embeddings and "train_embeddings" in family.ignored:
        yield f"embeddings: {family.ignored['train_embeddings']}."
