"""``loragraft train --sweep``: several files and one grid, from flags or a table, stopped and continued."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api, loop
from loragraft.trainer.commands import sweep
from loragraft.trainer.events import Cached, Failed, Finished, Note, Planned, Saved, Step
from loragraft.trainer.progress import Pace, SweepLine
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.test_cli import TRAIN_FLAGS, Terminal, refused

SWEEP = ["--sweep", "learning_rate: 1e-4, 1e-3", "--sweep", "network_dim: 2, 4 / network_alpha: 1, 2"]
NAMES = [
    f"x_learning_rate{rate}_network_dim{dim}_network_alpha{alpha}"
    for rate in ("1e-4", "1e-3")
    for dim, alpha in ((2, 1), (4, 2))
]


@pytest.fixture
def command(checkpoint: Path, tokenizer: Path, images: Path, tmp_path: Path) -> list[str]:
    """Return the command line of a short run on the tiny base."""
    return [
        "train", "--pretrained_model_name_or_path", str(checkpoint), "--tokenizer", str(tokenizer),
        "--train_data_dir", str(images), "--output_dir", str(tmp_path / "out"), *TRAIN_FLAGS,
    ]  # fmt: skip


def loras(folder: Path) -> list[str]:
    return sorted(f.stem for f in (folder / "loras").glob("*.safetensors"))


def grids(folder: Path) -> list[Path]:
    return sorted((folder / "grids").iterdir())


def test_a_sweep_gives_a_file_for_each_run_and_one_grid(
    command: list[str], tmp_path: Path, training: runs.Training, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    prompts = ["--sample_prompts", "zibu", "a, b"]
    assert cli.main([*command, *SWEEP, *prompts]) == 0
    printed = capsys.readouterr()
    assert loras(out) == sorted(NAMES)
    files = [line.split()[-1] for line in printed.out.splitlines() if line.startswith("LoRA ")]
    assert files == [str(out / "loras" / f"{name}.safetensors") for name in NAMES]
    assert "Trigger words zibu" in printed.out and "Failed" not in printed.out
    (grid,) = grids(out)
    assert grid.name.startswith("x-") and f"Grid          {grid}" in printed.out
    sheet = np.asarray(Image.open(grid))
    assert sheet.shape[0] > 5 * 32 and sheet.shape[1] > 2 * 32, "five rows, two columns"
    assert "16/16" in printed.err and "4 runs" in printed.err
    assert f"[{NAMES[3]}] LoRA on" in printed.err, "what differs is said for each run"
    assert printed.err.count("one of 4 runs side by side") == 1, "what does not, once"

    alone = training.finish(learning_rate=1e-3, network_dim=4, network_alpha=2, output_name=NAMES[3])
    metadata = api.lora_metadata(out / "loras" / f"{NAMES[3]}.safetensors")
    assert metadata["loragraft_run"] == api.lora_metadata(alone.lora_file)["loragraft_run"]

    monkeypatch.setattr(api, "draw", None)  # the same command has nothing to train and nothing to draw
    assert cli.main([*command, *SWEEP, *prompts]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("finished before") == 4 and str(grid) in printed.out


def test_the_grids_rows_are_the_base_and_each_run_at_full_strength(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[tuple[Any, ...]] = []
    real = api.grid

    def grid(*parts: Any, **more: Any) -> Any:
        sheets.append(parts)
        return real(*parts, **more)

    drawings: list[tuple[list[str], list[float], int]] = []
    real_draw = api.draw

    def draw(base: Any, files: Any, *, settings: Any, strengths: Any, **more: Any) -> Any:
        drawings.append(([f.stem for f in files], strengths, settings.clip_skip))
        return real_draw(base, files, settings=settings, strengths=strengths, **more)

    monkeypatch.setattr(api, "draw", draw)
    monkeypatch.setattr(api, "grid", grid)
    sweep_flags = ["--sweep", "learning_rate: 1e-6, 3e-1", "--sweep", "clip_skip: 1, 2"]
    assert cli.main([*command, *sweep_flags, "--sample_prompts", "zibu", "--sample_cfg", "2"]) == 0
    ((rows, labels, columns),) = sheets
    assert columns == ["zibu (42)"]
    assert labels == [
        "without LoRA",
        *(f"learning_rate {rate}, clip_skip {skip}" for rate in ("1e-6", "0.3") for skip in (1, 2)),
    ]
    each = [f"x_learning_rate{rate}_clip_skip{skip}" for rate in ("1e-6", "0.3") for skip in (1, 2)]
    assert drawings == [(each[:1], [0.0], 1), (each[0::2], [1.0], 1), (each[1::2], [1.0], 2)]
    assert [len(row) for row in rows] == [1] * 5
    pixels = [np.asarray(row[0], np.int16) for row in rows]
    assert np.abs(pixels[1] - pixels[0]).max() <= 2, "a rate that learns nothing draws the base's picture"
    assert np.abs(pixels[3] - pixels[0]).max() > 8, "one that learns too much does not"


def test_a_table_of_the_config_file_is_a_sweep_and_flags_win(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('max_train_steps = 1\n[sweep]\n"seed/network_dim" = [[1, 2], [2, 3]]\n', "utf-8")
    without = [a for i, a in enumerate(command) if "--max_train_steps" not in command[max(0, i - 1) : i + 1]]
    assert cli.main([*without, "--config", str(file)]) == 0
    seeds = ["x_seed1_network_dim2", "x_seed2_network_dim3"]
    assert loras(tmp_path / "out") == seeds
    assert cli.main([*without, "--config", str(file), "--sweep", "seed: 5, 6"]) == 0
    assert set(loras(tmp_path / "out")) - set(seeds) == {"x_seed5", "x_seed6"}
    capsys.readouterr()
    dataset = command[command.index("--train_data_dir") + 1]
    assert cli.main(["dataset", "report", "--train_data_dir", dataset, "--config", str(file)]) in (0, 1)
    assert "LG-CFG-001" not in capsys.readouterr().err, "other commands leave the table alone"


@pytest.mark.parametrize(
    ("flags", "text", "named"),
    [
        (["--sweep", "learning_rat: 1, 2"], "", ("LG-CFG-001", "learning_rate", "--sweep")),
        (["--sweep", "engine: eager, fused"], "", ("LG-SWEEP-002", "engine")),
        (["--sweep", "seed: 1"], "", ("LG-SWEEP-003", "2 to 64")),
        (["--sweep", "conv_alpha: 1, 2"], "", ("LG-CFG-004", "conv_alpha 1")),
        ([], "sweep = 3", ("LG-SWEEP-001", "a.toml")),
        ([], "[sweep]\nseed = 3", ("LG-SWEEP-001", "a.toml", "seed")),
        ([], "[sweep]\nnetwork_dim = [2, 0]", ("LG-CFG-003", "a.toml")),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_opened(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str,
    named: tuple[str, ...],
) -> None:  # fmt: skip
    (tmp_path / "a.toml").write_text(text, "utf-8")
    command[command.index("--pretrained_model_name_or_path") + 1] = "nowhere.safetensors"
    refused([*command, *flags, "--config", str(tmp_path / "a.toml")], capsys, *named)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_all_runs_and_the_same_command_continues(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    real = SweepLine.show

    def interrupted(self: SweepLine, number: int, event: api.Event) -> None:
        real(self, number, event)
        if isinstance(event, api.Step) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(SweepLine, "show", interrupted)
        assert cli.main([*command, *SWEEP]) == 130
    printed = capsys.readouterr()
    assert "all runs are saved" in printed.err and printed.out == ""
    assert signal.getsignal(signal.SIGINT) is before
    assert {runs.newest(f).name for f in (tmp_path / "out" / "runs").iterdir()} == {"step-000002"}
    assert cli.main([*command, *SWEEP]) == 0
    assert capsys.readouterr().err.count("continues at step 2") == 1, "said once, for it holds for all"
    assert loras(tmp_path / "out") == sorted(NAMES)


def broken(monkeypatch: pytest.MonkeyPatch, *which: str) -> None:
    """Let these runs' weights become NaN at step 2."""
    real = loop.train_step

    def step(run: Any) -> Any:
        result = yield from real(run)
        if run.step == 2 and run.config.output_name in which:
            with torch.no_grad():
                run.parameters[-1].fill_(float("nan"))
        return result

    monkeypatch.setattr(loop, "train_step", step)


