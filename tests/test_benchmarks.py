"""The benchmark's own logic on made-up runs: what trainers print, ratios, checks of losses, the gate."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loragraft.trainer.checks import make_both

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """Import a file of benchmarks/, whose folder is not on the path."""
    package = "loragraft_benchmarks"
    if package not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


cases, common, gate, gpu, machine = map(load, ("cases", "common", "gate", "gpu", "machine"))
onetrainer, process, report = map(load, ("onetrainer", "process", "report"))
step_profile, together, run_module = map(load, ("step_profile", "together", "run"))


def a_run(trainer: str, step: float, turn: int = 0, losses: tuple[float, ...] = (1.0, 1.1)) -> Any:
    """Return a run of three equal steps."""
    made = process.Run("case", trainer, "unet", turn)
    made.seconds, made.cpu_seconds, made.losses = [step] * 3, [step] * 3, list(losses)
    return made


# ---- what trainers print ----

LINES = {
    "ours": b"bench step 2/12 loss 1.06250000",
    "kohya": b"steps:  17%|\xe2\x96\x88\xe2\x96\x8b  | 2/12 [00:09<00:46,  4.69s/it, avr_loss=1.06]",
    "comfyui": b"Training LoRA:  17%|\xe2\x96\x88 | 2/12 [00:16<00:08,  8.46s/it, loss=1.06]",
    "onetrainer": b"step:  17%|\xe2\x96\x88| 2/12 [00:25<00:24, 1.23s/it, loss=1.06, smooth loss=1.1]",
}


def pattern_of(trainer: str) -> re.Pattern[bytes]:
    return process.OWN_STEP if trainer == "ours" else run_module.PEER_TABLE[trainer][0].pattern


@pytest.mark.parametrize("trainer", LINES)
def test_a_step_is_found_in_what_each_trainer_prints(trainer: str) -> None:
    found = pattern_of(trainer).search(LINES[trainer])
    assert found is not None and (int(found[1]), int(found[2])) == (2, 12)
    assert float(found[3]) == pytest.approx(1.06, abs=0.003)


def test_a_bar_without_a_loss_is_a_step_too() -> None:
    found = pattern_of("kohya").search(b"steps:   8%|8   | 1/12 [00:09<00:46,  4.69s/it]")
    assert found is not None and int(found[1]) == 1 and found[3] is None


@pytest.mark.parametrize("line", [b"epoch:  50%|5| 1/2 [00:09<00:46]", b"caching:  50%|5| 1/2 [00:09<00:46]"])
def test_other_bars_are_no_steps(line: bytes) -> None:
    assert not any(pattern_of(trainer).search(line) for trainer in LINES)


def test_only_the_first_sight_of_a_step_counts_and_step_0_does_not() -> None:
    seen, facts = process.Seen(), {}
    for now, line in enumerate(
        (b"bench step 0/9 loss 5", b"bench step 1/9 loss 1", b"bench step 1/9 loss 2")
    ):
        process.take(seen, facts, process.OWN_STEP, line, float(now), None)
    assert seen.clock == {1: 1.0} and seen.losses == {1: 2.0}


def test_facts_are_kept() -> None:
    facts: dict[str, Any] = {}
    for line in (b'bench facts {"versions": {"torch": "2"}}', b'bench facts {"planned": ["a {b}"]}'):
        process.take(process.Seen(), facts, process.OWN_STEP, line, 0.0, None)
    assert facts == {"versions": {"torch": "2"}, "planned": ["a {b}"]}


def test_time_between_two_shown_steps_is_shared_out() -> None:
    run = process.Run("case", "kohya", "unet", 0)
    clock = {1: 0.0, 2: 9.0, 4: 13.0, 5: 16.0}  # step 3 was not shown; steps 1 and 2 are warm-up
    flat = dict.fromkeys(clock, 0.0)
    process.count_steps(run, process.Seen(clock, flat, flat, dict.fromkeys(clock, 1.0)), warmup=2)
    assert run.seconds == [2.0, 2.0, 3.0] and run.step == 2.0 and len(run.losses) == 4


CHILD = """
import sys, json
for n in range(5):
    print(f"\\rsteps:  9%|# | {n}/4 [00:0{n}<00:01, 1.0s/it, avr_loss=0.{n}]", end="", flush=True)
