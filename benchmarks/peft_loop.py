"""A peer: peft's LoRA in a plain loop, eager. `python -m benchmarks.peft_loop JOB.json`.

The denoiser is diffusers' own class where the family has one, and for Flux the one with the fused layers of
its single file, so that the LoRA is the same as ours and kohya's ("diffusers loop": see `diffusers_flux`).
The loop starts from our LoRA's start values and is fed our draws, so its losses must be ours, step by step:
it is the check that our faster paths compute the same function. bf16 is done as diffusers' own example
scripts do it: the base in bf16, the adapter in fp32, the forward pass under autocast.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .common import Work, open_base, pack, say_gpu_peak, say_step, say_versions
from .ours import settings


def main() -> None:
    """Train the job's steps."""
    work = Work.read(sys.argv[1])
    pack()
    import torch

    from loragraft.trainer import api
    from loragraft.trainer.data.batches import plan_epoch
    from loragraft.trainer.data.cache import TensorCache
    from loragraft.trainer.engine.precision import resolve
    from loragraft.trainer.inputs import Inputs
    from loragraft.trainer.usual import for_base

    say_versions("torch", "diffusers", "transformers", "peft")
    device = torch.device(work.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.precision]
    base = open_base(work)
    parts = base.load()
    if work.settings.get("diffusers"):
        from .diffusers_flux import DiffusersFlux

        parts.denoiser = DiffusersFlux(parts.denoiser)
    parts.denoiser.to(device, dtype)
    parts.text_encoders.to(device, dtype)
    parts.vae.to(device, torch.float32)
    trained = inject_anew(work, parts) if work.settings.get("diffusers") else inject(work, base, parts)

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, dtype) if work.precision != "fp32" else contextlib.nullcontext()

    data, config = settings(replace(work, settings={}))
    config, _ = for_base(config, base)
    train_set = api.build_train_set(api.scan_folder(work.images), data)
    inputs = Inputs(
        base,
        parts,
        train_set,
        config,
        resolve(work.precision, device),
        TensorCache(Path(work.out) / "cache"),
        work.text_encoder,
        work.steps,
    )
    for _ in inputs.prepare():
        pass
    del parts.vae  # encoded once; a loop that minds its memory lets go of what it needs no more
    if not work.text_encoder:
        del parts.text_encoders
    family = base.family
    optimizer = torch.optim.AdamW(trained, lr=work.learning_rate)
    batches = plan_epoch(train_set, work.batch_size, work.seed, 0)
    for step in range(work.steps):
        fed = inputs.draw(step, 0, batches[step])
        latents, noise, t = (x.to(device) for x in (fed.latents, fed.noise, fed.t))
        sizes = None if fed.sizes is None else fed.sizes.to(device)
        noisy = family.objective.add_noise(latents, noise, t)
        with autocast():
            cond = inputs.embed(tuple(x.to(device) for x in fed.text))
            pred = family.predict(parts, noisy, t, cond, sizes, config.guidance_scale)
        target = family.objective.target(latents, noise, t)
        loss = torch.nn.functional.mse_loss(pred.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say_step(step + 1, work.steps, loss.item())
    say_gpu_peak(work.device)


def inject(work: Work, base: Any, parts: Any) -> list[Any]:
    """Put peft's LoRA on the layers that ours trains, with our start values; return what is trained."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from loragraft.trainer.objective import generator

    targets = base.family.targets(parts, convolutions=False)
    roots = {"denoiser": parts.denoiser}
    if work.text_encoder:
        roots |= dict(parts.text_encoders.items())
    trained = []
    for part, root in roots.items():
        keys = {target.path: target.key for target in targets if target.part == part}
        inject_adapter_in_model(
            LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=list(keys)), root
        )
        for path, module in root.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                down, up = module.lora_A["default"], module.lora_B["default"]
                down.float(), up.float()
                drawn = generator(work.seed, "init", keys[path])
                start = torch.rand((work.rank, down.weight[0].numel()), generator=drawn)
                bound = down.weight[0].numel() ** -0.5
                down.weight.data.copy_((start.view(down.weight.shape) * 2 - 1) * bound)
                trained += [down.weight, up.weight]
    return trained


def inject_anew(work: Work, parts: Any) -> list[Any]:
    """Put peft's LoRA with its own start values on the layers of diffusers' transformer."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from .diffusers_flux import TARGETS

    torch.manual_seed(work.seed)
    inject_adapter_in_model(
        LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=TARGETS), parts.denoiser
    )
    trained = [p for name, p in parts.denoiser.named_parameters() if ".lora_" in name]
    for weight in trained:
        weight.data = weight.data.float()
    return trained


if __name__ == "__main__":
    main()