def test_a_failed_run_is_named_and_the_others_are_finished(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, NAMES[1])
    assert cli.main([*command, *SWEEP]) == 1
    printed = capsys.readouterr()
    assert loras(tmp_path / "out") == sorted(set(NAMES) - {NAMES[1]})
    assert f"Failed        {NAMES[1]}: LG-RUN-004" in printed.out
    assert f"[{NAMES[1]}] failed: Fix:" in printed.err
    assert len(grids(tmp_path / "out")) == 1


def test_all_failed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, *NAMES)
    assert cli.main([*command, *SWEEP]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("Failed") == 4 and "Grid" not in printed.out
    assert not (tmp_path / "out" / "grids").exists()


# ---- the line of progress ----


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def planned(total: int, first: int = 0, *lines: str) -> Planned:
    return Planned(total, first, 1, total, 1, 1, Path("x"), lines)


def step(number: int, total: int, loss: float = 0.5) -> Step:
    return Step(number, total, 1, loss, loss, {"denoiser": 1e-4}, 0.5, 99.0)


def test_the_pace_counts_all_runs_by_the_clock() -> None:
    clock = Clock()
    pace = Pace(clock)
    for number, total in enumerate((10, 20, 4)):
        pace.take(number, planned(total, 2))
    clock.now = 50.0
    pace.take(0, Cached("images", 4, 4, 0))  # encoding is no step's time
    for taken in (3, 4):
        for number, total in enumerate((10, 20, 4)):
            clock.now += 0.5
            pace.take(number, step(taken, total, 0.1 * (number + 1)))
    assert (pace.done, pace.total, pace.seconds) == (12, 34, 0.5)
    assert pace.loss == pytest.approx(0.2)
    assert pace.line() == "3 runs:  35% [########................] 12/34 loss 0.2000 0.5 s/step ETA 0:11"
    pace.take(1, Failed(api.LoraGraftError("LG-RUN-004", "w", where="x", why="y", fix="z")))
    assert (pace.done, pace.total) == (12, 18), "nobody waits for a failed run's steps"
    assert pace.loss == pytest.approx(0.2)


def test_lines_name_their_run_and_say_a_thing_once() -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        with SweepLine(stream, ["one", "two"], Clock()) as line:
            line.show(0, planned(1, 0, "4 images", "rank 4"))
            line.show(1, planned(1, 0, "4 images", "rank 8"))
            line.show(0, Cached("images", 4, 4, 0))
            line.show(1, Cached("images", 4, 4, 4))
            line.show(0, step(1, 1))
            line.show(1, step(1, 1))
            line.show(1, Saved(1, Path("x"), Path("x"), 3, 1))
            line.show(0, Note("a note"))
            line.show(1, Finished(Path("x"), Path("y"), 1, "", (), True, ()))
            line.show(0, Failed(api.LoraGraftError("LG-RUN-004", "what", where="x", why="y", fix="z")))
    shown = log.getvalue()
    assert "\r" not in shown and "\r" in terminal.getvalue()
    assert shown.count("4 images") == 1 and "[one] rank 4\n" in shown and "[two] rank 8\n" in shown
    assert shown.count("encoding") == 1 and "2/2" in shown
    for text in (
        "[two] saved step 1",
        "[one] a note",
        "[two] this run was finished",
        "[one] failed: LG-RUN-004",
    ):
        assert text in shown and text in terminal.getvalue()


def test_no_sweep_is_no_sweep(command: list[str]) -> None:
    assert sweep.read(cli.parser().parse_args(command)) == ()


def test_several_lines_may_stand_behind_one_flag() -> None:
    parsed = cli.parser().parse_args(["train", "--sweep", "seed: 1, 2", "network_dim: 2, 4", "--fresh"])
    again = cli.parser().parse_args(["train", "--sweep", "seed: 1, 2", "--sweep", "network_dim: 2, 4"])
    parsed.config = again.config = None
    assert len(sweep.read(parsed)) == 2 and sweep.read(parsed) == sweep.read(again)
    assert parsed.overrides == []
