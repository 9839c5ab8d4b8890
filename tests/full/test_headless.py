"""SD1.5's true structure headless: it loads from its single file, trains, and diffusers takes the LoRA."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from loragraft.trainer import api
from loragraft_tests.full.common import MODULES, TOLERANCE, Trained

pytestmark = pytest.mark.full

FILE_MB = 37.7  # at dim 32 in fp16


def test_every_weight_is_used_as_it_is(base: api.Base) -> None:
    parts = base.load()
    counts = [len(base.state_dicts[name]) for name in ("denoiser", "vae", "text_encoder")]
    assert counts == [686, 248, 196]
    loaded = parts.denoiser.state_dict()
    assert all(
        torch.equal(loaded[k], v) and v.dtype == torch.float16
        for k, v in base.state_dicts["denoiser"].items()
    )


def test_two_steps_train_all_modules(trained: Trained) -> None:
    planned = next(e for e in trained.events if isinstance(e, api.Planned))
    steps = [e for e in trained.events if isinstance(e, api.Step)]
    saved = [e for e in trained.events if isinstance(e, api.Saved)]
    assert planned.num_modules == MODULES
    assert len(steps) == 2 and all(math.isfinite(s.loss) and 0.5 < s.loss < 5 for s in steps)
    assert saved[-1].zero_tensors == 0 and saved[-1].num_tensors == 3 * MODULES


def test_the_file_has_the_usual_size(trained: Trained) -> None:
    assert trained.lora.stat().st_size / 1e6 == pytest.approx(FILE_MB, abs=0.2)
    assert {t.dtype for t in api.lora_tensors(trained.lora).values()} == {torch.float16}


def test_diffusers_applies_every_module_equally(base: api.Base, trained: Trained) -> None:
    """``load_lora_weights`` finds all modules, and the change of each weight is alpha/rank * up @ down."""
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft: pip install peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = base.load()
    keys = {(t.part, t.path): t.key for t in base.family.targets(parts, convolutions=False)}
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(str(trained.lora.parent), weight_name=trained.lora.name, adapter_name="ours")
    file = api.lora_tensors(trained.lora)
    errors = {}
    for part, root in (("denoiser", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for path, module in root.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            key = keys.pop((part, path))
            theirs = module.get_delta_weight("ours").detach().double()
            up, down = (file[f"{key}.lora_{n}.weight"].double().flatten(1) for n in ("up", "down"))
            ours = (float(file[f"{key}.alpha"]) / down.shape[0] * (up @ down)).reshape(theirs.shape)
            assert float(ours.norm()) > 0
            errors[key] = float((theirs - ours).norm() / ours.norm())
    assert keys == {}, f"diffusers left {len(keys)} modules out"
    assert len(errors) == MODULES
    worst = max(errors, key=lambda k: errors[k])
    print(f"diffusers: {len(errors)} modules, largest relative difference {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= TOLERANCE


def test_the_checkpoint_is_not_written_to(base: api.Base, trained: Trained, checkpoint: Path) -> None:
    fresh = api.open_base(checkpoint, tokenizer=base.tokenizer_folders["clip"])
    assert fresh.weights_hash == base.weights_hash
