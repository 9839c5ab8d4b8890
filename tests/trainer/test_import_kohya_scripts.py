"""Configs of kohya's scripts for SDXL, SD3 and Flux: they run unchanged, and what they ignore is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.adapters.configured import settings_of
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports import kohya_scripts, kohya_table
from loragraft.trainer.imports.kohya import read_kohya
from loragraft.trainer.imports.kohya_scripts import FLUX, ONLY, SCRIPTS, SD3, SDXL, UNNAMED, script_of
from loragraft.trainer.parts import Target

GOLDEN = Path(__file__).parent.parent / "golden"
MORE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "kohya_arguments_more.json").read_text("utf-8"))
RANKS: list[dict[str, Any]] = json.loads((GOLDEN / "network_args_dit.json").read_text("utf-8"))


def train(line: str) -> api.TrainConfig:
    return api.make_both(read_kohya(f"{line} --resolution 1024").settings, where="test")[1]


def notes(line: str) -> str:
    return "\n".join(read_kohya(f"{line} --resolution 1024").notes)


def refusal(line: str) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        train(line)
    return caught.value


# ---- which script has which argument ----


def test_each_script_has_the_arguments_of_its_parser() -> None:
    assert {name: set(entry["default"]) for name, entry in MORE.items()} == {
        name: set(users) for name, users in ONLY.items()
    }


def test_its_defaults_are_its_parsers_or_said_to_be_taken() -> None:
    """What is honoured by name and is not off has its default filled in, or ours is the same."""
    plain = api.as_dict(api.TrainConfig())
    for name in (name for name in MORE if name in kohya_table.HONOURED):
        for program, default in MORE[name]["default"].items():
            if default is not None:
                assert SCRIPTS[program].defaults.get(name, plain[name]) == default, (program, name)


@pytest.mark.parametrize(
    ("given", "script"),
    [
        ({}, UNNAMED),
        ({"network_module": "networks.lora"}, UNNAMED),
        ({"ae": "a"}, SCRIPTS[FLUX]),
        ({"clip_l": "a", "t5xxl": "b", "timestep_sampling": "shift"}, SCRIPTS[FLUX]),
        ({"clip_l": "a", "t5xxl": "b"}, SCRIPTS[SD3]),
        ({"training_shift": 3.0}, SCRIPTS[SD3]),
        ({"network_module": "networks.lora_flux"}, SCRIPTS[FLUX]),
        ({"network_module": "networks.lora_sd3"}, SCRIPTS[SD3]),
        ({"model_train_type": "sdxl-lora"}, SCRIPTS[SDXL]),
        ({"model_train_type": "flux-lora", "clip_l": "a"}, SCRIPTS[FLUX]),
        ({"model_train_type": "sd-lora"}, UNNAMED),
    ],
)
def test_a_config_without_a_program_tells_its_script(given: dict[str, Any], script: Any) -> None:
    assert script_of(given) == script


def test_an_argument_of_another_script_is_refused_by_name() -> None:
    error = refusal("train_network.py --ae a.safetensors")
    assert error.code == "LG-IMP-002" and FLUX in error.where and "train_network.py does not" in error.where
    assert refusal(f"{FLUX} --clip_g a").code == "LG-IMP-002"
    assert refusal(f"{SD3} --guidance_scale 1").code == "LG-IMP-002"
    assert train("train_network.py --cache_text_encoder_outputs --network_train_unet_only")


# ---- the lines of kohya's own pages ----

FLUX_LINE = f"""accelerate launch --num_cpu_threads_per_process 1 {FLUX} \\
  --pretrained_model_name_or_path="flux1-dev.safetensors" --clip_l="clip_l.safetensors" \\
  --t5xxl="t5xxl_fp16.safetensors" --ae="ae.safetensors" --dataset_config="my.toml" \\
  --output_dir="out" --output_name="my_flux_lora" --save_model_as=safetensors \\
  --network_module=networks.lora_flux --network_dim=16 --network_alpha=1 --learning_rate=1e-4 \\
  --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa --max_train_epochs=10 \\
  --save_every_n_epochs=1 --mixed_precision="fp16" --gradient_checkpointing --guidance_scale=1.0 \\
  --timestep_sampling="flux_shift" --model_prediction_type="raw" --blocks_to_swap=18 \\
  --cache_text_encoder_outputs --cache_latents"""
SD3_LINE = f"""{SD3} --pretrained_model_name_or_path="sd3.safetensors" --clip_l="l" --clip_g="g" \\
  --t5xxl="t" --dataset_config="my.toml" --network_module=networks.lora --network_dim=16 --network_alpha=1 \\
  --learning_rate=1e-4 --lr_scheduler="constant" --weighting_scheme="uniform" --blocks_to_swap=32"""


def test_fluxs_own_line() -> None:
    imported = read_kohya(FLUX_LINE + " --network_train_unet_only")
    assert {n: imported.places[n] for n in ("clip_l", "t5xxl", "ae", "dataset_config")} == {
        "clip_l": "clip_l.safetensors",
        "t5xxl": "t5xxl_fp16.safetensors",
        "ae": "ae.safetensors",
        "dataset_config": "my.toml",
    }
    config = api.make_both(imported.settings)[1]
    assert (config.timestep_sampling, config.guidance_scale, config.model_prediction_type) == (
        "flux_shift",
        1.0,
        "raw",
    )
    assert (config.algo, config.network_dim, config.network_alpha, config.blocks_to_swap) == (
        "lora",
        16,
        1.0,
        18,
    )
    assert config.cache_text_encoder_outputs and config.text_encoder_lr is None


def test_a_trained_clip_has_no_kept_texts() -> None:
    """CLIP is trained unless it is said not to be; then that script keeps T5's half alone."""
    imported = read_kohya(FLUX_LINE)
    config = api.make_both(imported.settings)[1]
    assert not config.cache_text_encoder_outputs and config.text_encoder_lr == 1e-4
    assert any(note.startswith("cache_text_encoder_outputs: CLIP is trained") for note in imported.notes)


