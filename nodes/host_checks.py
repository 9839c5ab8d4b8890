"""What is refused before a MODEL, CLIP and VAE are trained on."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management

from ..trainer.errors import LoraGraftError, listed
from .host_names import KNOWN, Known, family_of, text_encoders


def check_base(model: Any, clip: Any, vae: Any) -> Known:
    """Return the family of a base that can be trained; raise LG-NODE-001 to -003 for any other."""
    check_present(model, clip, vae)
    _check_patches(model, "MODEL")
    known = _check_model(model)
    _check_patches(clip.patcher, "CLIP")
    _check_clip(clip, known)
    _check_vae(vae, known)
    _take_all_patches_off(model, clip, vae)
    return known


def check_plain(model: Any, clip: Any, vae: Any) -> None:
    """Raise LG-NODE-002 where a MODEL or CLIP carries patches, and make all hold their plain weights."""
    _check_patches(model, "MODEL")
    _check_patches(clip.patcher, "CLIP")
    _take_all_patches_off(model, clip, vae)


def _take_all_patches_off(model: Any, clip: Any, vae: Any) -> None:
    for socket, patcher in (("MODEL", model), ("CLIP", clip.patcher), ("VAE", vae.patcher)):
        _take_patches_off(patcher, socket)


def check_clip_skip(model: Any, clip: Any, clip_skip: int) -> None:
    """Refuse a layer put on by CLIP Set Last Layer that is not the one captions are trained with."""
    layer = getattr(clip, "layer_idx", None)
    if layer is None:
        return
    without = "link the CLIP without CLIP Set Last Layer"
    known = family_of(model)
    first = known.layer if known else 0
    if first:
        meant = 1 - layer - first  # what clip_skip would be
        unfit, wanted = meant != clip_skip, f"clip_skip is {clip_skip}"
        fix = f"set clip_skip to {meant}, or {without}" if meant > 0 else without
    else:
        own = [encoder.options_default for encoder in text_encoders(clip).values()]
        unfit, wanted = any(o[:2] != ("hidden", layer) for o in own), "this family is trained at its own"
        fix = without
    if unfit:
        raise LoraGraftError(
            "LG-NODE-007",
            f"The CLIP stops at layer {layer}, but {wanted}.",
            where="Train LoRA: clip, clip_skip",
            why="training and sampling would read the captions differently.",
            fix=fix,
        )


def check_present(model: Any, clip: Any, vae: Any) -> None:
    """Raise LG-NODE-001 where one of them is missing."""
    missing = [name for name, value in (("MODEL", model), ("CLIP", clip), ("VAE", vae)) if value is None]
    if vae is not None and getattr(vae, "first_stage_model", None) is None:
        missing.append("VAE")
    if missing:
        raise LoraGraftError(
            "LG-NODE-001",
            f"{' and '.join(missing)} is missing.",
            where="Train LoRA: inputs",
            why="the checkpoint that was loaded does not hold it.",
            fix="load a complete checkpoint, or add a loader for the missing part (Load CLIP, Load VAE)",
        )


def _check_model(model: Any) -> Known:
    config, inner = model.model.model_config, model.model
    known = family_of(model)
    if known is None:
        titles = ", ".join(k.title for k in KNOWN)
        raise _unfit(
            "MODEL",
            f"{type(config).__name__} ({type(inner).__name__})",
            why=f"this release trains {titles}, text to image.",
            fix="load a checkpoint of one of these families, or use Load Demo Base",
        )
    inputs = config.unet_config.get("in_channels")
    if inputs != known.inputs:
        raise _unfit(
            "MODEL",
            f"{known.title} with {inputs} input channels (inpainting, edit, control)",
            why=f"text to image has {known.inputs}: the others are given pictures that training has not.",
            fix=f"load a text-to-image checkpoint of {known.title}",
        )
    return known


def _check_clip(clip: Any, known: Known) -> None:
    found = set(text_encoders(clip))
    wanted = set(known.texts)
    if not found or not found <= wanted or (found != wanted and not known.optional):
        raise _unfit(
            "CLIP",
            f"{type(clip.cond_stage_model).__name__} with {listed(sorted(found)) or 'no text encoder'}",
            why=f"{known.title} reads captions with {listed(known.texts)}.",
            fix="link the checkpoint's own CLIP, or a CLIP loader with the type of this family",
        )


def _check_vae(vae: Any, known: Known) -> None:
    names = vae.first_stage_model.state_dict()
    if vae.latent_channels != known.channels or any(name not in names for name in known.vae):
        raise _unfit(
            "VAE",
            f"{type(vae.first_stage_model).__name__} with {vae.latent_channels} latent channels",
            why=f"{known.title} works on the {known.channels} channels of its own autoencoder.",
            fix="link the checkpoint's own VAE, or Load VAE with this family's complete autoencoder",
        )


def _check_patches(patcher: Any, socket: str) -> None:
    extras = [
        n for n in ("injections", "hook_patches", "weight_wrapper_patches") if getattr(patcher, n, None)
    ]
    if patcher.patches or extras:
        names = listed((k if isinstance(k, str) else k[0] for k in patcher.patches), limit=2) or listed(
            extras
        )
        raise LoraGraftError(
            "LG-NODE-002",
            f"The {socket} already carries a LoRA or another patch.",
            where=f"{socket}: {len(patcher.patches)} patched weights ({names})",
            why="training would see the plain weights, sampling the patched ones: the LoRA would not fit.",
            fix="link the loader's output to Train LoRA, and put other LoRAs behind it",
        )


def _unfit(socket: str, found: str, *, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-NODE-003",
        f"This {socket} is not of a family that can be trained, or not of the MODEL's."
        if socket != "MODEL"
        else "This MODEL is not of a family that can be trained.",
        where=f"{socket}: {found}",
        why=why,
        fix=fix,
    )


def _take_patches_off(patcher: Any, socket: str) -> None:
    """Make the modules hold their plain weights.

    ComfyUI bakes a LoRA into the shared modules while a clone with it is loaded, and leaves it there
    when that clone is gone; unloading puts the plain weights back.
    """
    loaded = list(management.current_loaded_models)
    if any(entry.real_model is not None and entry.real_model() is patcher.model for entry in loaded):
        management.unload_model_and_clones(patcher)
    if patcher.backup:  # the clone's loader entry is dead: put the weights back as its next load would
        patcher.detach()
    if patcher.backup:
        raise LoraGraftError(
            "LG-NODE-002",
            f"The {socket}'s plain weights cannot be had: another node keeps a LoRA baked into them.",
            where=f"{socket}: {len(patcher.backup)} weights are set aside",
            why="training would be done on the patched weights.",
            fix="press Unload Models in ComfyUI, or restart it, and queue again",
        )
