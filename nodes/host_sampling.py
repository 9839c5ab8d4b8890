"""ComfyUI's own sampler and LoRA patcher, called just as its native nodes call them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch

from ..trainer.errors import LoraGraftError, listed, nearest

# What stands behind a module's name in a file: of LoRA, DoRA, LoHa, LoKr, GLoRA, OFT, IA3, or differences.
TENSOR = re.compile(
    r"\.(alpha|dora_scale|lora_(up|down|mid|A|B)\.weight|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)"
    r"|[ab][12]\.weight|oft_blocks|rescale|on_input|weight|diff|diff_b|[wb]_norm)$"
)
ATTACHMENT = "loragraft"  # marks a MODEL or CLIP that Train LoRA already put its LoRA on

samplers: list[str] = comfy.samplers.KSampler.SAMPLERS
schedulers: list[str] = comfy.samplers.KSampler.SCHEDULERS


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Read a LoRA file as the native loader does: its tensors and its metadata."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return tensors, metadata


def apply_lora(
    model: Any,
    clip: Any,
    lora: tuple[dict[str, torch.Tensor], Any],
    strength_model: float,
    strength_clip: float,
    name: str,
) -> tuple[Any, Any]:
    """Return clones of MODEL and CLIP with the LoRA on them, as the native Load LoRA makes them.

    Raises LG-NODE-009 where a module of the file has no place in this MODEL and CLIP.
    """
    tensors, metadata = lora
    unmatched = unmatched_modules(model, clip, tensors)
    if unmatched:
        raise LoraGraftError(
            "LG-NODE-009",
            f"{len(unmatched)} modules of {name[:60]} fit nothing in this model.",
            where=listed(unmatched, limit=4),
            why="the LoRA was trained on another architecture, and these parts would be left out in silence.",
            fix="use the LoRA with the kind of checkpoint that it was trained on",
        )
    if strength_model == 0 and strength_clip == 0:
        return model, clip
    return comfy.sd.load_lora_for_models(
        model, clip, tensors, strength_model, strength_clip, lora_metadata=metadata
    )


def unmatched_modules(model: Any, clip: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    """List the module names in a LoRA file that ComfyUI's key maps do not know."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    names = dict.fromkeys(TENSOR.sub("", k) for k in tensors)
    return [n for n in names if n not in keys]


def mark(model: Any, clip: Any, name: str) -> None:
    """Note on a MODEL and CLIP that they carry the trained LoRA ``name``."""
    model.set_attachments(ATTACHMENT, name)
    clip.patcher.set_attachments(ATTACHMENT, name)


def marked(model: Any, clip: Any) -> str | None:
    """Return the name of the trained LoRA that MODEL or CLIP carries, or None."""
    found = model.get_attachment(ATTACHMENT) or clip.patcher.get_attachment(ATTACHMENT)
    return str(found) if found else None


def check_sampler(sampler: str, scheduler: str) -> None:
    """Refuse a sampler or scheduler that this ComfyUI does not have."""
    for widget, value, known in (("sampler_name", sampler, samplers), ("scheduler", scheduler, schedulers)):
        if value not in known:
            guess = nearest(value, known)
            raise LoraGraftError(
                "LG-NODE-014",
                f"{widget} {value[:40]!r} does not exist.",
                where=f"Preview with LoRA: {widget}",
                why="this ComfyUI has no such entry.",
                fix=f"choose {guess[0] if guess else known[0]!r} or another one of the list",
            )


def encode_text(clip: Any, text: str) -> Any:
    """Return the conditioning of a prompt, as CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def draw(
    model: Any,
    positive: Any,
    negative: Any,
    seed: int,
    on_step: Callable[[int, Any], None],
    *,
    sampler_name: str,
    scheduler: str,
    steps: int,
    cfg: float,
    width: int,
    height: int,
    batch_size: int,
) -> torch.Tensor:
    """Sample latents (batch, 4, height/8, width/8) as EmptyLatentImage and KSampler do.

    ``on_step`` gets the number of steps done and a preview, or None, in the host's own form.
    """
    latent = torch.zeros(
        [batch_size, 4, height // 8, width // 8],
        device=management.intermediate_device(),
        dtype=management.intermediate_dtype(),
    )
    latent = comfy.sample.fix_empty_latent_channels(model, latent, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        on_step(step + 1, previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None)

    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent,
        denoise=1.0,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents into images (batch, height, width, 3) in [0, 1], as VAEDecode does."""
    images: torch.Tensor = vae.decode(latents)
    return images.flatten(0, 1) if images.ndim == 5 else images  # of a video, its frames