def test_sd3s_own_line_compares_images_at_even_noise_levels() -> None:
    config = api.make_both(read_kohya(SD3_LINE).settings)[1]
    assert (config.timestep_sampling, config.discrete_flow_shift) == ("uniform", None)
    assert (config.model_prediction_type, config.weighting_scheme) == ("denoised", "none")
    assert (config.t5xxl_max_token_length, config.guidance_scale) == (256, None)
    assert "networks.lora_sd3" in "\n".join(read_kohya(SD3_LINE).notes)


def test_a_line_for_sdxl() -> None:
    line = f"{SDXL} --network_module networks.lora --network_dim 32 --clip_skip 2 --vae v --cache_latents"
    config = train(f"{line} --cache_text_encoder_outputs_to_disk --network_train_unet_only")
    assert config.clip_skip == 1 and config.cache_text_encoder_outputs
    assert "clip_skip 2: sdxl_train_network.py does nothing with it" in notes(line)
    assert read_kohya(line).places["vae"] == "v"
    assert config.model_prediction_type == "auto" and config.timestep_sampling == "auto"


# ---- noise levels ----

NOISE_LEVELS = (
    "timestep_sampling",
    "discrete_flow_shift",
    "sigmoid_scale",
    "logit_mean",
    "logit_std",
    "mode_scale",
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{FLUX} --ae a", ("sigma", 3.0)),
        (f"{FLUX} --timestep_sampling shift", ("shift", 3.0)),
        (f"{FLUX} --timestep_sampling shift --discrete_flow_shift 3.1582", ("shift", 3.1582)),
        (f"{FLUX} --timestep_sampling sigmoid --sigmoid_scale 0.5", ("sigmoid", None, 0.5)),
        (f"{FLUX} --timestep_sampling uniform --discrete_flow_shift 3", ("uniform", None)),
        (f"{FLUX} --timestep_sampling flux_shift --weighting_scheme logit_normal", ("flux_shift", None)),
        (
            f"{FLUX} --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.7",
            ("logit_normal", 3.0, 1.0, -0.5, 0.7),
        ),
        (
            f"{FLUX} --weighting_scheme mode --mode_scale 0.8 --discrete_flow_shift 1",
            ("mode", 1.0, 1.0, 0.0, 1.0, 0.8),
        ),
        (f"{SD3} --clip_g a", ("uniform", None)),
        (f"{SD3} --training_shift 3", ("sigma", 3.0)),
        (f"{SD3} --weighting_scheme cosmap --training_shift 2", ("sigma", 2.0)),
        (f"{SD3} --weighting_scheme logit_normal --logit_mean 0.5", ("logit_normal", 1.0, 1.0, 0.5)),
        (f"{SD3} --weighting_scheme mode --training_shift 3", ("mode", 3.0)),
    ],
)
def test_noise_levels_are_drawn_as_there(line: str, expected: tuple[Any, ...]) -> None:
    config = train(line)
    wanted = (*expected, *("auto", None, 1.0, 0.0, 1.0, 1.29)[len(expected) :])
    assert tuple(getattr(config, name) for name in NOISE_LEVELS) == wanted


