"""What the benchmark asks of each trainer: settings, files, arguments, and the work that they cost."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer.checks import make_both
from loragraft_tests.benchmark_modules import load
from loragraft_tests.trainer import tiny, tiny_t5

cases, common, onetrainer, process = map(load, ("cases", "common", "onetrainer", "process"))
architectures, ceiling, kohya, ours, peft_loop, prepare, random_files = map(
    load, ("architectures", "ceiling", "kohya", "ours", "peft_loop", "prepare", "random_files")
)


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


@pytest.mark.parametrize("name", [n for n, a in architectures.ARCHITECTURES.items() if a.smallest])
def test_what_takes_least_memory_differs_by_architecture(name: str) -> None:
    case = cases.Case(64, 1, "bf16", "cuda", 2, 0, name)
    found = prepare.settings_for("ours smallest", cases.VARIANTS["ours smallest"], case)
    assert found["gradient_checkpointing"] and "base_storage" in found
    make_both({"resolution": 256, **architectures.ARCHITECTURES[name].settings, **found})
    assert prepare.settings_for("ours", {"engine": "eager"}, case) == {"engine": "eager"}
