"""Images drawn with the LoRA on the way: the same prompts and seeds each time, beside the run's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .config import resolution_wh
from .errors import one_line
from .events import Note, Sampled
from .families.drawing import Guided, sample
from .inputs import reading_of
from .plan import is_due
from .run import Run, as_used
from .sample_prompts import SamplePrompt, parse_prompt


def are_due(run: Run, *, saved: bool) -> bool:
    """Say whether samples are drawn after this step; ``saved`` if it is saved."""
    config = run.config
    if run.step == 0:
        return config.sample_at_first
    every = config.sample_every_n_steps, config.sample_every_n_epochs
    return saved if every == (None, None) else is_due(run.step, *every, run.plan)


def draw_samples(run: Run, *, missing: bool = False) -> Iterator[Sampled | Note]:
    """Draw every sample prompt; with ``missing`` only those whose image is not there yet."""
    for number, prompt in enumerate(run.config.sample_prompts):
        path = run.folder.path / "samples" / f"step-{run.step:06d}-{number:02d}.png"
        if not (missing and path.exists()):
            yield _draw(run, parse_prompt(prompt), path)


def draw_preview(run: Run) -> Iterator[Sampled | Note]:
    """Draw the image that lies beside the published LoRA: the first prompt, or the first caption."""
    if run.config.preview_image:
        prompts = run.config.sample_prompts
        prompt = parse_prompt(prompts[0]) if prompts else SamplePrompt(run.train_set.records[0].caption)
        yield _draw(run, prompt, run.folder.preview)


def _guidance(run: Run, prompt: SamplePrompt) -> float:
    """Return the prompt's guidance, else the settings', else the family's."""
    given = (prompt.cfg, run.config.sample_cfg, run.base.family.look.cfg)
    return next(value for value in given if value is not None)


def _draw(run: Run, prompt: SamplePrompt, path: Path) -> Sampled | Note:
    """Draw one image; one that cannot be drawn (memory) is no reason to end a run."""
    config, (width, height) = run.config, resolution_wh(run.train_set.config)
    seed = config.seed if prompt.seed is None else prompt.seed
    try:
        with as_used(run):
            (image,) = sample(
                run.base.family,
                run.parts,
                [prompt.prompt],
                seeds=[seed],
                size=(prompt.height or height, prompt.width or width),
                steps=prompt.steps or config.sample_steps or run.base.family.look.steps,
                guided=Guided(
                    prompt.negative,
                    _guidance(run, prompt),
                    velocity=config.v_parameterization,
                    zero_terminal_snr=config.zero_terminal_snr,
                ),
                reading=replace(reading_of(config), weighted=False),
            )
    except (RuntimeError, MemoryError) as error:
        return Note(f"The sample of step {run.step} could not be drawn: {one_line(str(error), 300)}")
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return Sampled(run.step, prompt.prompt, seed, image, path)