@pytest.mark.parametrize(
    ("line", "prediction", "weights"),
    [
        (FLUX, "sigma_scaled", "none"),
        (f"{FLUX} --weighting_scheme cosmap", "sigma_scaled", "cosmap"),
        (f"{FLUX} --weighting_scheme cosmap --model_prediction_type raw", "raw", "none"),
        (f"{FLUX} --model_prediction_type additive", "additive", "none"),
        (f"{SD3} --weighting_scheme sigma_sqrt", "denoised", "sigma_sqrt"),
        (f"{SD3} --weighting_scheme none", "denoised", "none"),
    ],
)
def test_losses_are_weighed_as_there(line: str, prediction: str, weights: str) -> None:
    config = train(f"{line} --seed 1")
    assert (config.model_prediction_type, config.weighting_scheme) == (prediction, weights)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            f"{FLUX} --timestep_sampling uniform --discrete_flow_shift 3",
            "discrete_flow_shift: without shift or sigma",
        ),
        (f"{FLUX} --timestep_sampling shift --weighting_scheme mode", "weighting_scheme mode: beside"),
        (f"{FLUX} --model_prediction_type raw --weighting_scheme cosmap", "weighting_scheme cosmap: with"),
        (f"{FLUX} --ae a", "timestep_sampling sigma, model_prediction_type sigma_scaled"),
        (f"{FLUX} --ae a", "guidance_scale 3.5"),
        (f"{FLUX} --ae a", "raw is what kohya's documentation advises"),
        (f"{FLUX} --weighting_scheme logit_normal --logit_mean 0.5", "a schedule that falls"),
        (f"{SD3} --clip_g a --mode_scale 1", "mode_scale: without mode"),
        (f"{FLUX} --noise_offset 0.1", "noise_offset 0.1: flux_train_network.py does nothing"),
        (f"{FLUX} --min_timestep 100", "min_timestep 100"),
        (f"{FLUX} --min_snr_gamma 5", "min_snr_gamma 5"),
        (f"{SD3} --ip_noise_gamma 0.1", "ip_noise_gamma 0.1"),
        (f"{SD3} --clip_skip 2", "clip_skip 2"),
    ],
)
def test_what_does_nothing_there_is_said(line: str, said: str) -> None:
    assert said in notes(line)


def test_what_does_nothing_there_does_nothing_here() -> None:
    idle = "--noise_offset 0.1 --min_snr_gamma 5 --clip_skip 2 --max_token_length 225 --v_parameterization"
    assert train(f"{FLUX} --ae a {idle}") == train(f"{FLUX} --ae a")
    assert train(f"{SD3} --clip_g a {idle}") == train(f"{SD3} --clip_g a")
    assert train(f"{SD3} --clip_g a --min_timestep 100").min_timestep == 100
    assert train(f"{FLUX} --ae a --ip_noise_gamma 0.1").ip_noise_gamma == 0.1


