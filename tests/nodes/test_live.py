"""What the browser is told, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from loragraft.nodes.live import MAX_POINTS, Live, step_of, step_of_sample
from loragraft.trainer import events


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(n: int, total: int = 1000) -> events.Step:
    return events.Step(n, total, 1, 1.0 / n, 0.5, {"denoiser": 1e-4, "text_encoder": 5e-5}, 1.0, 0.01)


def live() -> tuple[Live, list[dict[str, Any]], Clock]:
    sent: list[dict[str, Any]] = []
    clock = Clock()
    return (
        Live(
            sent.append,
            lambda p: {"filename": p.name, "subfolder": "s", "type": "output"},
            {"node": "4"},
            clock,
        ),
        sent,
        clock,
    )


def test_steps_go_out_four_times_a_second_and_none_is_lost() -> None:
    told, sent, clock = live()
    for n in range(1, 201):
        clock.now += 0.01
        told.take(step(n))
    told.flush()
    assert len(sent) <= 2.0 / 0.25 + 2
    assert [s["step"] for m in sent for s in m["steps"]] == list(range(1, 201))
    assert sent[0]["lr"] == 1e-4 and sent[0]["node"] == "4" and sent[0]["kind"] == "step"


def test_other_events_go_out_at_once_after_the_steps_before_them() -> None:
    told, sent, _ = live()
    told.take(events.Planned(10, 0, 1, 10, 2, 100, Path("run"), ("a line",)))
    told.take(step(1))
    told.take(step(2))
    told.take(events.Saved(2, Path("c"), Path("c/lora.safetensors"), 4, 1))
    told.take(events.Sampled(2, "a cat", 1, Image.new("RGB", (8, 8)), Path("step-000002-00.png")))
    told.take(events.Note("mind"))
    assert [m["kind"] for m in sent] == ["plan", "step", "save", "sample", "note"]
    assert [s["step"] for s in sent[1]["steps"]] == [1, 2]
    assert sent[2] == {"node": "4", "kind": "save", "step": 2, "zero_tensors": 1, "num_tensors": 4}
    assert sent[3]["filename"] == "step-000002-00.png"


def test_caching_is_told_sparsely_but_its_end_always() -> None:
    told, sent, clock = live()
    for n in range(1, 101):
        clock.now += 0.01
        told.take(events.Cached("images", n, 100, 0))
    assert len(sent) <= 6 and sent[-1]["done"] == 100


def test_done_holds_what_a_reloaded_page_needs() -> None:
    told, sent, clock = live()
    told.take(events.Planned(3, 0, 1, 3, 2, 100, Path("run"), ("a line",)))
    for n in (1, 2, 3):
        told.take(step(n, 3))
    clock.now = 12.5
    finished = events.Finished(
        Path("loras/x.safetensors"),
        Path("run"),
        3,
        "cat",
        (1.0, 0.5, 0.25),
        False,
        (Path("ckpt/step-000003/lora.safetensors"),),
    )
    payload = told.done(finished)
    assert payload == sent[-1]
    assert payload["file"] == "x.safetensors" and payload["trigger"] == "cat" and payload["seconds"] == 12.5
    assert payload["losses"] == [(1, 1.0), (2, 0.5), (3, 0.25)] and payload["lrs"] == [1e-4] * 3
    assert payload["saves"] == [{"step": 3}] and payload["lines"] == ["a line"]


def test_a_long_run_is_thinned() -> None:
    told, _, _ = live()
    losses = tuple(float(i) for i in range(10_001))
    payload = told.done(events.Finished(Path("x.safetensors"), Path("run"), 10_001, "", losses, True, ()))
    assert len(payload["losses"]) <= MAX_POINTS and payload["losses"][0] == (1, 0.0)


def test_steps_are_read_from_names() -> None:
    assert step_of(Path("ckpt/step-000200/lora.safetensors")) == 200
    assert step_of(Path("ckpt/step-000200")) == 200
    assert step_of(Path("x/lora.safetensors")) == 0
    assert step_of_sample("step-000020-01.png") == 20 and step_of_sample("preview.png") == 0
