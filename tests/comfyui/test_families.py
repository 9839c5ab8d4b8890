"""SD2.x, SDXL, SD3, Flux.1 and newer in a real ComfyUI, on tiny weights: trained, previewed, drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer import api
from loragraft_tests.comfyui import headless, prompts
from loragraft_tests.comfyui.harness import Comfy, ServerError, on_gpu
from loragraft_tests.comfyui.test_finetune import settings_node

BASE: dict[str, Any] = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}
# The tiny base -> the trainer's name of its family, and settings that its training needs.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd2": ("sd2", {}),
    "sd2_v": ("sd2", {"v_parameterization": True}),
    "sdxl": ("sdxl", {}),
    "sdxl_v": ("sdxl", {"v_parameterization": True, "zero_terminal_snr": True}),
    "sd3": ("sd3", {}),
    "sd35": ("sd35_medium", {}),
    "sd35_clips": ("sd35_medium", {}),
    "flux": ("flux", {"text_encoder_lr": 1e-3}),
    "flux_fp8": ("flux", {}),
    "flux_schnell": ("flux_schnell", {}),
    "chroma": ("chroma", {}),
    "flux2": ("flux2", {}),
    "qwen_image": ("qwen_image", {}),
    "z_image": ("z_image", {}),
    "lumina2": ("lumina2", {}),
}
COMPARED = ("sd2", "sdxl", "sd35", "flux")
NEWER = ("chroma", "flux2", "qwen_image", "z_image", "lumina2")
MAIN = (*COMPARED, *(pytest.param(name, marks=pytest.mark.slow) for name in NEWER))
PREDICTIONS = {
    "sd2": (False, False),
    "sd2_v": (True, False),
    "sdxl": (False, False),
    "sdxl_v": (True, True),
}
LOSS_SETTINGS = ("v_parameterization", "zero_terminal_snr")


def tiny(family: str) -> prompts.Prompt:
    return {"base": prompts.node("ProbeTinyBase", family=family)}


def pixels(server: Comfy, image: dict[str, str]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB"))


def train_prompt(family: str, **settings: Any) -> prompts.Prompt:
    """Return a run of few steps on the tiny base, with a text encoder LoRA where people train one."""
    own = {**FAMILIES[family][1], **settings}
    loss = {name: own.pop(name) for name in LOSS_SETTINGS if name in own}
    graph = prompts.train_prompt(**own) | tiny(family)
    if loss:
        graph["loss"] = settings_node("LoraGraftLoss", **loss)
        graph["train"]["inputs"]["settings"] = ["loss", 0]
    return graph


def lora_of(server: Comfy, name: str) -> Path:
    return server.base / "models/loras" / f"{name}.safetensors"


def native(family: str, lora: dict[str, Any] | None, prefix: str, **settings: Any) -> prompts.Prompt:
    return prompts.native_prompt(lora, prefix=prefix, **settings) | tiny(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_base_draws(server: Comfy, family: str) -> None:
    first, again, other = (
        pixels(server, server.run(native(family, None, f"{family}{i}", seeds=seed))["save"]["images"][0])
        for i, seed in enumerate(("3", "3", "4"))
    )
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 5, "the seed must show"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_shared_and_known_by_a_file_of_them(server: Comfy, family: str) -> None:
    graph = {**tiny(family), "share": prompts.node("ProbeShare", **BASE, tag="1")}
    report = prompts.answer(server.run(graph), "share")
    assert report["family"] == FAMILIES[family][0]
    assert report["host_inference"], "the host's weights are inference tensors, or this test shows nothing"
    assert report["count"] > 100
    # Vectors of an fp8 model are unpacked once: they are small.
    copied = report["copied_matrices" if family == "flux_fp8" else "copied"]
    assert copied == [] and report["inference"] == []
    assert (report["velocity"], report["zero_terminal"]) == PREDICTIONS.get(family, (None, None))
    file = server.base / "models/checkpoints" / f"tiny_{family}.safetensors"
    base = api.open_base(file)
    assert base.weights_hash == report["hash"]
    if family in PREDICTIONS:
        assert bool(base.velocity) == report["velocity"]
        assert bool(base.zero_terminal) == report["zero_terminal"]


@pytest.fixture(scope="module", params=MAIN)
def trained(server: Comfy, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], str]:
    """Train, preview and save cells; return the family, the outputs and what was logged."""
    family: str = request.param
    name = f"tiny_{family}"
    graph = train_prompt(
        family,
        output_name=name,
        max_train_steps=4,
        learning_rate=5e-3,
        save_every_n_steps=2,
        sample_prompts="a creature",
    )
    graph["preview"] = prompts.preview_node(checkpoints=["train", 6], seeds="3, 4")
    graph["cells"] = prompts.node("SaveImage", images=["preview", 1], filename_prefix=f"{name}_cells")
    before = len(server.log)
    outputs = server.run(graph)
    return family, outputs, server.log[before:]


def test_a_run_leaves_a_file_that_fits_whole(server: Comfy, trained: tuple[str, dict[str, Any], str]) -> None:
    family, outputs, log = trained
    done = outputs["train"]["loragraft"][0]
    assert done["step"] == 4 and not done["reused"]
    assert all(np.isfinite(loss) for _, loss in done["losses"])
    assert outputs["train"]["images"], "the samples drawn in between"
    tensors = api.lora_tensors(lora_of(server, f"tiny_{family}"))
    still = [k for k, t in tensors.items() if k.endswith("lora_up.weight") and not float(t.abs().max())]
    # What is behind the last layer that captions are read from is trained by nothing.
    behind = "lora_te1_text_model_encoder_layers_2_" if family == "sdxl" else None
    assert all(behind and k.startswith(behind) for k in still), still
    assert len(tensors) >= 30
    assert "not loaded" not in log.lower()


def test_a_preview_cell_is_what_the_native_nodes_draw(
    server: Comfy, trained: tuple[str, dict[str, Any], str]
) -> None:
    family, outputs, _ = trained
    cells = [pixels(server, image) for image in outputs["cells"]["images"]]
    assert len(cells) == 6, "without, step 2 and the finished file, two seeds each"
    lora = {"lora_name": f"tiny_{family}.safetensors", "strength_model": 0.8, "strength_clip": 0.8}
    before = len(server.log)
    for row, widgets in ((0, None), (2, lora)):
        for column, seed in enumerate(("3", "4")):
            drawn = server.run(native(family, widgets, f"{family}_{row}_{column}", seeds=seed))
            assert np.array_equal(pixels(server, drawn["save"]["images"][0]), cells[2 * row + column])
    assert "not loaded" not in server.log[before:].lower()
    assert not np.array_equal(cells[0], cells[4]), "the LoRA changes nothing"


def test_model_and_clip_outputs_equal_the_native_loader(
    server: Comfy, trained: tuple[str, dict[str, Any], str]
) -> None:
    family, _, _ = trained
    graph = native(family, None, f"{family}_outputs")
    graph |= train_prompt(
        family,
        output_name=f"tiny_{family}",
        max_train_steps=4,
        learning_rate=5e-3,
        save_every_n_steps=2,
        sample_prompts="a creature",
    )
    for name in ("positive", "negative"):
        graph[name]["inputs"]["clip"] = ["train", 2]
    graph["sampled"]["inputs"]["model"] = ["train", 1]
    ours = server.run(graph)
    lora = {"lora_name": f"tiny_{family}.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    theirs = server.run(native(family, lora, f"{family}_loader"))
    pictures = [pixels(server, outputs["save"]["images"][0]) for outputs in (ours, theirs)]
    assert np.array_equal(*pictures)


@pytest.mark.skipif(on_gpu(), reason="compares in float32; on a GPU the host computes in half precision")
def test_comfyui_the_trainers_own_modules_and_diffusers_draw_the_same(
    server: Comfy, trained: tuple[str, dict[str, Any], str]
) -> None:
    family, _, _ = trained
    lora = {"lora_name": f"tiny_{family}.safetensors"}
    cfg = 1.0 if family == "flux" else 4.0
    equal = prompts.node("ProbeEqual", **BASE, **lora, text="a red circle", negative="blue", cfg=cfg, steps=6)
    report = prompts.answer(server.run({**tiny(family), "equal": equal}), "equal")
    print(report)
    assert report["lora_moves"] > 0.02 and report["deviation"] > 0.1
    assert report["apart"] < 1e-3
    if family in COMPARED:
        if "diffusers_apart" not in report:
            pytest.skip("ComfyUI's Python has no peft, through which diffusers loads LoRAs")
        assert report["diffusers_apart"] < 1e-3, "its own pipeline and LoRA loader"


@pytest.mark.skipif(on_gpu(), reason="the command line trains on the CPU here")
@pytest.mark.parametrize("family", ["sd2_v", "sdxl", "sd35_clips", "flux", "flux_fp8", "lumina2"])
def test_the_graph_and_the_command_line_give_the_same(
    server: Comfy, family: str, comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))  # the tokenizers are there
    settings = {"output_name": f"both_{family}", "max_train_steps": 3, "learning_rate": 2e-3}
    graph = train_prompt(family, **settings)
    graph["build"]["inputs"]["shuffle_caption"] = True
    server.run(graph, {"id": "both", "nodes": [], "links": []})
    file = server.base / "models/checkpoints" / f"tiny_{family}.safetensors"
    loras = headless.train(tmp_path, str(file), {**settings, **FAMILIES[family][1], "shuffle_caption": True})
    name = f"both_{family}.safetensors"
    assert headless.assert_same_file(server.base / "models/loras" / name, loras / name) > 50


def test_weights_that_comfyui_gguf_holds_are_read_packed(server: Comfy) -> None:
    graph = {**tiny("flux"), "look": prompts.node("ProbeGGUF", **BASE)}
    report = prompts.answer(server.run(graph), "look")
    assert report["family"] == "flux" and report["names"] == []
    assert report["packed"] == report["kept"] > 20 and report["copied"] == []
    assert 1e-5 < report["error"] < 0.01, "eight bits of each value"


@pytest.mark.parametrize(
    ("first", "second", "code", "said"),
    [
        ("sdxl", "sd2", "LG-NODE-003", "clip_l, clip_g"),
        ("flux", "sdxl", "LG-NODE-003", "clip_l, t5xxl"),
    ],
)
def test_a_clip_of_another_family_is_refused(
    server: Comfy, first: str, second: str, code: str, said: str
) -> None:
    graph = train_prompt(first, max_train_steps=1)
    graph["other"] = tiny(second)["base"]
    graph["train"]["inputs"]["clip"] = ["other", 1]
    with pytest.raises(ServerError) as caught:
        server.run(graph)
    assert code in str(caught.value) and said in str(caught.value)


def test_a_vae_of_another_family_is_refused(server: Comfy) -> None:
    graph = train_prompt("sd35", max_train_steps=1)
    graph["other"] = tiny("sdxl")["base"]
    graph["train"]["inputs"]["vae"] = ["other", 2]
    with pytest.raises(ServerError, match="16 channels"):
        server.run(graph)


@pytest.mark.parametrize(
    ("family", "stop", "fits"),
    [
        ("sd2", -2, True),
        ("sd2", -1, False),
        ("sdxl", -2, True),
        ("sdxl", -1, False),
        ("flux", -2, False),
    ],
)
def test_a_clip_stopped_at_another_layer_is_refused(
    server: Comfy, family: str, stop: int, fits: bool
) -> None:
    graph = train_prompt(family, max_train_steps=1, output_name=f"layer_{family}_{-stop}")
    graph["layer"] = prompts.node("CLIPSetLastLayer", clip=["base", 1], stop_at_clip_layer=stop)
    graph["train"]["inputs"]["clip"] = ["layer", 0]
    if fits:
        server.run(graph)
        return
    with pytest.raises(ServerError, match="LG-NODE-007"):
        server.run(graph)


@pytest.mark.parametrize("family", ["sd2_v", "sdxl_v"])
def test_a_base_that_predicts_velocity_switches_the_setting_on(server: Comfy, family: str) -> None:
    own = train_prompt(family, max_train_steps=1, output_name=f"own_{family}")
    assert server.run(own)["train"]["loragraft"][0]["step"] == 1
    graph = train_prompt(family, max_train_steps=1, output_name=f"left_{family}")
    del graph["loss"], graph["train"]["inputs"]["settings"]
    before = len(server.log)
    assert server.run(graph)["train"]["loragraft"][0]["step"] == 1
    assert "v_parameterization is on" in server.log[before:]
    assert lora_of(server, f"left_{family}").is_file()
    ours, theirs = (api.lora_tensors(lora_of(server, f"{name}_{family}")) for name in ("left", "own"))
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


def test_a_base_that_predicts_noise_refuses_the_setting(server: Comfy) -> None:
    graph = train_prompt("sdxl", max_train_steps=1)
    graph["loss"] = settings_node("LoraGraftLoss", v_parameterization=True)
    graph["train"]["inputs"]["settings"] = ["loss", 0]
    with pytest.raises(ServerError, match="LG-NODE-006"):
        server.run(graph)


@pytest.mark.parametrize(
    ("family", "words", "limit"),
    [("sdxl", 100, 75), ("flux", 100, None), pytest.param("flux", 600, 512, marks=pytest.mark.slow)],
)
def test_captions_that_are_cut_are_told_on_the_node(
    server: Comfy, family: str, words: int, limit: int | None
) -> None:
    """Flux's CLIP beside T5 cuts them at 75 tokens as the model learnt it, which is no news."""
    graph = train_prompt(family, max_train_steps=1, output_name=f"cut_{family}_{words}")
    graph["build"]["inputs"]["caption_suffix"] = " blue" * words
    before = len(server.log)
    done = server.run(graph)["train"]["loragraft"][0]
    told = [note for note in done["notes"] if "longer than the base model reads" in note]
    assert len(told) == (limit is not None)
    assert ("longer than the base model reads" in server.log[before:]) == bool(told)
    if told:
        assert f"of which {limit} are read" in told[0]
        assert told[0].endswith("or shorten them")


