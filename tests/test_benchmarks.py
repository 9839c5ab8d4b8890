"""The benchmark's own logic on made-up runs: what trainers print, ratios, checks of losses, the gate."""

from __future__ import annotations

import dataclasses
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
from loragraft_tests.trainer import tiny, tiny_t5

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
architectures, ceiling, kohya, ours, peft_loop, prepare, random_files = map(
    load, ("architectures", "ceiling", "kohya", "ours", "peft_loop", "prepare", "random_files")
)


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


# ---- architectures ----

TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "eos_token_id": tiny.VOCABULARY - 1,
}
TINY_VAE = (32, 32, 32, 32)
TINY_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
TINY_SIZES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "widths": (32, 64, 64),
        "depths": (1, 1, 1),
        "clip_l": TINY_CLIP,
        "clip_g": TINY_CLIP,
        "vae_widths": TINY_VAE,
    },
    "flux": {
        "double": 1,
        "single": 2,
        "width": 128,
        "heads": 1,
        "clip_l": TINY_CLIP,
        "t5_xxl": {**TINY_T5, "vocab_size": tiny_t5.VOCABULARY},
        "vae_widths": TINY_VAE,
    },
}


def tiny_architecture(name: str) -> Any:
    """Return an architecture with its files, options and names, and narrow parts."""
    known = architectures.ARCHITECTURES[name]
    return dataclasses.replace(
        known, sizes=TINY_SIZES[name], dtype="float32", settings={**known.settings}, rank=4
    )


@pytest.fixture
def a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes a job of two steps on a narrow random model of an architecture."""

    def make(name: str) -> Any:
        monkeypatch.setitem(architectures.ARCHITECTURES, name, tiny_architecture(name))
        files = random_files.write_files(architectures.ARCHITECTURES[name], name, tmp_path, pool=65537)
        checkpoint = files.pop("checkpoint")
        more = {"t5": str(tiny_t5.write_t5_tokenizer(tmp_path / "t5"))} if name == "flux" else {}
        made = prepare.Prepared(
            checkpoint,
            prepare.write_images(tmp_path / "images", 64, 2, 4),
            tiny.write_tokenizer(tmp_path / "clip"),
            {role: str(file) for role, file in files.items()},
            more,
        )
        case = cases.Case(64, 1, "fp32", "cpu", 2, 0, name)
        return prepare.job_of(case, made, tmp_path / "out", {})

    return make


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.slow), "flux"])
def test_ours_and_the_plain_loop_take_the_same_steps(
    name: str, a_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the plain loop's LoRA is peft's: pip install peft")
    work = a_job(name)
    Path(work.out).mkdir()
    losses = {}
    for trainer in (ours, peft_loop):
        monkeypatch.setattr(sys, "argv", ["", str(work.write(tmp_path / "job.json"))])
        trainer.main()
        said = capfd.readouterr().out.encode()
        losses[trainer] = [float(step[3]) for step in process.OWN_STEP.finditer(said)]
    assert len(losses[ours]) == 2 and all(map(math.isfinite, losses[ours]))
    assert losses[ours] == pytest.approx(losses[peft_loop], rel=1e-4)


def test_diffusers_own_flux_begins_with_the_same_loss(
    a_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the plain loop's LoRA is peft's: pip install peft")
    work = dataclasses.replace(a_job("flux"), learning_rate=1e-2)
    losses = []
    for settings in ({}, {"diffusers": True}):
        job = dataclasses.replace(work, settings=settings).write(tmp_path / "job.json")
        monkeypatch.setattr(sys, "argv", ["", str(job)])
        peft_loop.main()
        said = capfd.readouterr().out.encode()
        losses.append([float(step[3]) for step in process.OWN_STEP.finditer(said)])
    fused, apart = losses
    assert apart[0] == pytest.approx(fused[0], rel=1e-5) and len(apart) == 2
    assert apart[1] == pytest.approx(fused[1], rel=0.05) and apart[1] != fused[1], "it has another LoRA"


def test_a_models_parts_lie_in_files_of_their_own(a_job: Any) -> None:
    work = a_job("flux")
    assert set(work.files) == {"vae", "clip_l", "t5xxl"}
    assert "double_blocks.0.img_attn.norm.key_norm.scale" in names_in(work.checkpoint)
    assert "encoder.down.0.block.0.conv1.weight" in names_in(work.files["vae"])
    assert "shared.weight" in names_in(work.files["t5xxl"])
    before = Path(work.checkpoint).stat().st_mtime_ns
    random_files.write_files(architectures.ARCHITECTURES["flux"], "flux", Path(work.checkpoint).parent)
    assert Path(work.checkpoint).stat().st_mtime_ns == before, "what is there is not written again"


def test_one_file_holds_all_of_sdxl_under_published_names(a_job: Any) -> None:
    found = names_in(a_job("sdxl").checkpoint)
    for name in (
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
    ):
        assert name in found


def names_in(file: str) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_kohya_is_asked_for_the_same_work(
    a_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAGRAFT_KOHYA", str(tmp_path))
    monkeypatch.setenv("LORAGRAFT_KOHYA_PYTHON", "python")
    work = a_job("flux")
    argv = kohya.command(work, tmp_path / "job.json")
    assert argv[1].endswith("flux_train_network.py")
    given = dict(zip(argv, [*argv[1:], ""], strict=True))
    assert given["--ae"] == work.files["vae"] and given["--t5xxl"] == work.files["t5xxl"]
    assert given["--network_dim"] == str(work.rank) and given["--network_module"] == "networks.lora_flux"
    assert {"--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"} <= set(argv)
    folders = {path.name for path in (Path(work.out) / "tokenizers").iterdir()}
    assert folders == {"openai_clip-vit-large-patch14", "google_t5-v1_1-xxl"}


def test_switches_have_no_value() -> None:
    options = {"sdpa": True, "fp8_base": False, "seed": 4}
    assert kohya.as_arguments(options) == ["--sdpa", "--seed", "4"]


# Forward FLOPs of one image, counted before on the published models.
@pytest.mark.parametrize(
    ("name", "resolution", "tera"),
    [pytest.param("sd15", 512, 0.803, marks=pytest.mark.slow), ("flux-1-2", 256, None)],
)
def test_flops_are_counted_on_the_true_shapes(name: str, resolution: int, tera: float | None) -> None:
    found = ceiling.step_flops(name, resolution, 1, 16)
    assert tera is None or found["forward_flops"] == pytest.approx(tera * 1e12, rel=1e-3)
    assert 2 * found["forward_flops"] < found["step_flops"] < 2.5 * found["forward_flops"]


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


@pytest.mark.parametrize("name", [n for n, a in architectures.ARCHITECTURES.items() if a.smallest])
def test_what_takes_least_memory_differs_by_architecture(name: str) -> None:
    case = cases.Case(64, 1, "bf16", "cuda", 2, 0, name)
    found = prepare.settings_for("ours smallest", cases.VARIANTS["ours smallest"], case)
    assert found["gradient_checkpointing"] and "base_storage" in found
    make_both({"resolution": 256, **architectures.ARCHITECTURES[name].settings, **found})
    assert prepare.settings_for("ours", {"engine": "eager"}, case) == {"engine": "eager"}


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
