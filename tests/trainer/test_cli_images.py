"""The commands scan, convert and duplicates: chained by dataset files, with the same result as in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loragraft.trainer.__main__ import main
from loragraft.trainer.data.records_file import load_dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft_tests.trainer.data_folders import fill, picture

S = (64, 48)


def source(tmp_path: Path) -> Path:
    root = fill(tmp_path / "set", {"2_cat/a.png": S, "2_cat/a.txt": "a cat", "2_cat/b.bmp": (80, 50)})
    picture(S).save(root / "2_cat" / "twin.bmp")
    return root


def test_from_a_folder_to_a_clean_numbered_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = source(tmp_path)
    scanned, unique = tmp_path / "scan.json", tmp_path / "unique.json"
    assert main(["dataset", "scan", str(root), "--out", str(scanned)]) == 0
    assert "3 images in set, 6 with repeats." in capsys.readouterr().out
    assert load_dataset(scanned) == scan_folder(root)
    assert main(["dataset", "duplicates", str(scanned), "--out", str(unique)]) == 0
    out = capsys.readouterr().out
    assert "1 group of duplicates" in out and "2_cat/twin.bmp (64x48): 2_cat/a.png (64x48) same pixels" in out
    copy = tmp_path / "copy"
    arguments = ["dataset", "convert", str(unique), "--out", str(copy), "--format", "jpeg"]
    assert main([*arguments, "--names", "number", "--prefix", "cat_"]) == 0
    assert "2 written, 0 unchanged" in capsys.readouterr().out
    result = load_dataset(tmp_path / "copy.json")
    assert [r.name for r in result.records] == ["2_cat/cat_0001.jpg", "2_cat/cat_0002.jpg"]
    assert all(r.path.is_file() and r.repeats == 2 for r in result.records)
    assert main([*arguments, "--names", "number", "--prefix", "cat_"]) == 0
    assert "0 written, 2 unchanged" in capsys.readouterr().out


def test_flags_of_the_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path / "set", {"a.png": S, "a.png.txt": "one\ntwo", "reg/b.png": S, "masks/a.png": S})
    Image.new("RGBA", S).save(root / "glass.png")
    flags = ["--class_tokens", "x", "--caption_lines", "tags", "--reg_folder", "reg", "--masks", "folder"]
    flags += ["--background", "0", "0", "0", "--captions", "txt", "folder", "--max_megapixels", "1"]
    assert main(["dataset", "scan", str(root), *flags, "--out", str(tmp_path / "x.json")]) == 0
    records = {r.name: r for r in load_dataset(tmp_path / "x.json").records}
    assert records["a.png"].caption == "one, two"
    assert records["a.png"].mask == root / "masks" / "a.png"
    assert records["reg/b.png"].is_reg
    assert records["glass.png"].background == (0, 0, 0)
    capsys.readouterr()
    assert main(["dataset", "scan", str(root), "--no-recursive", "--class_tokens", "x"]) == 0
    assert "2 images in set" in capsys.readouterr().out
    assert main(["dataset", "scan", str(root), "--check", "header", "--class_tokens", "x"]) == 0
    assert "Only the headers were read" in capsys.readouterr().out


def test_flags_do_nothing_for_a_dataset_file_and_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    assert main(["dataset", "scan", str(source(tmp_path)), "--out", str(file)]) == 0
    capsys.readouterr()
    assert main(["dataset", "scan", str(file), "--masks", "alpha", "--class_tokens", "x"]) == 1
    error = capsys.readouterr().err
    assert "LG-DATA-028" in error and "--class_tokens, --masks" in error
    assert main(["dataset", "scan", str(file), "--masks", "none"]) == 0, "a default says nothing new"


@pytest.mark.parametrize("command", ["scan", "convert", "duplicates", "orphans"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["dataset", command, "--help"])
    assert done.value.code == 0 and "usage:" in capsys.readouterr().out


def test_refusals_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = source(tmp_path)
    assert main(["dataset", "convert", str(root), "--out", str(root)]) == 1
    assert "LG-DATA-021" in capsys.readouterr().err
    assert main(["dataset", "scan", str(tmp_path / "gone.json")]) == 1
    assert "LG-DATA-020" in capsys.readouterr().err
    assert main(["dataset", "duplicates", str(root), "--distance", "99"]) == 1
    assert "LG-CFG-003" in capsys.readouterr().err
