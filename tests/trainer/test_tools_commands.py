"""``loragraft lora`` and ``loragraft convert-checkpoint``: arguments, results and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.__main__ import main
from loragraft_tests.trainer.lora_files import tiny_lora


@pytest.fixture
def lora(base: api.Base, tmp_path: Path) -> Path:
    return tiny_lora(base, tmp_path)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_resize_and_check(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.safetensors"
    resize = ("lora", "resize", lora, "--output", small, "--new_rank", 2)
    assert run(*resize, "--save_precision", "bf16") == 0
    assert "ranks 2 to 2" in capsys.readouterr().out
    assert {t.dtype for t in load_file(small).values()} == {torch.bfloat16}
    assert run(*resize) == 1
    assert "LG-TOOL-004" in capsys.readouterr().err
    dynamic = ("--dynamic_method", "sv_fro", "--dynamic_param", 0.8)
    assert run(*resize, "--overwrite", *dynamic) == 0
    assert run("lora", "check", small, "--quiet", "--clip_skip", 1) == 0
    assert "every module was trained" in capsys.readouterr().out
    tensors = {k: v * (0 if "mlp_fc1.lora_up" in k else 1) for k, v in load_file(small).items()}
    save_file(tensors, small)
    assert run("lora", "check", small, "--clip_skip", 1) == 1
    out = capsys.readouterr().out
    assert "tensor,shape,mean(abs),min(abs),norm" in out and "zero: lora_te" in out


def test_merge_convert_and_extract(
    lora: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, merged, found = (tmp_path / f"{n}.safetensors" for n in ("both", "merged", "found"))
    assert run("lora", "merge", lora, lora, "--ratios", 0.5, 0.25, "--output", both) == 0
    assert (
        run("lora", "merge-checkpoint", checkpoint, both, "--output", merged, "--save_precision", "fp32") == 0
    )
    assert run("lora", "extract", checkpoint, merged, "--output", found, "--dim", 8, "--conv_dim", 8) == 0
    assert "modules" in capsys.readouterr().out
    assert set(load_file(found)) == set(load_file(lora))
    peft = tmp_path / "peft.safetensors"
    assert run("lora", "convert", lora, "--to", "diffusers", "--output", peft) == 0
    assert any(k.startswith("unet.") for k in load_file(peft))
    assert (
        run(
            "lora",
            "merge-checkpoint",
            checkpoint,
            both,
            "--ratios",
            1,
            2,
            "--output",
            tmp_path / "x.safetensors",
        )
        == 1
    )
    assert "LG-TOOL-005" in capsys.readouterr().err


def test_metadata(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lora", "metadata", lora) == 0
    assert "ss_clip_skip: 1" in capsys.readouterr().out
    Image.new("RGB", (600, 300), "red").save(tmp_path / "p.png")
    change = ("lora", "metadata", lora, "--set", "title=A b=c", "--thumbnail", tmp_path / "p.png")
    assert run(*change) == 1
    assert run(*change, "--overwrite") == 0
    told = api.lora_metadata(lora)
    assert told["modelspec.title"] == "A b=c" and told["modelspec.thumbnail"].startswith("data:image/jpeg")
    assert run("lora", "metadata", lora, "--remove", "title", "--output", tmp_path / "y.safetensors") == 0
    assert "modelspec.title" not in api.lora_metadata(tmp_path / "y.safetensors")
    assert run("lora", "metadata", lora, "--set", "title") == 1
    assert "LG-TOOL-014" in capsys.readouterr().err


def test_convert_checkpoint(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, back = tmp_path / "f", tmp_path / "b.safetensors"
    assert run("convert-checkpoint", checkpoint, "--output", folder, "--tokenizer", tokenizer) == 0
    assert run("convert-checkpoint", folder, "--output", back) == 0
    assert set(load_file(back)) == set(load_file(checkpoint))


def test_sample_tells_what_has_no_effect(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--pretrained_model_name_or_path", checkpoint, "--tokenizer", tokenizer, "--device", "cpu")
    draw = ("sample", *base, "--prompts", "a", "--output", tmp_path / "out", "--width", 32, "--steps", 1)
    assert run(*draw, "--guidance", 3.5) == 1
    assert "guidance" in capsys.readouterr().err
    assert run(*draw, "--negative", "b", "--cfg", 1) == 1
    assert "negative prompt" in capsys.readouterr().err
    assert run(*draw, "--schedule", "own") == 0
    with Image.open(tmp_path / "out" / "seed1_00001.png") as image:
        assert image.size == (32, 32), "one side alone is that of a square"
        assert "Schedule type: own, CFG scale: 7" in image.info["parameters"]