@pytest.mark.parametrize("wrong", ["--timestep_sampling logit", "--weighting_scheme min", "--model_type sd"])
def test_a_choice_that_is_none_is_refused_with_those_there_are(wrong: str) -> None:
    error = refusal(f"{FLUX} {wrong}")
    assert error.code == "LG-CFG-003" and "one of" in error.where


def test_schnell_and_chroma_are_told_no_guidance() -> None:
    base = "--pretrained_model_name_or_path"
    assert train(f"{FLUX} {base} flux1-dev.safetensors").guidance_scale == 3.5
    schnell = f"{FLUX} {base} models\\flux1-Schnell.safetensors"
    assert train(schnell).guidance_scale is None and train(f"{schnell} --guidance_scale 1") == train(schnell)
    chroma = (
        f"{FLUX} --model_type chroma --apply_t5_attn_mask --guidance_scale 0.0 --timestep_sampling sigmoid"
    )
    config = train(chroma)
    assert (config.guidance_scale, config.apply_t5_attn_mask) == (None, False)
    assert config.text_encoder_lr is None, "there is no CLIP to train"
    said = notes(f"{chroma} --text_encoder_lr 1e-4 --clip_l x")
    assert "always hidden from Chroma" in said and said.count("Chroma has no CLIP") == 2
    assert "clip_l" not in read_kohya(f"{chroma} --clip_l x").places
    assert "T5 is not trained" in refusal(f"{chroma} --network_args train_t5xxl=True").where
    assert train(f"{FLUX} --apply_t5_attn_mask").apply_t5_attn_mask


# ---- text encoders ----


@pytest.mark.parametrize(
    ("line", "rates"),
    [
        ("train_network.py --text_encoder_lr 5e-5", (5e-5, None, None)),
        (f"{SDXL} --text_encoder_lr 5e-5", (5e-5, None, None)),
        (f"{SDXL} --text_encoder_lr 1e-4 5e-5", (1e-4, 5e-5, None)),
        (f"{SDXL} --text_encoder_lr 5e-5 5e-5", (5e-5, None, None)),
        (f"{SDXL} --unet_lr 1e-4", (None, None, None)),
        (f"{FLUX} --learning_rate 1e-3", (1e-3, None, None)),
        (f"{FLUX} --text_encoder_lr 1e-4 5e-5", (1e-4, None, None)),
        (f"{FLUX} --text_encoder_lr 1e-4 5e-5 --network_args train_t5xxl=True", (1e-4, 5e-5, None)),
        (f"{FLUX} --text_encoder_lr 1e-4 --network_args train_t5xxl=True", (1e-4, 1e-4, None)),
        (f"{FLUX} --network_train_unet_only", (None, None, None)),
        (f"{SD3} --text_encoder_lr 1e-4 5e-5", (1e-4, 5e-5, None)),
        (f"{SD3} --text_encoder_lr 1e-4 5e-5 --network_args train_t5xxl=True", (1e-4, 5e-5, 5e-5)),
        (f"{SD3} --text_encoder_lr 1e-4 5e-5 1e-5 --network_args train_t5xxl=True", (1e-4, 5e-5, 1e-5)),
    ],
)
def test_rates_of_text_encoders(line: str, rates: tuple[float | None, ...]) -> None:
    config = train(line)
    assert (config.text_encoder_lr, config.text_encoder_2_lr, config.text_encoder_3_lr) == rates


def test_more_rates_than_encoders_are_refused() -> None:
    assert "one text encoder" in refusal("train_network.py --text_encoder_lr 1e-4 5e-5").where
    assert "at most 2" in refusal(f"{FLUX} --text_encoder_lr 1e-4 5e-5 1e-5").fix
    assert "each counts" in notes(f"{SDXL} --text_encoder_lr 1e-4 5e-5")


def test_rates_that_adafactor_makes_itself_leave_no_encoder_out_unsaid() -> None:
    line = f"{FLUX} --optimizer_type adafactor"
    assert "relative_step" in refusal(line).fix
    assert train(f"{line} --network_train_unet_only").lr_scheduler == "adafactor"


# ---- networks ----


