"""What is done after a step where it is due: measure, save, mark the best, publish, draw.

All of it is a function of the run's state, and none of it changes that state's tensors: doing it, or doing it
later because a stop came in between, leads to the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .checkpoint import verified
from .events import Event, Note, Saved, Validated
from .plan import is_due
from .progress import validation_line
from .run import Job, Run
from .runlog import RunLog
from .samples import are_due, draw_samples
from .saving import Shelf, mark_best, publish_on_the_way, save, save_is_due, state_rule, thin_out
from .trends import RISES, Measure, best, overfits_from
from .validation import validate


class Milestones:
    """The run's measures, saves and samples; ``saved_step`` is the newest step that is on the disk.

    ``name`` returns the name under which the LoRA is published in the folders of ``shelf``.
    """

    def __init__(self, run: Run, job: Job, shelf: Shelf, name: Callable[[], str], log: RunLog) -> None:
        self.run, self.job, self.shelf, self.name, self.log = run, job, shelf, name, log
        self.saved_step = run.step

    def before_first_step(self) -> Iterator[Event]:
        """Draw the samples of the base model, where they are wanted."""
        if are_due(self.run, saved=False):
            yield from draw_samples(self.run)

    def after_step(self) -> Iterator[Event]:
        """Do what is due."""
        saves = save_is_due(self.run)
        yield from self._measure(saves)
        if saves:
            yield self._save()
            self._keep_house()
        if are_due(self.run, saved=saves):
            yield from draw_samples(self.run)

    def catch_up(self) -> Iterator[Event]:
        """Do what a stop left undone after the step that the run continues at; it is saved."""
        saves = save_is_due(self.run)
        self.run.folder.drop_old_states(state_rule(self.run, self.job))
        yield from self._measure(saves)
        if saves:
            self._keep_house()
        if are_due(self.run, saved=saves):
            yield from draw_samples(self.run, missing=True)

    def _measure(self, saves: bool) -> Iterator[Event]:
        """Measure at each save and where it is asked for, once a step; say what the values show."""
        run, config = self.run, self.run.config
        every = config.validate_every_n_steps, config.validate_every_n_epochs
        is_new = not run.measures or run.measures[-1].step < run.step
        if not (is_new and (saves or is_due(run.step, *every, run.plan))):
            return
        overfitted = overfits_from(run.measures) is not None
        for event in validate(run, saved=saves):
            if isinstance(event, Validated):
                self.log.validated(event)
                self.log.lines([validation_line(event)])
            yield event
        if not overfitted and overfits_from(run.measures) is not None:
            line = overfitting_line(run.measures)
            self.log.lines([line])
            yield Note(line)

    def _save(self) -> Saved:
        run = self.run
        run.is_settled = False
        saved = save(run, self.job)
        self.saved_step, run.is_settled = run.step, True
        self.log.lines([f"step {run.step}: saved, {saved.zero_tensors} of {saved.num_tensors} tensors zero"])
        return saved

    def _keep_house(self) -> None:
        """Mark the best save, publish this one where that is asked for, drop old ones."""
        run, job = self.run, self.job
        mark_best(run)
        if job.config.publish_checkpoints:
            here = verified(run.folder.path / "ckpt" / f"step-{run.step:06d}")
            if here is not None:
                publish_on_the_way(self.shelf, self.name(), job, here)
        for step in thin_out(run, job, self.shelf, self.name):
            self.log.lines([f"step {run.step}: the save of step {step} was dropped"])


def overfitting_line(measures: list[Measure]) -> str:
    """Say what the validations show, and which save is the best."""
    values = ", ".join(f"{m.loss:.4f}" for m in measures[-RISES - 1 :])
    good = best(measures)
    advice = "" if good is None else f" The best save is step {good.step} ({good.loss:.4f})."
    rose = f"the validation loss rose {RISES} times ({values})"
    return f"Overfitting: {rose} while the training loss fell.{advice}"


def best_line(measures: list[Measure]) -> str | None:
    """Say at the end which save is the best, where that is not the last."""
    good, last = best(measures), measures[-1] if measures else None
    if good is None or last is None or good.step == last.step:
        return None
    return (
        f"The best save is step {good.step}: validation loss {good.loss:.4f}, "
        f"and {last.loss:.4f} at step {last.step}."
    )
