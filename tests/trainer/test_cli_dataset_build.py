"""``loragraft dataset report``, ``export`` and ``import`` from the command line, on real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loragraft.trainer import __main__ as cli
from loragraft_tests.trainer.data_folders import fill
from loragraft_tests.trainer.test_data_hcp import FINE_TUNING

FLAGS = [
    "--resolution",
    "64",
    "--min_bucket_reso",
    "32",
    "--max_bucket_reso",
    "128",
    "--bucket_reso_steps",
    "32",
]
# The example of the guide for kohya's trainer, with nothing but the folder's name replaced.
GUIDE = """
[general]
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 16

  [[datasets.subsets]]
  image_dir = '%s'
  class_tokens = 'yuiri'
  num_repeats = 1
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    files = {f"2_zogi/{i}.png": (64 + 8 * i, 64) for i in range(4)}
    return fill(tmp_path / "set", files | {"2_zogi/0.txt": "zogi, hat"})


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["dataset", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_report_in_all_forms(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status, text, _ = run(
        capsys,
        *("report", "--train_data_dir", pictures, *FLAGS, "--kind", "character", "--max_train_epochs", 10),
        *(
            "--train_batch_size",
            2,
            "--json",
            out / "r.json",
            "--html",
            out / "r.html",
            "--pictures",
            out / "p",
        ),
    )
    assert status == 0
    assert text.count("4 images in set") == 1, "said once"
    assert "[few] 4 images" in text and "8 images with repeats x 10 epochs / (batch 2" in text
    assert json.loads((out / "r.json").read_text("utf-8"))["kind"] == "character"
    assert (out / "r.html").read_text("utf-8").startswith("<!doctype html>")
    assert len(list((out / "p").glob("*.png"))) == 3


def test_regularisation_images(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "reg", {f"1_thing/{i}.png": (64, 64) for i in range(3)})
    flags = ["--train_data_dir", pictures, "--reg_data_dir", tmp_path / "reg", *FLAGS]
    status, text, _ = run(capsys, "report", *flags, "--prior_loss_weight", "0.3")
    assert status == 0
    assert "Regularisation: 3 images used 8 times in all, for 8 training samples." in text
    assert "[reg_few]" in text


def test_the_guides_example_of_a_dataset_config(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dataset.toml"
    file.write_text(GUIDE % (pictures / "2_zogi").as_posix(), "utf-8")
    status, text, _ = run(capsys, "report", "--dataset_config", file)
    assert status == 0
    assert "4 images x 1, class words 'yuiri'" in text and "batch size 16" not in text
    assert "caption_extension is '.caption'" in text
    status, _, error = run(capsys, "report", "--dataset_config", file, "--train_data_dir", pictures)
    assert status == 1 and "LG-DATA-094" in error
    status, _, error = run(capsys, "report", "--dataset_config", tmp_path / "none.toml")
    assert status == 1 and "LG-DATA-084" in error


def test_settings_fill_what_a_config_leaves_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dataset.toml"
    text = GUIDE.replace("resolution = 512\n", "").replace(
        "class_tokens", "caption_extension = '.txt'\n  class_tokens"
    )
    file.write_text(text % (pictures / "2_zogi").as_posix(), "utf-8")
    status, shown, _ = run(capsys, "report", "--dataset_config", file, *FLAGS)
    assert status == 0 and "64x64" in shown
    settings = tmp_path / "s.toml"
    settings.write_text("resolutoin = 64\n", "utf-8")
    status, _, error = run(capsys, "report", "--dataset_config", file, "--config", settings)
    assert status == 1 and "LG-CFG-001" in error and "resolution" in error


def test_export_and_import(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "export", "--train_data_dir", pictures, *FLAGS, "--out", tmp_path / "k")
    assert status == 0 and "4 written" in text and "dataset.toml" in text
    status, _, _ = run(capsys, "import", tmp_path / "k" / "dataset.toml", "--out", tmp_path / "d.json")
    assert status == 0
    settings = (tmp_path / "d.toml").read_text("utf-8")
    assert "resolution = 64" in settings and "bucket_reso_steps = 32" in settings
    flags = ["--train_data_dir", tmp_path / "d.json", "--config", tmp_path / "d.toml"]
    status, again, _ = run(capsys, "report", *flags)
    assert status == 0 and "4 training images" in again and "8 images with repeats" in again


def test_several_datasets_are_imported_one_by_one(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.toml"
    one = GUIDE % (pictures / "2_zogi").as_posix()
    file.write_text(one + one[one.index("[[datasets]]") :].replace("512", "768"), "utf-8")
    status, _, error = run(capsys, "import", file, "--out", tmp_path / "d.json")
    assert status == 0 and "--dataset_config" in error
    assert (tmp_path / "d-1.json").is_file() and (tmp_path / "d-2.toml").is_file()


def test_the_other_guides_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(
        tmp_path,
        {f"train_data/{i}.png": (512, 512 + 64 * i) for i in range(5)} | {"train_data/1.txt": "a, b"},
    )
    (tmp_path / "ft1.yaml").write_text(FINE_TUNING, "utf-8")
    monkeypatch.chdir(tmp_path)
    status, text, _ = run(capsys, "report", "--dataset_config", "ft1.yaml")
    assert status == 0
    assert "5 buckets of about the area of 512x768" in text and "pt-cat1" in text