print()
if sys.argv[1] != "0": print("bench facts " + json.dumps({"refused": "LG-RUN-008: not here"}))
sys.exit(int(sys.argv[1]))
"""


def watch(tmp_path: Path, status: int) -> Any:
    run = process.Run("case", "kohya", "unet", 0)
    argv = [sys.executable, "-c", CHILD, str(status)]
    pattern, log = pattern_of("kohya"), tmp_path / "log"
    process.measure(run, argv, pattern, cwd=tmp_path, warmup=1, threads=1, log=log)
    return run


def test_a_process_is_watched_through_its_progress_bar(tmp_path: Path) -> None:
    run = watch(tmp_path, 0)
    assert len(run.seconds) == 3 and run.losses[-1] == 0.4 and run.seconds_to_first_step > 0


def test_a_refusal_is_told_from_a_failure(tmp_path: Path) -> None:
    with pytest.raises(process.RefusedError, match="LG-RUN-008: not here"):
        watch(tmp_path, common.REFUSED)
    with pytest.raises(RuntimeError, match="kohya failed"):
        watch(tmp_path, 1)


# ---- tables ----


def test_ratios_are_taken_turn_by_turn() -> None:
    runs = [a_run("ours", 1.0, 0), a_run("ours", 4.0, 1), a_run("kohya", 1.5, 0), a_run("kohya", 8.0, 1)]
    ours, kohya = report.table(runs)
    assert ours["ours_over_this"] == 1.0
    assert kohya["ours_over_this_by_turn"] == [1.5, 2.0] and kohya["ours_over_this"] == 1.75


def test_share_of_the_ceiling() -> None:
    assert report.share_of_ceiling(flops=2e12, seconds=4.0, rate=1e12) == 0.5
    ceiling = {"step_flops": 3e11, "matmul_flops_per_second": 1e11}
    (row,) = report.table([a_run("ours", 4.0)], ceiling)
    assert row["share_of_matmul_ceiling"] == pytest.approx(0.75)
    assert "75.0%" in report.lines_of([row])[1]


def test_without_a_ceiling_or_ours_the_table_says_dash() -> None:
    (row,) = report.table([a_run("kohya", 4.0)])
    assert row["share_of_matmul_ceiling"] is None and row["ours_over_this"] is None
    assert " -x " in report.lines_of([row])[1]


def test_a_table_without_its_peers_does_not_count() -> None:
    rows = report.table([a_run("ours", 1.0), a_run("kohya", 1.0)])
    assert report.missing_peers(rows, "cpu") == ["peft loop"]
    assert report.missing_peers(rows, "cuda") == ["peft loop", "comfyui", "onetrainer"]


# ---- losses ----


def checked(*runs: Any) -> list[str]:
    return [line.split(":")[0].split()[0] for line in report.check(list(runs), 1e-4)]


def test_equal_losses_are_right() -> None:
    assert checked(a_run("ours", 1.0), a_run("peft loop", 1.0)) == ["ok"]


@pytest.mark.parametrize("losses", [(1.0, 1.101), (1.0,), (1.0, math.nan), ()])
def test_other_losses_than_the_plain_loops_are_wrong(losses: tuple[float, ...]) -> None:
    assert "WRONG" in checked(a_run("ours fused", 1.0, losses=losses), a_run("peft loop", 1.0))


def test_every_variant_of_ours_is_checked() -> None:
    runs = [a_run("ours", 1.0), a_run("ours eager", 1.0, losses=(2.0, 2.0)), a_run("peft loop", 1.0)]
    assert sorted(checked(*runs)) == ["WRONG", "ok"]


def test_a_rounded_base_and_other_draws_need_the_same_size_only() -> None:
    plain = a_run("peft loop", 1.0)
    assert checked(a_run("ours int8 base", 1.0, losses=(1.1, 1.2)), plain) == ["ok"]
    assert checked(a_run("ours int8 base", 1.0, losses=(2.1, 2.2)), plain) == ["WRONG"]
    assert checked(a_run("ours", 1.0), a_run("comfyui", 1.0, losses=(1.0, 1.4))) == ["ok"]
    assert checked(a_run("ours", 1.0), a_run("comfyui", 1.0, losses=(5.0, 5.0))) == ["WRONG"]


def test_kohyas_bar_shows_the_mean_so_far() -> None:
    assert report.mean_loss(a_run("kohya", 1.0, losses=(9.0, 1.05))) == 1.05
    assert checked(a_run("ours", 1.0), a_run("kohya", 1.0, losses=(9.0, 1.05))) == ["ok"]


# ---- the gate ----

HERE = {"cpu": "Some CPU", "cores": 2, "threads": 2}


def stored(date: str, ratio: float | None, machine_info: dict[str, Any] = HERE) -> dict[str, Any]:
    row = {"trained": "unet", "trainer": "peft loop", "ours_over_this": ratio}
    return {
        "date": date,
        "machine": machine_info,
        "cases": {"a": {"work": {"device": "cpu"}, "table": [row]}},
    }


def test_the_newest_result_of_this_kind_of_machine_counts() -> None:
    here = machine.kind(HERE, "cpu")
    results = [stored("2026-01-02", 1.3), stored("2026-01-03", 1.4), stored("2026-01-01", 1.2)]
    results += [stored("2026-01-04", 9.0, {**HERE, "threads": 1}), stored("2026-01-05", None)]
    assert gate.stored_ratio(results, here, "a") == 1.4
    assert gate.stored_ratio(results, here, "b") is None
    assert gate.stored_ratio([], here, "a") is None


def test_cards_are_told_apart_by_name() -> None:
    info = {**HERE, "gpu": "NVIDIA H200, 580.1, 143771 MiB"}
    assert machine.kind(info, "cuda") == "NVIDIA H200"
    assert machine.kind({**info, "amx_bf16": True}, "cpu") != machine.kind(info, "cpu")


@pytest.mark.parametrize(("now", "ok"), [(1.4, True), (1.34, True), (1.32, False), (2.0, True)])
def test_a_fall_of_more_than_5_percent_fails(now: float, ok: bool) -> None:
    verdict = gate.verdict("a", now, 1.4, require=False)
    assert verdict.ok is ok
    assert verdict.line.startswith("ok" if ok else "FAILED") and "1.40 x as stored" in verdict.line


def test_nothing_to_compare_with_fails_only_where_it_is_required() -> None:
    said = gate.verdict("a", 1.4, None, require=False)
    assert said.ok and "no stored result" in said.line
    assert not gate.verdict("a", 1.4, None, require=True).ok


def test_the_gate_reads_what_a_bench_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    name = "sd15-256-b1-fp32"
    bench = run_module.Bench(name, cases.CASES[name], None, tmp_path, 1)
    bench.runs = [a_run("ours", 1.0), a_run("peft loop", 1.25)]
    for _ in range(2):
        results = machine.Results("cpu", 1)
        results.put("cases", name, bench.result())
    assert len(list(tmp_path.glob("*.json"))) == 2, "a file that is there is not written over"
    here = machine.kind(machine.machine(1), "cpu")
    assert gate.stored_ratio(gate.read_results(), here, name) == 1.25


def test_results_are_kept_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    results = machine.Results("x", 1)
    results.put("cases", "a", 1)
    results.put("cases", "b", 2)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["cases"] == {"a": 1, "b": 2}
    machine.Results("y", 1, keep=False).put("cases", "a", 1)
    assert len(list(tmp_path.glob("*.json"))) == 1


# ---- profile, side by side, GPU ----


def test_a_part_does_not_count_what_is_inside_it() -> None:
    own = step_profile.own_times({"gradients": 10.0, "forward": 4.0, "encode": 1.0, "update": 2.0})
    assert own == {"data": 0.0, "encode": 1.0, "forward": 3.0, "gradients": 6.0, "update": 2.0}


def test_side_by_side_is_compared_run_by_run() -> None:
    found = {
        # two runs of four steps; the first steps of each are slow and do not count
        "together": {
            "seconds": 10.0,
            "moments": [5, 5, 6, 6, 7, 7, 8, 8],
            "losses": [[1.0, 2.0], [3.0, 4.0]],
        },
        "one by one": {
            "seconds": 20.0,
            "moments": [5, 6, 7, 8, 15, 16, 17, 18],
            "losses": [[1.0, 2.0], [3.0, 4.4]],
        },
    }
    compared = together.compare(found, 2)
    assert compared["total_time_ratio"] == 2.0
    assert compared["lora_steps_per_second"] == {"together": 3.0, "one by one": 1.0}
    assert compared["worst_relative_loss_difference"] == pytest.approx(0.4 / 4.4)


def test_predicted_memory_is_read_from_the_plan() -> None:
    facts = {
        "planned": ["8 images", "memory: 3.50 of 120.10 GiB predicted (weights 1.60): nothing is saved"],
        "torch_peak_mib": {"allocated": 3584.0},
    }
    found = gpu.predictions({"runs": [{"facts": facts, "case": "a", "trainer": "ours"}, {"facts": {}}]})
    assert [f["measured_over_predicted"] for f in found] == [1.0]


# ---- what is asked of the trainers ----


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_every_variant_is_a_setting_of_ours(name: str) -> None:
    make_both({"resolution": 256, **cases.VARIANTS[name]})


@pytest.mark.parametrize(("steps", "batch_size"), [(12, 1), (60, 8), (7, 4)])
def test_onetrainers_one_epoch_has_the_jobs_steps(steps: int, batch_size: int, tmp_path: Path) -> None:
    (tmp_path / "1_zibu").mkdir()
    work = common.Work("c", str(tmp_path), "t", str(tmp_path), steps, 256, batch_size=batch_size)
    asked = onetrainer.config(work, tmp_path)
    (concept,) = asked["concepts"]
    assert asked["epochs"] == 1
    assert concept["balancing"] * common.NUM_IMAGES == steps * asked["batch_size"]


def test_a_job_is_the_same_in_the_child(tmp_path: Path) -> None:
    work = common.Work("c", "i", "t", "o", 3, 256, settings={"engine": "fused"})
    assert common.Work.read(str(work.write(tmp_path / "job.json"))) == work


def test_an_epoch_is_longer_than_any_run() -> None:
    images = common.NUM_IMAGES * common.REPEATS
    assert all(case.steps * case.batch_size <= images for case in cases.CASES.values())