@pytest.mark.parametrize("case", RANKS, ids=lambda case: f"{case['module']} {' '.join(case['args'])}"[:70])
def test_ranks_are_those_of_kohyas_network(case: dict[str, Any]) -> None:
    program = FLUX if case["module"] == "networks.lora_flux" else SD3
    given = " ".join(f"'{arg}'" for arg in case["args"])
    arguments = f"--network_args {given}" if given else ""
    config = train(
        f"{program} --network_module {case['module']} --network_dim 8 --network_alpha 4 {arguments}"
    )
    every = next(c for c in RANKS if c["module"] == case["module"] and not c["args"])
    chosen = settings_of(config, None)
    found = {}
    for name in every["dims"]:
        rank = chosen.rank_of(Target("denoiser", name.removeprefix("lora_unet_"), name, "linear"))
        found |= {} if rank is None else {name: rank[0]}
        assert rank is None or rank[1] == 4.0
    assert found == case["dims"]
    text = Target("text_encoder", "text_model.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "linear")
    assert (chosen.rank_of(text) or (0,))[0] == 8, "text encoders are trained whatever blocks are"


def test_a_blocks_number_is_the_whole_number() -> None:
    chosen = settings_of(train(f"{FLUX} --network_args train_double_block_indices=1"), None)
    names = {n: f"lora_unet_double_blocks_{n}_img_mlp_0" for n in (1, 10, 11)}
    ranks = {n: chosen.rank_of(Target("denoiser", "x", name, "linear")) for n, name in names.items()}
    assert ranks[1] is not None and ranks[10] is None and ranks[11] is None


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        (f"{FLUX} --network_args split_qkv=True", "LG-IMP-002", "query, key and value"),
        (f"{FLUX} --network_args in_dims=[4,2,2,2,4]", "LG-IMP-002", "in_dims"),
        (f"{SD3} --network_args emb_dims=[2,3,4,5,6,7]", "LG-IMP-002", "emb_dims"),
        (f"{FLUX} --network_args ggpo_sigma=0.03", "LG-IMP-002", "ggpo_sigma"),
        (f"{FLUX} --network_args train_blocks=triple", "LG-CFG-003", "double"),
        (f"{FLUX} --network_args train_double_block_indices=0-99", "LG-CFG-003", "0,2,4-6"),
        (f"{FLUX} --network_args train_double_block_indices=0 network_reg_dims=a=1", "LG-IMP-002", "rank 0"),
        (f"{FLUX} --network_module networks.lora_sd3", "LG-IMP-002", "networks.lora_flux"),
        (f"{SDXL} --network_module networks.lora_flux", "LG-IMP-002", "networks.lora"),
        (f"{FLUX} --network_module networks.oft_flux", "LG-IMP-002", "networks.lora_flux"),
        (f"{FLUX} --network_args down_lr_weight=sine", "LG-IMP-002", "networks.lora"),
        (f"{SD3} --network_args x_attn_dims=4", "LG-CFG-001", "x_attn_dim"),
    ],
)
def test_what_a_network_cannot_have_is_refused(line: str, code: str, named: str) -> None:
    error = refusal(line)
    assert error.code == code and named in str(error)


def test_harmless_keys_of_networks() -> None:
    same = ("split_qkv=False", "in_dims=[0,0,0,0,0]", "train_t5xxl=False", "verbose=True", "train_blocks=all")
    arguments = " ".join(f"'{arg}'" for arg in same)
    assert train(f"{FLUX} --ae a --network_args {arguments}") == train(f"{FLUX} --ae a")
    assert "conv_dim and conv_alpha" in notes(f"{FLUX} --network_args conv_dim=4 conv_alpha=1")


@pytest.mark.parametrize(
    ("arguments", "algo", "preset"),
    [
        ("", "lora", "full-lin"),
        ("algo=lokr factor=4 conv_dim=4", "lokr", "full-lin"),
        ("algo=loha preset=attn-mlp", "loha", "attn-mlp"),
        ("preset=unet-only", "lora", "unet-transformer-only"),
    ],
)
def test_lycoris_on_a_base_without_convolutions(arguments: str, algo: str, preset: str) -> None:
    given = f"--network_args {arguments}" if arguments else ""
    config = train(f"{FLUX} --network_module lycoris.kohya {given}")
    assert (config.algo, config.preset, config.conv_dim) == (algo, preset, None)