SHIFTS: dict[str, dict[str, Any]] = {
    "sd35": prompts.node("ModelSamplingSD3", shift=5.0),
    "flux": prompts.node("ModelSamplingFlux", max_shift=1.2, base_shift=0.4, width=64, height=64),
}


@pytest.mark.parametrize("family", SHIFTS)
def test_a_shift_of_the_levels_that_are_sampled_is_no_other_model(server: Comfy, family: str) -> None:
    graph = train_prompt(family, max_train_steps=1, output_name=f"shifted_{family}")
    graph["shift"] = {**SHIFTS[family], "inputs": {**SHIFTS[family]["inputs"], "model": ["base", 0]}}
    graph["train"]["inputs"]["model"] = ["shift", 0]
    outputs = server.run(graph)
    assert outputs["train"]["loragraft"][0]["step"] == 1


def test_a_flow_that_is_sampled_as_something_else_is_refused(server: Comfy) -> None:
    graph = train_prompt("flux", max_train_steps=1)
    graph["odd"] = prompts.node(
        "ModelSamplingDiscrete", model=["base", 0], sampling="v_prediction", zsnr=False
    )
    graph["train"]["inputs"]["model"] = ["odd", 0]
    with pytest.raises(ServerError, match="LG-NODE-006"):
        server.run(graph)
