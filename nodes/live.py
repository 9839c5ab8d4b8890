"""What a running training tells the browser: small payloads, at most four a second. No host needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..trainer import events
from ..trainer.progress import validation_line

INTERVAL_S = 0.25
MAX_POINTS = 2000
MAX_SAMPLES = 24

Payload = dict[str, Any]


class Live:
    """Turn a run's events into payloads for ``send`` and keep what the finished node shows.

    Steps are gathered and sent together; everything else goes out at once, after the steps before it.
    """

    def __init__(
        self,
        send: Callable[[Payload], None],
        view: Callable[[Any], Payload],
        head: Payload,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send_raw, self._view, self._head, self._clock = send, view, head, clock
        self._waiting: list[Payload] = []
        self._sent_at = -INTERVAL_S
        self._start = clock()
        self._losses: list[tuple[int, float]] = []
        self._rates: list[float] = []
        self._step = self._total = 0
        self.samples: list[Payload] = []
        self._saves: list[Payload] = []
        self._notes: list[str] = []
        self._lines: list[str] = []

    def take(self, event: events.Event) -> None:
        """Tell the browser of one event."""
        if isinstance(event, events.Step):
            self._take_step(event)
            return
        self.flush()
        if isinstance(event, events.Planned):
            self._total, self._step = event.total_steps, event.first_step
            self._lines = list(event.lines)
            self._send("plan", total_steps=event.total_steps, first_step=event.first_step, lines=self._lines)
        elif isinstance(event, events.Cached):
            if event.done == event.total or self._clock() - self._sent_at >= INTERVAL_S:
                self._send("cache", what=event.what, done=event.done, total=event.total)
        elif isinstance(event, events.Sampled):
            sample = {"step": event.step, "prompt": event.prompt, **self._view(event.path)}
            self.samples = [*self.samples, sample][-MAX_SAMPLES:]
            self._send("sample", **sample)
        elif isinstance(event, events.Saved):
            save = {"step": event.step, "zero_tensors": event.zero_tensors, "num_tensors": event.num_tensors}
            self._saves.append(save)
            self._send("save", **save)
        elif isinstance(event, events.Note):
            self._say(event.text)
        elif isinstance(event, events.Validated):
            self._say(validation_line(event))

    def _say(self, text: str) -> None:
        self._notes.append(text)
        self._send("note", text=text)

    def _take_step(self, event: events.Step) -> None:
        rate = max(event.learning_rates.values(), default=0.0)
        self._step, self._total = event.step, event.total_steps
        self._losses.append((event.step, event.loss))
        self._rates.append(rate)
        self._waiting.append(
            {
                "step": event.step,
                "total": event.total_steps,
                "epoch": event.epoch,
                "loss": event.loss,
                "avr_loss": event.avr_loss,
                "lr": rate,
                "seconds": event.seconds,
            }
        )
        if self._clock() - self._sent_at >= INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Send the steps that wait."""
        if self._waiting:
            steps, self._waiting = self._waiting, []
            self._send("step", **steps[-1], steps=steps)

    def done(self, finished: events.Finished, samples: list[Payload] | None = None) -> Payload:
        """Return (and send) the last payload; ``samples`` replaces those seen, for a reused run."""
        self.flush()
        first = finished.step - len(finished.losses) + 1
        losses = [(first + i, loss) for i, loss in enumerate(finished.losses)]
        rates = dict(zip((s for s, _ in self._losses), self._rates, strict=True))
        stride = max(1, -(-len(losses) // MAX_POINTS))
        kept = losses[::stride]
        if samples is not None:
            self.samples = samples[-MAX_SAMPLES:]
        if not self._saves:
            self._saves = [{"step": step} for path in finished.checkpoints if (step := step_of(path))]
        payload = {
            "file": finished.lora_file.name,
            "trigger": finished.trigger_words,
            "step": finished.step,
            "total_steps": self._total or finished.step,
            "reused": finished.reused,
            "seconds": round(self._clock() - self._start, 2),
            "losses": kept,
            "lrs": [rates[s] for s, _ in kept] if all(s in rates for s, _ in kept) else [],
            "saves": self._saves,
            "samples": self.samples,
            "lines": self._lines,
            "notes": self._notes,
        }
        return self._send("done", **payload)

    def _send(self, kind: str, **payload: Any) -> Payload:
        full = {**self._head, "kind": kind, **payload}
        self._sent_at = self._clock()
        self._send_raw(full)
        return full


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
