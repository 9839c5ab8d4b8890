"""The benchmark's own logic on made-up runs: ratios, checks of losses, the gate, what a plan measures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.benchmark_modules import a_run, load

architectures, cases, gate, gpu = map(load, ("architectures", "cases", "gate", "gpu"))
machine, report, run_module = map(load, ("machine", "report", "run"))
step_profile, together = map(load, ("step_profile", "together"))


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
    assert report.missing_peers(rows, "cuda", "sdxl") == ["peft loop"], "no other peer is run on it"


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
    assert report.mean_loss(a_run("kohya checkpointed", 1.0, losses=(9.0, 1.05))) == 1.05


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


# ---- profile, side by side, memory, plans ----


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


def test_every_case_and_plan_names_what_is_there() -> None:
    known = {*cases.VARIANTS, *run_module.PEER_TABLE}
    for case in cases.CASES.values():
        assert case.architecture in architectures.ARCHITECTURES and case.warmup + 2 <= case.steps
    for plan in gpu.PLANS.values():
        for name, trainers in (*plan.first, *plan.last):
            assert cases.CASES[name].device == "cuda" and set(trainers) <= known
        assert plan.profiled is None or plan.profiled in cases.CASES


def test_cases_are_those_of_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "has_gpu", lambda: True)
    assert run_module.cases_here("sdxl") == ["sdxl-1024-b1", "sdxl-1024-b4"]
    monkeypatch.setattr(run_module, "has_gpu", lambda: False)
    assert set(run_module.cases_here()) == {n for n in cases.CASES if n.startswith("sd15-256")}


def test_a_peer_that_is_not_run_on_an_architecture_is_left_out_with_a_word(tmp_path: Path) -> None:
    bench = run_module.Bench("sdxl-1024-b1", cases.CASES["sdxl-1024-b1"], None, tmp_path, 1)
    bench.run("onetrainer", run_module.PEER_TABLE["onetrainer"][0], "unet")
    assert "on sd15 only" in bench.result()["left_out"]["onetrainer"]
    assert bench.result()["work"]["model"] == "SDXL, random weights"


def test_a_plan_goes_on_where_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_fails(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(gpu, "prepare", prepare_fails)
    results = machine.Results("x", 1, keep=False)
    session = gpu.Session(gpu.PLANS["sdxl"], tmp_path, gpu.Clock(1000.0), results, 1)
    session.measure(gpu.PLANS["sdxl"].first)
    session.conclude()
    assert session.failed == ["the files of sdxl-1024-b1", "the files of sdxl-1024-b4"]
    assert results.content["failed"]["the files of sdxl-1024-b1"] == "no room"


def test_a_plan_is_measured_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(bench: Any, name: str, trainer: Any, trained: str) -> None:
        ran.append(f"{bench.name} {name}")
        losses = (1.0, 1.0) if not name.startswith("kohya") else (1.0, 1.1)
        bench.runs.append(a_run(name, 1.0, losses=losses))

    def profile(name: str, variant: str, *_: Any) -> dict[str, Any]:
        ran.append(f"{name} profile of {variant}")
        return {}

    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    monkeypatch.setattr(gpu, "ceiling_of", lambda *_: None)
    monkeypatch.setattr(gpu, "trainers", lambda names: (dict.fromkeys(names), {}))
    monkeypatch.setattr(gpu.Bench, "run", run)
    monkeypatch.setattr(step_profile, "profile_case", profile)
    monkeypatch.setattr(step_profile, "lines_of", lambda found: [])
    monkeypatch.setattr(sys, "argv", ["gpu", "flux"])
    gpu.main()
    assert ran == [
        *(f"flux-1024-b1 {name}" for name in ("ours", "kohya", "peft loop")),
        "flux-1024-b1 profile of ours",
        *(f"flux-1024-b1 {name}" for name in ("diffusers loop", "ours fused", "ours eager")),
        "flux-1024-b1 profile of ours fused",
    ]
    (file,) = tmp_path.glob("*-gpu-flux.json")
    assert json.loads(file.read_text())["cases"]["flux-1024-b1"]["missing_peers"] == []
    assert "DOES NOT COUNT" not in capsys.readouterr().out


def test_a_table_of_memory_needs_no_peer(tmp_path: Path) -> None:
    bench = run_module.Bench("flux-1024-b1", cases.CASES["flux-1024-b1"], None, tmp_path, 1)
    bench.runs = [a_run("ours smallest", 1.0)]
    assert bench.result()["missing_peers"] == ["kohya", "peft loop"]
    bench.compares = gpu.PLANS["smallest"].compares
    assert bench.result()["missing_peers"] == []
