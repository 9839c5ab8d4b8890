"""Steps on a device that is not the CPU: nothing mixes devices, reads on the host or copies from it.

A CUDA graph can hold no such thing, and an uncaptured step would wait for it. The device has no kernels:
tensors have shapes, dtypes and places only, so this says nothing about values. Checkpointed blocks are left
out: with a device written in Python, their backward pass ends the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from loragraft_tests.trainer import tiny_families

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
CHILD = Path(__file__).with_name("second_device_child.py")
UNETS = ("sd15", "sd2", "sdxl")
Case = dict[str, Any]


def cases_of(family: str) -> dict[str, Case]:
    """Return the settings that a family's steps are taken with, by names."""
    bf16: Case = {"mixed_precision": "bf16", "network_train_unet_only": True}
    found: dict[str, Case] = {
        "fp32": {},
        "bf16": bf16,
        "fp8": {**bf16, "base_storage": "fp8"},
        "nf4": {**bf16, "base_storage": "nf4"},
        "int8": {"base_storage": "int8"},
        "shared weights": {**bf16, "shared": True},
        "dora": {"dora_wd": True, **bf16},
        "lokr": {"algo": "lokr", "factor": 2, **bf16},
        "loha": {"algo": "loha"},
        "glora": {"algo": "glora"},
        "oft": {"algo": "oft"},
        "full": {"algo": "full"},
        "huber": {"loss_type": "huber", "huber_schedule": "exponential"},
        "perturbed": {"ip_noise_gamma": 0.1},
        "deterministic": {"deterministic": True},
    }
    if trains_text(family):
        found["text encoders"] = {"mixed_precision": "bf16", "text_encoder_lr": 1e-3}
    if family in UNETS:
        found |= {
            "locon": {"conv_dim": 2, "conv_alpha": 1, "mixed_precision": "bf16"},
            "min-snr": {"min_snr_gamma": 5.0, "debiased_estimation_loss": True},
            "velocity": {"v_parameterization": True, "scale_v_pred_loss_like_noise_pred": True},
            "zero terminal": {"v_parameterization": True, "zero_terminal_snr": True, "min_snr_gamma": 5.0},
            "huber by snr": {"loss_type": "smooth_l1", "huber_schedule": "snr"},
        }
    else:
        found |= {
            "sigma_sqrt": {"weighting_scheme": "sigma_sqrt", "model_prediction_type": "denoised"},
            "cosmap": {"weighting_scheme": "cosmap", "model_prediction_type": "additive"},
        }
    return found


def trains_text(family: str) -> bool:
    """Say whether people train the family's text encoders."""
    from loragraft.trainer import api

    return api.FAMILIES[family].trains_text


QUICK = [
    ("sdxl", "min-snr"),
    ("sd35_medium", "bf16"),
    ("flux", "fp8"),
    ("z_image", "bf16"),
]


def seen(folder: Path, cases: list[Case]) -> list[Case]:
    """Run cases in a process of their own; return what each showed."""
    argv = [sys.executable, str(CHILD), str(folder), json.dumps(cases)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


BROKEN = {
    "reads": "DataDependentOutputException",
    "mixes": "devices",
    "copies": "_to_copy between cpu and second",
    "draws": "randn_like draws",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Return what some families' steps showed, and then what steps that are wrong did."""
    cases = [{"family": family, "settings": cases_of(family)[name]} for family, name in QUICK]
    cases += [{"family": "flux", "settings": {}, "broken": how} for how in BROKEN]
    return seen(tmp_path_factory.mktemp("second"), cases)


def test_steps_stay_on_their_device(quick: list[Case]) -> None:
    for names, found in zip(QUICK, quick[: len(QUICK)], strict=True):
        assert found["faults"] == [], names
        assert found["engine"] == "fused", names
        assert found["kernels"] > 100, names


def test_what_no_captured_step_may_do_is_seen(quick: list[Case]) -> None:
    for found, (how, word) in zip(quick[len(QUICK) :], BROKEN.items(), strict=True):
        assert any(word in fault for fault in found["faults"]), (how, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_families.WEIGHTS)
def test_every_familys_steps_stay_on_their_device(tmp_path: Path, family: str) -> None:
    named = cases_of(family)
    found = seen(tmp_path, [{"family": family, "settings": settings} for settings in named.values()])
    faults = {name: each["faults"] for name, each in zip(named, found, strict=True) if each["faults"]}
    assert faults == {}
