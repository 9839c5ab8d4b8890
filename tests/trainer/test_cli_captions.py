"""`loragraft dataset tag`, `captions` and `tags`, called in process on real files and a real ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft_tests.trainer.data_folders import fill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return two captioned pictures."""
    return fill(
        tmp_path / "images",
        {
            "2_ohwx cat/a.png": (20, 12),
            "2_ohwx cat/a.txt": "red hair, hat (big)",
            "2_ohwx cat/b.png": (9, 30),
            "2_ohwx cat/b.txt": "hat (big), smile",
        },
    )


@pytest.fixture
def taggers(tmp_path: Path) -> Path:
    """Return a folder with one tagger."""
    pytest.importorskip("onnx", reason="pip install -e .[dev]")
    pytest.importorskip("onnxruntime", reason="pip install -e .[dev]")
    from loragraft_tests.trainer import tagger_files

    rows = [("general", 9), ("1girl", 0), ("long_hair", 0), ("miku_(vocaloid)", 4)]
    tagger_files.write_tagger(tmp_path / "taggers", rows, [0.9, 0.8, 0.5, 0.9])
    return tmp_path / "taggers"


def captions(file: Path) -> list[str]:
    return [record.caption for record in api.load_dataset(file).records]


def test_tagging_writes_a_dataset_file_that_the_next_command_reads(
    folder: Path, taggers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    common = ["--taggers_dir", str(taggers), "--cache", str(tmp_path / "cache")]
    assert cli.main(["dataset", "tag", str(folder), "--out", str(first), *common]) == 0
    printed = capsys.readouterr().out
    assert "Tagged 2 images with tagger" in printed and f"Dataset       {first}" in printed
    assert captions(first) == ["miku (vocaloid), 1girl, long hair"] * 2
    flags = ["--exclude", "[features]", "--trigger", "{class}", "--existing", "append", "--rating", "last"]
    flags += ["--no-replace_underscore", "--general_threshold", "0.6", "--device", "cpu"]
    assert cli.main(["dataset", "tag", str(first), "--out", str(second), *common, *flags]) == 0
    assert "2 of 2 pictures were scored before" not in capsys.readouterr().out, "another device was asked for"
    assert captions(second)[0] == "ohwx cat, miku (vocaloid), 1girl, long hair, general"
    assert cli.main(["dataset", "captions", str(second), "--do", "delete: general", "--out", str(first)]) == 0
    assert captions(first)[0] == "ohwx cat, miku (vocaloid), 1girl, long hair"


def test_without_out_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(["dataset", "captions", str(folder), "--preset", "prune features"]) == 0
    printed = capsys.readouterr().out
    assert "2_ohwx cat/a.png: ohwx cat, hat (big)" in printed and "Nothing was written" in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_operations_from_a_file_and_flags_in_order(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ops.txt").write_text("\ufeff# mine\ndelete: red hair\n\n", "utf-8")
    out, prompts = tmp_path / "x.json", tmp_path / "prompts.txt"
    command = ["dataset", "captions", str(folder), "--operations", str(tmp_path / "ops.txt")]
    command += [
        "--do",
        "suffix: red hair",
        "--do",
        "trigger: z",
        "--out",
        str(out),
        "--prompts",
        str(prompts),
    ]
    assert cli.main(command) == 0
    assert captions(out) == ["z, hat (big), red hair", "z, hat (big), smile, red hair"]
    assert prompts.read_text("utf-8").splitlines()[0] == "z, hat \\(big\\), red hair"
    assert (folder / "2_ohwx cat/a.txt").read_text("utf-8") == "red hair, hat (big)"


def test_captions_are_set_from_a_list(folder: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "list.json", tmp_path / "x.json"
    texts.write_text(json.dumps(["A cat.", "A dog."]), "utf-8")
    command = ["dataset", "captions", str(folder), "--set", str(texts), "--out", str(out)]
    assert cli.main([*command, "--template", "{trigger}, {caption} {tags}", "--trigger", "z"]) == 0
    assert captions(out) == ["z, A cat. red hair, hat (big)", "z, A dog. hat (big), smile"]


def test_counting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset", "tags", str(folder), "--json"]) == 0
    expected = {"images": 2, "tags": {"hat (big)": 2, "red hair": 1, "smile": 1}}
    assert json.loads(capsys.readouterr().out) == expected
    assert cli.main(["dataset", "tags", str(folder), "--top", "1"]) == 0
    assert "       2  hat (big)\n  and 2 more tags" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["captions", "--do", "delet: x"], "LG-DATA-072"),
        (["captions", "--do", "delete: *"], "LG-DATA-073"),
        (["captions", "--operations", "latin.txt"], "LG-DATA-072"),
        (["captions", "--operations", "none.txt"], "LG-CLI-003"),
        (["captions", "--set", "latin.txt"], "LG-DATA-077"),
        (["tag", "--tagger", "wd-nothing", "--taggers_dir", "none"], "LG-DATA-060"),
        (["tag", "--tagger", "wd-nothing", "--taggers_dir", "none", "--download"], "LG-DATA-064"),
        (["tag", "--tagger", "wd-vit-tagger-v3", "--taggers_dir", "none", "--download"], "LG-DATA-064"),
    ],
)
def test_refusals(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: str,
) -> None:
    """The last one asks for a download while HF_HUB_OFFLINE is set, as it is in all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    step, *rest = arguments
    assert cli.main(["dataset", step, str(folder), *rest]) == 1
    assert capsys.readouterr().err.splitlines()[-4].startswith(code)


def test_help_names_every_operation_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("captions", "tag", "tags"):
        with pytest.raises(SystemExit) as info:
            cli.main(["dataset", step, "--help"])
        assert info.value.code == 0
        if step == "captions":
            printed = capsys.readouterr().out
            assert all(name in printed for name in (*api.CAPTION_OPERATIONS, *api.CAPTION_PRESETS))
