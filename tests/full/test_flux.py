"""Flux.1 dev at its true width with two blocks of each kind: a host's weights are shared, and it trains."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.families.modules.flux_blocks import FluxTransformer
from loragraft.trainer.families.names.flux_keys import CLIP_PREFIX, T5_PREFIX
from loragraft.trainer.families.names.ldm_keys import UNET_PREFIX
from loragraft.trainer.families.names.ldm_vae import join_vae
from loragraft_tests.trainer import tiny, tiny_flux, tiny_t5

pytestmark = pytest.mark.full

WIDTH, TEXT, POOLED = 3072, 4096, 768
SIDE, TOKENS = 256, 64
MODULES = 2 * 10 + 2 * 3
GROWTH_MB = 100


def resident_mb() -> float:
    """Return how much memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def filled(named: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random weights for meta tensors: norms at 1, biases at 0, the rest by fan-in."""
    drawn = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in named.items():
        values = torch.empty(shape.shape, dtype=dtype)
        if shape.ndim == 1:
            values.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            bound = shape[0].numel() ** -0.5
            values.uniform_(-bound, bound, generator=drawn)
        weights[name] = values
    return weights


def as_comfyui_holds_them() -> dict[str, torch.Tensor]:
    """Return weights under the names of ComfyUI's modules; text encoders are as wide, not as deep."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        flux = FluxTransformer(
            width=WIDTH,
            heads=24,
            inside=4 * WIDTH,
            channels=64,
            context=TEXT,
            pooled=POOLED,
            double=2,
            single=2,
            guided=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=POOLED,
                intermediate_size=4 * POOLED,
                num_hidden_layers=2,
                num_attention_heads=12,
                eos_token_id=tiny.VOCABULARY - 1,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=tiny_t5.VOCABULARY,
                d_model=TEXT,
                d_kv=64,
                d_ff=1024,
                num_layers=1,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
    weights = filled({UNET_PREFIX + k: v for k, v in flux.state_dict().items()}, torch.bfloat16)
    of_vae = filled(vae.state_dict(), torch.float32)
    joined = join_vae(of_vae)
    weights |= {k: joined[k] for k in joined}
    texts = {
        f"{CLIP_PREFIX}{k if k.startswith('text_model.') else f'text_model.{k}'}": v
        for k, v in clip.state_dict().items()
        if not k.endswith("position_ids")
    }
    texts |= {T5_PREFIX + k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k}
    return weights | filled(texts, torch.bfloat16)


@pytest.fixture(scope="module")
def held() -> dict[str, torch.Tensor]:
    """Return the weights that a host holds, 2.5 GB."""
    return as_comfyui_holds_them()


@pytest.fixture(scope="module")
def flux(held: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return the opened base model."""
    folders = tiny_flux.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return api.open_base_from_weights(held, name="wide", tokenizers=folders.by_kind)


def test_the_hosts_memory_is_shared(held: dict[str, torch.Tensor], flux: api.Base) -> None:
    gc.collect()
    before = resident_mb()
    parts = flux.load()
    grown = resident_mb() - before
    print(f"{sum(t.nbytes for t in held.values()) / 2**20:.0f} MB are shared; {grown:.0f} MB more are held")
    assert grown < GROWTH_MB
    known = {tensor.data_ptr() for tensor in held.values()}
    modules = (parts.denoiser, parts.vae, *parts.text_encoders.values())
    assert all(p.data_ptr() in known for module in modules for p in module.parameters())


def test_a_step_trains_every_module(flux: api.Base, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images" / "1_zibu", [(SIDE, SIDE)])
    data = api.make(api.DatasetConfig, {"resolution": SIDE})
    train_set = api.build_train_set(api.scan_folder(tmp_path / "images"), data)
    settings: dict[str, Any] = {
        "output_name": "wide",
        "network_dim": 16,
        "learning_rate": 1e-4,
        "max_train_steps": 1,
        "mixed_precision": "bf16",
        "t5xxl_max_token_length": TOKENS,
        "preview_image": False,
    }
    places = api.Places(tmp_path / "runs", tmp_path / "loras", tmp_path / "cache")
    config = api.make(api.TrainConfig, settings)
    events = list(api.train(flux, train_set, config, places=places, device="cpu"))
    (step,) = (e for e in events if isinstance(e, api.Step))
    planned = next(e for e in events if isinstance(e, api.Planned))
    saved = [e for e in events if isinstance(e, api.Saved)]
    peak = _peak_mb()
    print(f"one step at {SIDE}: loss {step.loss:.3f}, at most {peak:.0f} MB held")
    assert planned.num_modules == MODULES
    assert math.isfinite(step.loss) and 0.1 < step.loss < 10
    assert saved[-1].num_tensors == 3 * MODULES and saved[-1].zero_tensors == 0
    assert peak < 24 * 1024


def _peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