# ---- lora-scripts ----


def test_lora_scripts_files_for_sdxl_and_flux() -> None:
    sdxl = read_kohya(
        'model_train_type = "sdxl-lora"\npretrained_model_name_or_path = "sdxl.safetensors"\n'
        'train_data_dir = "d"\nresolution = "1024,1024"\nnetwork_module = "networks.lora"\nclip_skip = 2\n'
        "network_dim = 32\nnetwork_alpha = 32\nunet_lr = 1e-4\ntext_encoder_lr = 1e-5\nno_half_vae = true\n"
    )
    config = api.make_both(sdxl.settings)[1]
    assert (config.text_encoder_lr, config.clip_skip, config.network_dim) == (1e-5, 1, 32)
    flux = read_kohya(
        'model_train_type = "flux-lora"\npretrained_model_name_or_path = "flux1-dev.safetensors"\n'
        'ae = "ae.safetensors"\nclip_l = "clip_l.safetensors"\nt5xxl = "t5xxl.safetensors"\n'
        'train_data_dir = "d"\nresolution = "768,768"\nnetwork_module = "networks.lora_flux"\n'
        'timestep_sampling = "sigmoid"\nsigmoid_scale = 1\nmodel_prediction_type = "raw"\n'
        'discrete_flow_shift = 1\nloss_type = "l2"\nguidance_scale = 1\nnetwork_train_unet_only = true\n'
        "cache_text_encoder_outputs = true\ncache_text_encoder_outputs_to_disk = true\nfp8_base = true\n"
    )
    config = api.make_both(flux.settings)[1]
    assert (config.timestep_sampling, config.model_prediction_type) == ("sigmoid", "raw")
    assert (config.guidance_scale, config.base_storage) == (1.0, "fp8")
    assert set(flux.places) == {
        *("pretrained_model_name_or_path", "train_data_dir", "ae", "clip_l", "t5xxl"),
    }


def test_samples_are_drawn_as_each_script_draws_them() -> None:
    for program, steps, cfg in (("train_network.py", 30, 7.5), (SD3, 30, 7.5), (FLUX, 20, 1.0)):
        found = read_kohya(f"{program} --sample_prompts p.txt --resolution 512").settings
        assert (found["sample_steps"], found["sample_cfg"]) == (steps, cfg)


def test_every_idle_argument_is_one_of_the_table() -> None:
    for script in SCRIPTS.values():
        assert set(script.idle) <= kohya_table.all_arguments()
    assert set(kohya_scripts.LENIENT) <= set(ONLY)


def test_what_was_filled_in_gives_way_to_what_is_said_elsewhere() -> None:
    made = {"timestep_sampling", "discrete_flow_shift", "model_prediction_type", "text_encoder_lr"}
    assert made <= read_kohya(f"{FLUX} --ae a --resolution 512").filled
    given = "--timestep_sampling shift --model_prediction_type raw --text_encoder_lr 1e-4"
    assert not made & read_kohya(f"{FLUX} {given} --resolution 512").filled


def test_block_weights_of_another_base_are_not_sent_to_its_module() -> None:
    arguments = '["down_lr_weight=sine", "mid_lr_weight=2", "up_lr_weight=cosine"]'
    with pytest.raises(LoraGraftError) as caught:
        read_kohya(f'network_module = "networks.lora_flux"\nnetwork_args = {arguments}')
    assert caught.value.code == "LG-IMP-002"
    assert caught.value.fix == "remove it (network_reg_lrs gives rates of blocks by pattern)"
    with pytest.raises(LoraGraftError) as caught:
        read_kohya('network_module = "networks.lora_sd3"\nnetwork_args = ["down_lr_weight=sine"]')
    assert caught.value.fix == "remove it"
