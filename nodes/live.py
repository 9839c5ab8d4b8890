"""What a running training tells the browser: small payloads, at most four a second. No host needed.

Of several runs side by side each payload says which one it is about ("run": its number), and steps tell
the pace of all of them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..trainer import events
from ..trainer.progress import Pace, validation_line

INTERVAL_S = 0.25
MAX_POINTS = 2000
MAX_SAMPLES = 24

Payload = dict[str, Any]


@dataclass
class Told:
    """What was told of one run: its plan, its steps, its saves, its error."""

    total: int = 0
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    saves: list[Payload] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None
    error: str = ""


class Live:
    """Turn events into payloads for ``send`` and keep what the finished node shows.

    ``runs`` are the names and labels of a sweep's runs; none is one run. Steps are gathered and sent
    together; everything else goes out at once, after the steps before it.
    """

    def __init__(
        self,
        send: Callable[[Payload], None],
        view: Callable[[Any], Payload],
        head: Payload,
        clock: Callable[[], float] = time.monotonic,
        runs: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._send_raw, self._view, self._head, self._clock = send, view, head, clock
        self._runs = runs
        self._told = {number: Told() for number in range(max(1, len(runs)))}
        self._pace = Pace(clock)
        self._waiting: list[Payload] = []
        self._sent_at = -INTERVAL_S
        self._start = clock()
        self.samples: list[Payload] = []
        self._notes: list[str] = []
        self._lines: list[str] = []
        if runs:
            self._send("sweep", runs=[{"name": name, "label": label} for name, label in runs])

    def take(self, event: events.Event, number: int = 0) -> None:
        """Tell the browser of one event of run ``number``."""
        self._pace.take(number, event)
        if not isinstance(event, (events.Step, events.Validating)):
            self.flush()
        if tell := TOLD_BY.get(type(event)):
            tell(self, event, number)

    def take_samples(self, samples: Sequence[Payload], number: int = 0) -> None:
        """Show the samples that a run drew when it was trained before."""
        told = [{**sample, **self._which(number)} for sample in samples]
        self.samples = [*(s for s in self.samples if s.get("run", 0) != number), *told][-MAX_SAMPLES:]

    def _which(self, number: int) -> Payload:
        return {"run": number} if self._runs else {}

    def _label(self, number: int) -> str:
        return f"{self._runs[number][1]}: " if self._runs else ""

    def _say(self, text: str, number: int) -> None:
        self._notes.append(f"{self._label(number)}{text}")
        self._send("note", text=self._notes[-1])

    def flush(self) -> None:
        """Send the steps that wait."""
        if self._waiting:
            steps, self._waiting = self._waiting, []
            seconds, left = self._pace.seconds, self._pace.total - self._pace.done
            together = {"pace": seconds, "left": left * seconds} if self._runs else {}
            self._send("step", **{**steps[-1], **together}, steps=steps)

    def done(self, finished: Mapping[int, events.Finished]) -> Payload:
        """Return (and send) the last payload: of one run, or of all that ``finished`` holds by number."""
        self.flush()
        ends = list(finished.values())
        shared = {
            "file": "\n".join(end.lora_file.name for end in ends),
            "trigger": ends[0].trigger_words,
            "reused": all(end.reused for end in ends),
            "seconds": round(self._clock() - self._start, 2),
            "samples": self.samples,
            "lines": self._lines,
            "notes": self._notes,
        }
        if not self._runs:
            return self._send("done", **shared, **self._end(0, ends[0], MAX_POINTS))
        most = max(100, MAX_POINTS // len(self._runs))
        runs = [
            {"name": name, "label": label, **self._end(number, finished.get(number), most)}
            for number, (name, label) in enumerate(self._runs)
        ]
        steps = {key: sum(run[key] for run in runs) for key in ("step", "total_steps")}
        return self._send("done", **shared, **steps, losses=[], lrs=[], saves=[], runs=runs)

    # ---- one event each: the kinds that are told, see TOLD_BY ----

    def _plan(self, event: events.Planned, number: int) -> None:
        told = self._told[number]
        told.total, told.step = event.total_steps, event.first_step
        lines = [line for line in event.lines if line not in self._lines]
        self._lines += [f"{self._label(number)}{line}" for line in lines] if self._lines else lines
        plan = {"total_steps": event.total_steps, "first_step": event.first_step}
        self._send("plan", **plan, lines=list(self._lines), **self._which(number))

    def _cache(self, event: events.Cached, number: int) -> None:
        if event.done == event.total or self._is_time():
            self._send("cache", what=event.what, done=event.done, total=event.total, **self._which(number))

    def _step(self, event: events.Step, number: int) -> None:
        told = self._told[number]
        rate = max(event.learning_rates.values(), default=0.0)
        told.step, told.total = event.step, event.total_steps
        while told.losses and told.losses[-1][0] >= event.step:  # the run went back
            told.losses.pop()
            told.rates.pop()
        told.losses.append((event.step, event.loss))
        told.rates.append(rate)
        self._waiting.append(
            {
                "step": event.step,
                "total": event.total_steps,
                "epoch": event.epoch,
                "loss": event.loss,
                "avr_loss": event.avr_loss,
                "lr": rate,
                "seconds": event.seconds,
                **self._which(number),
            }
        )
        if self._is_time():
            self.flush()

    def _sample(self, event: events.Sampled, number: int) -> None:
        shown = {**self._view(event.path), **self._which(number)}
        sample = {"step": event.step, "prompt": event.prompt, **shown}
        self.samples = [*self.samples, sample][-MAX_SAMPLES:]
        self._send("sample", **sample)

    def _save(self, event: events.Saved, number: int) -> None:
        save = {"step": event.step, "zero_tensors": event.zero_tensors, "num_tensors": event.num_tensors}
        self._told[number].saves.append(save)
        self._send("save", **save, **self._which(number))

    def _note(self, event: events.Note, number: int) -> None:
        self._say(event.text, number)

    def _validation(self, event: events.Validated, number: int) -> None:
        told, which = self._told[number], self._which(number)
        told.validations = [v for v in told.validations if v[0] < event.step] + [(event.step, event.loss)]
        told.best = event.step if event.is_best else told.best
        self._send("validation", step=event.step, loss=event.loss, best=event.is_best, **which)
        self._say(validation_line(event), number)

    def _failure(self, event: events.Failed, number: int) -> None:
        self._told[number].error = str(event.error)
        self._send("failed", error=str(event.error), **self._which(number))

    def _finish(self, event: events.Finished, number: int) -> None:
        if self._runs:  # the end of one run alone is told by `done`
            end = {"file": event.lora_file.name, "step": event.step, "reused": event.reused}
            self._send("finished", **end, **self._which(number))

    def _end(self, number: int, finished: events.Finished | None, most: int) -> Payload:
        """Describe how a run ended, with at most ``most`` of its losses."""
        told = self._told[number]
        step, losses, more = told.step, told.losses, Payload(file="", error=told.error)
        if finished is not None:
            first, step = finished.step - len(finished.losses) + 1, finished.step
            losses = [(first + i, loss) for i, loss in enumerate(finished.losses)]
            more = Payload(file=finished.lora_file.name, reused=finished.reused) if self._runs else {}
        rates = dict(zip((s for s, _ in told.losses), told.rates, strict=True))
        kept = losses[:: max(1, -(-len(losses) // most))]
        saves, validations, best = told.saves, list(told.validations), told.best
        if finished is not None and finished.validations:
            validations, best = list(finished.validations), finished.best_step
        if not saves and finished is not None:
            saves = [{"step": at} for at in map(step_of, finished.checkpoints) if at]
        return {
            "step": step,
            "total_steps": told.total or step,
            "losses": kept,
            "lrs": [rates[s] for s, _ in kept] if all(s in rates for s, _ in kept) else [],
            "saves": saves,
            **({"validations": validations, "best": best} if validations else {}),
            **more,
        }

    def _is_time(self) -> bool:
        return self._clock() - self._sent_at >= INTERVAL_S

    def _send(self, kind: str, **payload: Any) -> Payload:
        full = {**self._head, "kind": kind, **payload}
        self._sent_at = self._clock()
        self._send_raw(full)
        return full


TOLD_BY: Mapping[type, Callable[[Live, Any, int], None]] = {
    events.Planned: Live._plan,
    events.Cached: Live._cache,
    events.Step: Live._step,
    events.Sampled: Live._sample,
    events.Saved: Live._save,
    events.Note: Live._note,
    events.Validated: Live._validation,
    events.Failed: Live._failure,
    events.Finished: Live._finish,
}


def step_of(path: Any) -> int:
    """Read the step from a checkpoint path (".../step-000200/lora.safetensors"); 0 where there is none."""
    for part in (path.stem, path.parent.name):
        if part.startswith("step-") and part[5:].isdecimal():
            return int(part[5:])
    return 0


def step_of_sample(name: str) -> int:
    """Read the step from a sample's file name ("step-000020-00.png"); 0 where there is none."""
    digits = name.removeprefix("step-").split("-")[0]
    return int(digits) if digits.isdecimal() else 0
