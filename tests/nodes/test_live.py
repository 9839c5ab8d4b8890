"""What the browser is told, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from loragraft.nodes.live import MAX_POINTS, Live, step_of, step_of_sample
from loragraft.trainer import events
from loragraft.trainer.errors import LoraGraftError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(n: int, total: int = 1000) -> events.Step:
    return events.Step(n, total, 1, 1.0 / n, 0.5, {"denoiser": 1e-4, "text_encoder": 5e-5}, 1.0, 0.01)


def live(*runs: tuple[str, str]) -> tuple[Live, list[dict[str, Any]], Clock]:
    sent: list[dict[str, Any]] = []
    clock = Clock()

    def view(path: Any) -> dict[str, str]:
        return {"filename": path.name, "subfolder": "s", "type": "output"}

    return Live(sent.append, view, {"node": "4"}, clock, runs), sent, clock


def planned(total: int, *lines: str, first: int = 0) -> events.Planned:
    return events.Planned(total, first, 1, total, 2, 100, Path("run"), lines)


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


def test_validations_are_told_as_points_and_words_and_come_back_at_the_end() -> None:
    told, sent, _ = live()
    told.take(planned(4))
    told.take(events.Validating(2, 1, 3))
    told.take(events.Validated(2, 0.5, 3, (("a.png", 0.5),), True))
    told.take(events.Validated(4, 0.75, 3))
    assert [m["kind"] for m in sent] == ["plan", "validation", "note", "validation", "note"]
    assert (sent[1]["step"], sent[1]["loss"], sent[1]["best"]) == (2, 0.5, True)
    assert sent[3]["best"] is False
    assert sent[2]["text"] == "step 2: validation loss 0.5000 on 3 images, the best save so far"
    plain = events.Finished(Path("x.safetensors"), Path("run"), 4, "", (1.0,) * 4, False, ())
    assert told.done({0: plain})["validations"] == [(2, 0.5), (4, 0.75)]
    assert told.done({0: plain})["best"] == 2
    reused, _, _ = live()
    known = events.Finished(
        Path("x.safetensors"), Path("run"), 4, "", (1.0,) * 4, True, (), ((2, 0.5), (4, 0.25)), 4
    )
    payload = reused.done({0: known})
    assert (payload["validations"], payload["best"]) == ([(2, 0.5), (4, 0.25)], 4)
    without = live()[0].done({0: plain})
    assert "validations" not in without and "best" not in without


def test_a_run_that_went_back_keeps_one_value_a_step() -> None:
    told, _, _ = live(*RUNS)
    for n in (1, 2, 3, 2, 3, 4):
        told.take(step(n, 4), 0)
    payload = told.done({1: events.Finished(Path("x.safetensors"), Path("r"), 1, "", (1.0,), True, ())})
    assert [x for x, _ in payload["runs"][0]["losses"]] == [1, 2, 3, 4]


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
    payload = told.done({0: finished})
    assert payload == sent[-1]
    assert payload["file"] == "x.safetensors" and payload["trigger"] == "cat" and payload["seconds"] == 12.5
    assert payload["losses"] == [(1, 1.0), (2, 0.5), (3, 0.25)] and payload["lrs"] == [1e-4] * 3
    assert payload["saves"] == [{"step": 3}] and payload["lines"] == ["a line"]


def test_a_long_run_is_thinned() -> None:
    told, _, _ = live()
    losses = tuple(float(i) for i in range(10_001))
    payload = told.done(
        {0: events.Finished(Path("x.safetensors"), Path("run"), 10_001, "", losses, True, ())}
    )
    assert len(payload["losses"]) <= MAX_POINTS and payload["losses"][0] == (1, 0.0)


def test_steps_are_read_from_names() -> None:
    assert step_of(Path("ckpt/step-000200/lora.safetensors")) == 200
    assert step_of(Path("ckpt/step-000200")) == 200
    assert step_of(Path("x/lora.safetensors")) == 0
    assert step_of_sample("step-000020-01.png") == 20 and step_of_sample("preview.png") == 0


def test_one_run_is_told_without_a_number() -> None:
    told, sent, _ = live()
    told.take(planned(2, "a line"))
    told.take(step(1, 2))
    told.take(events.Finished(Path("x.safetensors"), Path("run"), 2, "", (1.0,), False, ()))
    told.done({0: events.Finished(Path("x.safetensors"), Path("run"), 2, "", (1.0,), False, ())})
    assert [m["kind"] for m in sent] == ["plan", "step", "done"]
    assert not any({"run", "runs", "pace", "left"} & m.keys() for m in sent)


RUNS = [("cat_seed1", "seed 1"), ("cat_seed2", "seed 2"), ("cat_seed3", "seed 3")]


def failed() -> events.Failed:
    return events.Failed(LoraGraftError("LG-RUN-004", "no number", where="w", why="y", fix="f"))


def test_several_runs_are_told_apart_and_their_pace_together() -> None:
    told, sent, clock = live(*RUNS)
    assert sent[0]["runs"] == [{"name": name, "label": label} for name, label in RUNS]
    for number, total in enumerate((4, 4, 2)):
        told.take(planned(total, "4 images", f"rank {number}"), number)
    for taken in (1, 2):
        for number in range(3):
            clock.now += 0.5
            told.take(step(taken, (4, 4, 2)[number]), number)
    told.take(events.Saved(2, Path("c"), Path("c/lora.safetensors"), 4, 1), 1)
    told.take(events.Sampled(2, "a", 1, Image.new("RGB", (8, 8)), Path("step-000002-00.png")), 2)
    told.take(events.Note("mind"), 1)
    told.take(failed(), 1)
    assert [(m["kind"], m.get("run")) for m in sent[1:4]] == [("plan", 0), ("plan", 1), ("plan", 2)]
    assert sent[3]["lines"] == ["4 images", "rank 0", "seed 2: rank 1", "seed 3: rank 2"]
    taken_steps = [(s["run"], s["step"]) for m in sent if m["kind"] == "step" for s in m["steps"]]
    assert taken_steps == [(n, taken) for taken in (1, 2) for n in range(3)]
    last = [m for m in sent if m["kind"] == "step"][-1]
    assert (last["pace"], last["left"]) == (0.5, 2.0), "4 of 10 steps are left"
    assert [(m["kind"], m.get("run"), m.get("text")) for m in sent[-4:]] == [
        ("save", 1, None),
        ("sample", 2, None),
        ("note", None, "seed 2: mind"),
        ("failed", 1, None),
    ]
    assert sent[-1]["error"].startswith("LG-RUN-004")


def test_done_holds_all_runs_and_the_failed_ones_error() -> None:
    told, sent, clock = live(*RUNS)
    for number in (0, 1):
        told.take(planned(3), number)
        for n in (1, 2):
            told.take(step(n, 3), number)
    told.take(failed(), 1)
    told.take(step(3, 3), 0)
    ends = {
        0: events.Finished(
            Path("l/cat_seed1.safetensors"), Path("run"), 3, "cat", (1.0, 0.5, 1 / 3), False, ()
        ),
        2: events.Finished(Path("l/cat_seed3.safetensors"), Path("run"), 3, "cat", (3.0,) * 3, True, ()),
    }
    for number, end in ends.items():
        told.take(end, number)
    told.take_samples([{"step": 3, "filename": "a.png"}], 2)
    clock.now = 9.0
    payload = told.done(ends)
    assert [m["file"] for m in sent if m["kind"] == "finished"] == [
        "cat_seed1.safetensors",
        "cat_seed3.safetensors",
    ]
    assert payload["file"] == "cat_seed1.safetensors\ncat_seed3.safetensors"
    assert (payload["trigger"], payload["seconds"], payload["reused"]) == ("cat", 9.0, False)
    one, two, three = payload["runs"]
    assert (one["label"], one["file"], one["step"], one["reused"]) == (
        "seed 1",
        "cat_seed1.safetensors",
        3,
        False,
    )
    assert one["losses"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)] and one["lrs"] == [1e-4] * 3
    assert (
        two["file"] == ""
        and two["error"].startswith("LG-RUN-004")
        and (two["step"], len(two["losses"])) == (2, 2)
    )
    assert three["reused"] and [loss for _, loss in three["losses"]] == [3.0] * 3
    assert payload["samples"] == [{"step": 3, "filename": "a.png", "run": 2}]
    assert (payload["step"], payload["total_steps"]) == (8, 9)


def test_many_long_runs_are_thinned_to_one_payload() -> None:
    told, _, _ = live(*[(f"r{i}", f"seed {i}") for i in range(64)])
    losses = tuple(float(i) for i in range(10_001))
    end = events.Finished(Path("x.safetensors"), Path("run"), 10_001, "", losses, True, ())
    payload = told.done(dict.fromkeys(range(64), end))
    assert all(len(run["losses"]) <= 100 for run in payload["runs"])
