"""The command line, called in process: it trains, reports, refuses with status 1 and stops on Ctrl-C."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.commands import train
from loragraft.trainer.commands.settings import config_flags, read_settings
from loragraft.trainer.events import Cached, Note, Planned, Saved, Step
from loragraft.trainer.progress import ProgressLine, step_line
from loragraft_tests.trainer import runs, tiny

TRAIN_FLAGS = [
    "--resolution", "32", "--min_bucket_reso", "16", "--max_bucket_reso", "64", "--bucket_reso_steps", "8",
    "--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3", "--max_train_steps", "4",
    "--train_batch_size", "3", "--sample_steps", "2", "--preview_image", "false", "--output_name", "x",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def command(checkpoint: Path, tokenizer: Path, images: Path, tmp_path: Path) -> list[str]:
    """Return the command line of a short run."""
    return [
        "train", "--pretrained_model_name_or_path", str(checkpoint), "--tokenizer", str(tokenizer),
        "--train_data_dir", str(images), "--output_dir", str(tmp_path / "out"), *TRAIN_FLAGS,
    ]  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *named: str) -> None:
    """Assert exit status 1 and a message that names these."""
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().split("\n")
    assert [line.split()[0] for line in lines[-3:]] == ["Where:", "Why:", "Fix:"], printed.err
    assert printed.out == ""
    for text in named:
        assert text in printed.err


# ---- training ----


def test_a_run_from_the_command_line_is_the_run_of_the_library(
    command: list[str], base: api.Base, train_set: api.TrainSet, places: api.Places, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    file = tmp_path / "out" / "loras" / "x.safetensors"
    assert f"LoRA          {file}" in printed.out
    assert "Trigger words zibu" in printed.out
    assert f"Run folder    {tmp_path / 'out' / 'runs'}" in printed.out
    assert "4 steps in 1 epoch" in printed.err and "saved step 4" in printed.err
    library = runs.Training(base, train_set, places).finish()
    assert file.read_bytes() == library.lora_file.read_bytes()
    assert cli.main(command) == 0
    assert "finished before" in capsys.readouterr().err


def test_settings_come_from_a_file_and_flags_win(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "\u540d.toml"
    text = (
        'max_train_steps = 2\n[network]\nnetwork_dim = 3\n[data]\nseed = 7\nsample_prompts = ["a b", "c"]\n'
    )
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # an editor's byte order mark does no harm
    without = [a for i, a in enumerate(command) if "--max_train_steps" not in command[max(0, i - 1) : i + 1]]
    assert cli.main([*without, "--config", str(file), "--seed", "9"]) == 0
    capsys.readouterr()
    metadata = api.lora_metadata(tmp_path / "out" / "loras" / "x.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_seed"], metadata["ss_steps"]) == ("4", "9", "2")


def test_flags_are_read_as_what_their_setting_is() -> None:
    flags: dict[str, tuple[str, Any]] = {
        "output_name": ("2024", "2024"),
        "metadata_title": ("true", "true"),
        "training_comment": ("1e5", "1e5"),
        "caption_separator": (";", ";"),
        "learning_rate": (".5", 0.5),
        "unet_lr": ("1e-4", 1e-4),
        "text_encoder_lr": ("0", 0),
        "min_snr_gamma": ("5", 5),
        "resolution": ("[512, 768]", [512, 768]),
        "shuffle_caption": ("true", True),
        "lr_warmup_steps": ("0.1", 0.1),
        "lr_scheduler": ("cosine", "cosine"),
    }
    arguments = [a for name, (text, _) in flags.items() for a in (f"--{name}", text)]
    arguments += ["--sample_prompts", "1", "a, b", "--optimizer_args", "eps=1e-9", "--train_data_dir", "d"]
    parsed = cli.parser().parse_args(["train", *arguments, "--pretrained_model_name_or_path", "m"])
    settings, (base, data) = read_settings(parsed, "pretrained_model_name_or_path", "train_data_dir")
    assert {k: settings[k] for k in flags} == {k: value for k, (_, value) in flags.items()}
    assert settings["sample_prompts"] == ["1", "a, b"]
    assert settings["optimizer_args"] == ["eps=1e-9"]
    assert (base, data) == ("m", "d")


@pytest.mark.parametrize("name", ["train", "dataset report", "preview"])
def test_help_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


# ---- stopping ----


def test_ctrl_c_stops_after_the_step_and_the_same_command_continues(
    command: list[str], base: api.Base, train_set: api.TrainSet, places: api.Places, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    real = ProgressLine.show

    def interrupted(self: ProgressLine, event: api.Event) -> None:
        real(self, event)
        if isinstance(event, api.Step) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "show", interrupted)
        assert cli.main(command) == 130
    assert "last finished step is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before, "the process's own handler is back"
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert runs.newest(folder).name == "step-000002"
    assert cli.main(command) == 0
    assert "continues at step 2" in capsys.readouterr().err
    library = runs.Training(base, train_set, places).finish()
    assert (tmp_path / "out" / "loras" / "x.safetensors").read_bytes() == library.lora_file.read_bytes()


def test_a_second_ctrl_c_ends_at_once(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    ended: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: ended.append(number))
    try:
        with train.StopFlag() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.wanted and not ended
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the other commands ----


def test_the_dataset_command_shows_what_would_be_trained(
    images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = TRAIN_FLAGS[:8]
    assert cli.main(["dataset", "report", "--train_data_dir", str(images), *flags]) == 0
    shown = capsys.readouterr().out
    assert "4 images" in shown and "zibu" in shown and "32x32" in shown and "40x24" in shown
    file = tmp_path / "a.toml"
    file.write_text(
        "network_dim = 8\nresolution = 32\nmin_bucket_reso = 16\nbucket_reso_steps = 8\n", "utf-8"
    )
    assert cli.main(["dataset", "report", "--train_data_dir", str(images), "--config", str(file)]) == 0
    capsys.readouterr()
    file.write_text("resolutoin = 512\n", encoding="utf-8")
    refused(
        ["dataset", "report", "--train_data_dir", str(images), "--config", str(file)],
        capsys,
        "LG-CFG-001",
        "resolution",
    )


def test_the_preview_command_draws_a_grid(
    command: list[str], tmp_path: Path, checkpoint: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0
    output = tmp_path / "new" / "grid.png"
    arguments = [
        "preview", "--pretrained_model_name_or_path", str(checkpoint), "--tokenizer", str(tokenizer),
        "--lora", str(tmp_path / "out" / "loras" / "x.safetensors"), "--prompts", "zibu", "blue zibu",
        "--seeds", "3", "--strengths", "0, 1", "--width", "32", "--height", "24", "--steps", "1",
        "--output", str(output), "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert f"Grid          {output}" in capsys.readouterr().out
    assert np.asarray(Image.open(output)).std() > 1
    arguments[arguments.index("--strengths") + 1] = "0-x"
    refused(arguments, capsys, "LG-NODE-010")
    arguments[arguments.index("--strengths") + 1] = "1"
    arguments[arguments.index("--output") + 1] = str(checkpoint / "grid.png")
    refused(arguments, capsys, "LG-CLI-003", str(checkpoint))
    arguments[arguments.index("--lora") + 1] = str(tmp_path / "none.safetensors")
    refused(arguments, capsys, "LG-SAVE-004", "none.safetensors")


# ---- refusals ----


def test_what_was_not_named_is_asked_for(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    refused(
        ["train", "--train_data_dir", str(images)], capsys, "LG-CLI-002", "--pretrained_model_name_or_path"
    )
    refused(["train", "--pretrained_model_name_or_path", "x"], capsys, "LG-CLI-002", "--train_data_dir")
    refused(["dataset", "report"], capsys, "LG-CLI-002", "--train_data_dir")


@pytest.mark.parametrize(
    "content",
    [None, b"a = ", b"a = 1\na = 2", b"\xff\xfe", "caption = '\u00e9'".encode("cp1252"), b"[" * 5000],
    ids=["gone", "unfinished", "twice", "utf-16", "cp1252", "deep"],
)  # fmt: skip
def test_a_config_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    file = tmp_path / "a.toml"
    if content is not None:
        file.write_bytes(content)
    refused(["train", "--config", str(file)], capsys, "LG-CLI-001", "a.toml")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--network_dim", "0"], ("LG-CFG-003", "network_dim")),
        (["--network_dim", "many"], ("LG-CFG-003", "network_dim", "'many'")),
        (["--resolution", "500"], ("LG-CFG-005", "resolution")),
        (["--output_name", "a/b"], ("LG-PATH-001", "output_name")),
        (["--device", "toaster"], ("LG-RUN-006", "toaster")),
        (["--train_data_dir", "no such folder"], ("LG-DATA-001", "no such folder")),
        (["--pretrained_model_name_or_path", "user/model-v1"], ("LG-BASE-001", "by a hub's name")),
        (["--pretrained_model_name_or_path", "model.ckpt"], ("LG-BASE-001", "model.ckpt")),
        (["--optimizer_args", "decouple=True"], ("LG-CFG-007", "decouple")),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_every_refusal_ends_with_status_1_and_its_remedy(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    named: tuple[str, ...],
    tmp_path: Path,
) -> None:
    refused([*command, *flags], capsys, *named)
    assert not (tmp_path / "out" / "loras").exists()


def test_a_place_that_cannot_be_written_is_named(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    refused(command, capsys, "LG-SAVE-007", str(tmp_path / "out"))


def test_an_unknown_setting_of_a_file_is_refused_with_its_file(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[train]\nmax_train_step = 5\n", encoding="utf-8")
    refused(
        [*command, "--config", str(file)], capsys, "LG-CFG-001", "max_train_step", "max_train_steps", "a.toml"
    )


def test_an_empty_folder_says_so(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    refused([*command, "--train_data_dir", str(tmp_path / "none")], capsys, "LG-DATA-002")
    folder = tiny.write_images(tmp_path / "bad", [(32, 32)])
    (folder / "b.png").write_bytes(b"no image")
    refused([*command, "--train_data_dir", str(folder)], capsys, "LG-DATA-003", "b.png")


# ---- progress ----


def step(number: int, total: int = 200) -> Step:
    return Step(number, total, 1, 0.12345, 0.13, {"denoiser": 1e-4}, 0.5, 0.25)


@pytest.mark.parametrize(
    ("event", "seconds", "start", "end"),
    [
        (step(84), 0.31, "steps:  42% [##########..............] 84/200 ", " 0.31 s/step ETA 0:36"),
        (step(1), 100.0, "steps:   0% [........................] 1/200 ", " 100 s/step ETA 5:31:40"),
        (step(200), 0.5, "steps: 100% [########################] 200/200 ", " 0.5 s/step ETA 0:00"),
        (step(1, 1), 0.0, "steps: 100% [########################] 1/1 ", " 0 s/step ETA 0:00"),
    ],
)
def test_the_progress_line(event: Step, seconds: float, start: str, end: str) -> None:
    assert step_line(event, seconds) == f"{start}loss 0.1235 avr_loss 0.1300{end}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_rewritten_and_a_log_is_not() -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        with ProgressLine(stream) as line:
            line.show(Planned(2, 0, 1, 2, 1, 1, Path("x"), ("planned",)))
            line.show(Cached("images", 1, 1, 0))
            for number in (1, 2):
                line.show(step(number, 2))
            line.show(Note("a note"))
            line.show(Saved(2, Path("x"), Path("x"), 3, 1))
    assert terminal.getvalue().count("\r") == 3
    assert "\r" not in log.getvalue()
    for text in ("planned", "encoding images 1/1", "2/2", "a note", "3 tensors, 1 still zero"):
        assert text in terminal.getvalue() and text in log.getvalue()
    assert terminal.getvalue().endswith("\n") and log.getvalue().endswith("\n")


# ---- flags and their help ----


def test_help_names_the_real_default_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text and "Default: ." not in text
    assert [name for name in config_flags() if f"--{name} " not in text] == []
    assert "Default: 512." in text and "Default: AdamW." in text


def test_a_switch_needs_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shuffle_caption", "--enable_bucket", "false", "--gradient_checkpointing", "--seed", "1"]
    assert cli.main(["train", *given, "--print_settings"]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert {"shuffle_caption = true", "enable_bucket = false", "gradient_checkpointing = true"} <= {*printed}


@pytest.mark.parametrize(
    ("given", "named", "suggested"),
    [
        (["--learing_rate", "1e-4"], "--learing_rate", "--learning_rate"),
        (["--output-name=x"], "--output-name", "--output_name"),
        (["--zzzz"], "--zzzz", "--help"),
        (["--resol", "512"], "--resol", "--resolution"),  # argparse would take beginnings for the flag
        (["--out=x"], "--out", "--output_dir, --output_name"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_nearest(
    given: list[str], named: str, suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["train", "--train_data_dir", "demo", *given], capsys, "LG-CLI-005", named, suggested)


def test_a_lora_without_trigger_words_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_images(tmp_path / "plain", [(32, 32)])
    assert cli.main([*command, "--train_data_dir", str(folder), "--max_train_steps", "1"]) == 0
    assert "Trigger words none" in capsys.readouterr().out
