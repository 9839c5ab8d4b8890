"""A peer: peft's LoRA in a plain diffusers loop, eager. `python -m benchmarks.peft_loop JOB.json`.

It starts from our LoRA's start values and is fed our draws, so its losses must be ours, step by step: it
is the check that our faster paths compute the same function. bf16 is done as diffusers' own example
scripts do it: the base in bf16, the adapter in fp32, the forward pass under autocast.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from .common import Work, pack, say_gpu_peak, say_step, say_versions
from .ours import settings

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def main() -> None:
    """Train the job's steps."""
    work = Work.read(sys.argv[1])
    pack()
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from loragraft.trainer import api
    from loragraft.trainer.data.batches import plan_epoch
    from loragraft.trainer.data.cache import TensorCache
    from loragraft.trainer.engine.precision import resolve
    from loragraft.trainer.inputs import Inputs
    from loragraft.trainer.objective import generator

    say_versions("torch", "diffusers", "transformers", "peft")
    device = torch.device(work.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.precision]
    base = api.open_base(work.checkpoint, tokenizer=work.tokenizer)
    parts = base.load()
    parts.denoiser.to(device, dtype)
    parts.text_encoder.to(device, dtype)
    parts.vae.to(device, torch.float32)
    roots = {"denoiser": parts.denoiser}
    targets = {"denoiser": UNET_TARGETS}
    if work.text_encoder:
        roots["text_encoder"] = parts.text_encoder
        targets["text_encoder"] = TEXT_TARGETS
    keys = {(t.part, t.path): t.key for t in base.family.targets(parts, convolutions=False)}
    trained = []
    for part, root in roots.items():
        config = LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=targets[part])
        inject_adapter_in_model(config, root)
        for path, module in root.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                down = module.lora_A["default"].weight
                for weights in (module.lora_A, module.lora_B):
                    weights["default"].float()
                start = torch.rand(
                    (work.rank, down[0].numel()), generator=generator(work.seed, "init", keys[part, path])
                ).view(down.shape)
                down.data.copy_((start * 2 - 1) * down[0].numel() ** -0.5)
                trained += [down, module.lora_B["default"].weight]

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, dtype) if work.precision != "fp32" else contextlib.nullcontext()

    data, config = settings(work)
    train_set = api.build_train_set(api.scan_folder(work.images), data)
    inputs = Inputs(
        base,
        parts,
        train_set,
        config,
        resolve(work.precision, device),
        TensorCache(Path(work.out) / "cache"),
        work.text_encoder,
    )
    for _ in inputs.prepare():
        pass
    del parts.vae  # encoded once; a loop that minds its memory lets go of what it needs no more
    if not work.text_encoder:
        del parts.text_encoders
    optimizer = torch.optim.AdamW(trained, lr=work.learning_rate)
    batches = plan_epoch(train_set, work.batch_size, work.seed, 0)
    for step in range(work.steps):
        fed = inputs.draw(step, 0, batches[step])
        latents, noise, t = (x.to(device) for x in (fed.latents, fed.noise, fed.t))
        noisy = base.family.objective.add_noise(latents, noise, t)
        with autocast():
            (cond,) = inputs.embed(tuple(x.to(device) for x in fed.text))
            pred = parts.denoiser(noisy, t, encoder_hidden_states=cond).sample
        loss = torch.nn.functional.mse_loss(pred.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say_step(step + 1, work.steps, loss.item())
    say_gpu_peak(work.device)


if __name__ == "__main__":
    main()
