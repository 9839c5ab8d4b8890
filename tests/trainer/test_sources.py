"""Bases in several files: denoiser, VAE and text encoders make one; what makes none is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.families.names import ldm_keys
from loragraft.trainer.families.names.pieces import Pieced
from loragraft.trainer.families.sources.sources import Source, bring_together
from loragraft.trainer.families.text.openclip import to_hf
from loragraft_tests.trainer import quantised_files, runs, tiny, tiny_t5
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.model_files import LORA, VAES, Tensors, below, tokenizers_of, write
from loragraft_tests.trainer.tiny_families import TOKENIZERS, WEIGHTS

# Text encoders of sizes that no released model has say what they are, as ComfyUI's saved ones do.
CLIPS = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}
NAMED: Mapping[str, Mapping[str, str]] = {
    "sd2": {"text_encoder": "clip_h.transformer."},
    "sdxl": CLIPS,
    "sd3": CLIPS,
    "sd35_large": CLIPS,
    "sd35_medium": CLIPS,
}


# ---- one base of several files ----


@pytest.mark.parametrize("family", WEIGHTS)
def test_files_apart_are_the_checkpoint(family: str, tmp_path: Path) -> None:
    weights = WEIGHTS[family](tmp_path)
    given = tokenizers_of(family, tmp_path)
    whole = api.open_base(write(tmp_path / "whole.safetensors", weights), tokenizer=given)
    assert whole.family.name == family and not whole.notes
    denoiser = write(tmp_path / "denoiser.safetensors", below(weights, "model.diffusion_model."))
    vae = write(tmp_path / "vae.safetensors", below(weights, *VAES))
    texts = []
    for part in whole.family.encoders:
        prefix = NAMED.get(family, {}).get(part, "")
        own: Tensors = whole.state_dicts[part]
        if family == "sd2":  # which leaves out the last layer
            own = Pieced(weights, to_hf(weights, "cond_stage_model.model."))
        named = {prefix + k: v for k, v in own.items()}
        texts.append(write(tmp_path / f"{part}.safetensors", named))
    apart = api.open_base(denoiser, vae=vae, text_encoders=texts, tokenizer=given)
    assert apart.family is whole.family and apart.name == "denoiser"
    assert apart.weights_hash == whole.weights_hash
    with Refusal("LG-BASE-012", "vae missing", "text_encoder"):
        api.open_base(denoiser, text_encoders=texts, tokenizer=given)
    with Refusal("LG-BASE-012", "text_encoder", "missing"):
        api.open_base(denoiser, vae=vae, tokenizer=given)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_denoiser_with_any_prefix(
    prefix: str, weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    unet = {prefix + k: v for k, v in below(weights, "model.diffusion_model.").items()}
    text = write(tmp_path / "text.safetensors", below(weights, "cond_stage_model.transformer."))
    vae = write(tmp_path / "vae.sft", below(weights, "first_stage_model."))
    opened = api.open_base(
        write(tmp_path / "unet.safetensors", unet), vae=vae, text_encoders=[text], tokenizer=tokenizer
    )
    whole = api.open_base(checkpoint, tokenizer=tokenizer)
    assert opened.weights_hash == whole.weights_hash and opened.vae_name == "vae"


def test_diffusers_names_of_a_unet_and_of_vaes(
    checkpoint: Path, tokenizer: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = api.open_base(checkpoint, tokenizer=tokenizer)
    unet = write(tmp_path / "unet.safetensors", whole.state_dicts["denoiser"])
    vae = write(tmp_path / "vae.safetensors", whole.state_dicts["vae"])
    opened = api.open_base(unet, vae=vae, text_encoders=[checkpoint], tokenizer=tokenizer)
    assert opened.weights_hash == whole.weights_hash
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, value in load_file(vae).items():
        for new, before in old.items():
            name = name.replace(new, before) if ".attentions." in name else name
        renamed[name] = value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
    oldest = write(tmp_path / "old.safetensors", renamed)
    assert api.open_base(checkpoint, vae=oldest, tokenizer=tokenizer).weights_hash == whole.weights_hash


def test_qwen_images_vae_with_diffusers_names(tmp_path: Path) -> None:
    weights, given = WEIGHTS["qwen_image"](tmp_path), tokenizers_of("qwen_image", tmp_path)
    file = write(tmp_path / "whole.safetensors", weights)
    whole = api.open_base(file, tokenizer=given)
    vae = write(tmp_path / "vae.safetensors", whole.state_dicts["vae"])
    assert api.open_base(file, vae=vae, tokenizer=given).weights_hash == whole.weights_hash


def test_further_files_take_the_place_of_a_checkpoints_own(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    other = tiny.write_checkpoint(tmp_path / "other.safetensors", seed=1)
    vae = write(tmp_path / "new_vae.safetensors", below(load_file(other), "first_stage_model."))
    text = write(tmp_path / "text.safetensors", below(load_file(other), "cond_stage_model.transformer."))
    plain, changed = (api.open_base(file, tokenizer=tokenizer) for file in (checkpoint, other))
    opened = api.open_base(checkpoint, vae=vae, tokenizer=tokenizer)
    assert opened.notes == ("VAE: new_vae.safetensors takes the place of the one in tiny.safetensors",)
    both = api.open_base(checkpoint, vae=other, text_encoders=[other], tokenizer=tokenizer)
    for base, taken in (
        (opened, ["vae"]),
        (api.open_base(checkpoint, text_encoders=[text], tokenizer=tokenizer), ["text_encoder"]),
        (both, ["vae", "text_encoder"]),
    ):
        for part in ("denoiser", "vae", "text_encoder"):
            assert base.part_hash(part) == (changed if part in taken else plain).part_hash(part), part
        assert len(base.notes) == len(taken)


def test_a_gguf_denoiser_with_plain_files_beside_it(
    weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, train_set: api.TrainSet,
    places: api.Places, tmp_path: Path,
) -> None:  # fmt: skip
    quantised_files.write_gguf(tmp_path / "unet.gguf", below(weights, "model.diffusion_model."))
    base = api.open_base(
        tmp_path / "unet.gguf", vae=checkpoint, text_encoders=[checkpoint], tokenizer=tokenizer
    )
    assert base.notes == ("denoiser: 121 Q8_0 weights stay packed until they are used",)
    plain = api.open_base(checkpoint, tokenizer=tokenizer)
    assert base.part_hash("vae") == plain.part_hash("vae") != base.part_hash("denoiser")
    events = runs.Training(base, train_set, places).events(max_train_steps=1)
    assert [e for e in events if isinstance(e, api.Step)]


def test_flags_of_a_checkpoint_are_kept(checkpoint: Path) -> None:
    source = Source("x", {**load_file(checkpoint), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    weights = bring_together(source).weights()
    assert "v_pred" in weights and "ztsnr" in weights and set(source.weights) == set(weights)


# ---- refusals ----


def test_what_is_no_base_is_said(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    cases = {
        "a LoRA": LORA,
        "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(1)},
        "TAESD": {"taesd_decoder.1.weight": torch.zeros(1)},
        "an embedding": {"emb_params": torch.zeros(2, 4)},
        "diffusers": {"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)},
        "(1 tensors": {"something": torch.zeros(1)},
        "(0 tensors": {},
    }
    for named, weights in cases.items():
        file = write(tmp_path / "x.safetensors", weights)
        with Refusal("LG-BASE-002", named, "x.safetensors"):
            api.open_base(file, tokenizer=tokenizer)
        with Refusal("LG-BASE-002", named):
            api.open_base(checkpoint, vae=file, tokenizer=tokenizer)


def test_files_in_the_wrong_place(
    weights: dict[str, torch.Tensor], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    vae = write(tmp_path / "vae.safetensors", below(weights, "first_stage_model."))
    text = write(tmp_path / "text.safetensors", below(weights, "cond_stage_model.transformer."))
    other = write(tmp_path / "t5.safetensors", tiny_t5.random_t5().state_dict())
    with Refusal("LG-BASE-012", "vae.safetensors", "no denoiser", "VAE"):
        api.open_base(vae, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "text.safetensors", "no denoiser", "clip_l"):
        api.open_base(text, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "no VAE", "clip_l"):
        api.open_base(checkpoint, vae=text, tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "no text encoder", "VAE"):
        api.open_base(checkpoint, text_encoders=[vae], tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "clip_l", "text.safetensors", "tiny.safetensors"):
        api.open_base(checkpoint, text_encoders=[text, checkpoint], tokenizer=tokenizer)
    with Refusal("LG-BASE-012", "t5xxl", "does not read", "t5.safetensors"):
        api.open_base(checkpoint, text_encoders=[other], tokenizer=tokenizer)
    with Refusal("LG-BASE-001", "gone.safetensors"):
        api.open_base(checkpoint, vae=tmp_path / "gone.safetensors", tokenizer=tokenizer)


def test_tokenizers_that_are_not_needed(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    with Refusal("LG-BASE-007", "sd15", "clip"):
        api.open_base(checkpoint, tokenizer=[tokenizer, TOKENIZERS["clip"](tmp_path / "more")])
    with Refusal("LG-BASE-007", "t5"):
        api.open_base(checkpoint, tokenizer=[tokenizer, TOKENIZERS["t5"](tmp_path / "t5")])


# ---- the command line ----


def test_the_command_line_takes_files_by_kohyas_names_too(
    checkpoint: Path, tokenizer: Path, images: Path, weights: dict[str, torch.Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unet = write(tmp_path / "unet.safetensors", below(weights, ldm_keys.UNET_PREFIX))
    vae = write(tmp_path / "vae.safetensors", below(weights, ldm_keys.VAE_PREFIX))
    text = write(tmp_path / "text.safetensors", below(weights, ldm_keys.TEXT_PREFIX))
    common = [
        "train", "--train_data_dir", str(images), "--tokenizer", str(tokenizer), "--resolution", "32",
        "--min_bucket_reso", "16", "--max_bucket_reso", "64", "--bucket_reso_steps", "8", "--device", "cpu",
        "--max_train_steps", "1", "--preview_image", "false", "--output_name", "x", "--network_dim", "2",
    ]  # fmt: skip
    kohyas = tmp_path / "kohya.toml"
    named = {"pretrained_model_name_or_path": unet, "vae": vae, "train_data_dir": images}
    lines = [f"{key} = {json.dumps(str(path))}" for key, path in named.items()]
    more = ['network_module = "networks.lora"', 'resolution = "32"', "network_dim = 2", "max_train_steps = 1"]
    kohyas.write_text("\n".join([*lines, *more]))
    config = tmp_path / "config.toml"
    config.write_text(f"ae = {json.dumps(str(vae))}\n[files]\ntext_encoder = {json.dumps([str(text)])}\n")
    ways = {
        "checkpoint": ["--pretrained_model_name_or_path", str(checkpoint)],
        "flags": ["--pretrained_model_name_or_path", str(unet), "--vae", str(vae), "--clip_l", str(text)],
        "config": ["--pretrained_model_name_or_path", str(unet), "--config", str(config)],
        "kohya": ["--config_file", str(kohyas), "--text_encoder", str(text)],
    }
    made = []
    for name, flags in ways.items():
        out = tmp_path / name
        assert cli.main([*common, *flags, "--output_dir", str(out)]) == 0, capsys.readouterr().err
        if name != "kohya":  # whose defaults are others
            made.append(load_file(out / "loras" / "x.safetensors"))
    assert all(torch.equal(v, made[0][k]) for other in made[1:] for k, v in other.items())
    capsys.readouterr()
    for flags, named in (
        (["--pretrained_model_name_or_path", "demo", "--vae", str(vae)], "embedded"),
        ([*ways["config"], "--config", str(two_vaes(tmp_path, vae))], "two VAEs"),
    ):
        assert cli.main([*common, *flags, "--output_dir", str(tmp_path / "no")]) == 1
        said = capsys.readouterr().err
        assert "LG-BASE-012" in said and named in said


def test_pictures_of_a_denoisers_file_tell_the_vae(
    checkpoint: Path, tokenizer: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    unet = write(tmp_path / "unet.safetensors", below(weights, ldm_keys.UNET_PREFIX))
    vae = write(tmp_path / "own_vae.safetensors", below(weights, ldm_keys.VAE_PREFIX))
    flags = [
        "sample", "--pretrained_model_name_or_path", str(unet), "--vae", str(vae), "--text_encoder",
        str(checkpoint), "--tokenizer", str(tokenizer), "--prompts", "a", "--steps", "2", "--width", "32",
        "--height", "32", "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(flags) == 0
    (picture,) = (tmp_path / "out").glob("seed*.png")
    with Image.open(picture) as image:
        assert "VAE: own_vae" in image.info["parameters"] and "Model: unet" in image.info["parameters"]


def two_vaes(folder: Path, vae: Path) -> Path:
    file = folder / "two.toml"
    file.write_text(f"ae = {json.dumps(str(vae))}\nvae = {json.dumps(str(vae))}\n")
    return file
