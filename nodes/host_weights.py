"""The weights of a MODEL, CLIP and VAE as views that training can use, and the base they make.

Nothing here writes to a weight. ComfyUI loads weights inside inference mode, and on a GPU it may
keep them as read-only pages of the file: a view shares the storage, it never changes it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import torch
from torch import nn

from ..trainer import api
from ..trainer.errors import LoraGraftError, listed

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Parts of a state dict that are no weights of a single-file checkpoint.
NOT_STORED = ("text_projection.weight", "logit_scale", "position_ids")


def open_base(model: Any, clip: Any, vae: Any) -> api.Base:
    """Open the base that MODEL, CLIP and VAE make, on their own storage; its hash is remembered.

    Raises LG-NODE-001 to -008 for a base that cannot be trained.
    """
    _check_present(model, clip, vae)
    _check_model(model)
    _check_clip(clip)
    _check_vae(vae)
    for socket, patcher in (("MODEL", model), ("CLIP", clip.patcher), ("VAE", vae.patcher)):
        _take_patches_off(patcher, socket)
    weights = dict(shared_weights(model, clip, vae))
    modules = (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model)
    return api.open_base_from_weights(
        weights,
        name=base_name(model),
        tokenizer=tokenizer_folder(clip),
        weights_hash=_hashes.find(modules, weights),
    )


def shared_weights(model: Any, clip: Any, vae: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield SD1.5's single-file names with views on the host's storage, out of inference mode."""
    text = clip.cond_stage_model.clip_l.transformer
    parts = (
        ("MODEL", "model.diffusion_model.", model.model.diffusion_model),
        ("CLIP", "cond_stage_model.transformer.", text),
        ("VAE", "first_stage_model.", vae.first_stage_model),
    )
    for socket, prefix, module in parts:
        for name, weight in module.state_dict().items():
            if not name.endswith(NOT_STORED):
                yield prefix + name, shared(weight, socket, name)


def shared(weight: torch.Tensor, socket: str, name: str) -> torch.Tensor:
    """Return a normal tensor on the storage of ``weight``; refuse what is no plain floating-point weight."""
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in FLOATS:
        kind = str(weight.dtype).removeprefix("torch.")
        raise LoraGraftError(
            "LG-NODE-004",
            f"The {socket} is quantised ({type(weight).__name__}, {kind}).",
            where=f"{socket}: {name}",
            why="a quantised (fp8, GGUF, int8, fp4) base cannot be trained on in this release.",
            fix="load the fp16, bf16 or fp32 version of this checkpoint with the ordinary loader",
        )
    if weight.device.type == "meta":
        raise LoraGraftError(
            "LG-NODE-005",
            f"The {socket} lacks weights.",
            where=f"{socket}: {name}",
            why="its loader left them out, or another extension keeps them elsewhere.",
            fix="load a complete checkpoint with ComfyUI's own loader",
        )
    with torch.inference_mode(False):
        # An inference tensor cannot be saved for backward; a new tensor on the same storage can.
        view = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return view.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())


def base_name(model: Any) -> str:
    """Return the name of the file that the MODEL was loaded from; "comfyui" where its loader does not "
    "tell."""
    init = getattr(model, "cached_patcher_init", None)
    source = init[1][0] if init and len(init) > 1 and init[1] else None
    return Path(source).stem if isinstance(source, str) else "comfyui"


def token_counter(clip: Any) -> Callable[[str], int] | None:
    """Return a function that counts a caption's tokens as this CLIP does; None where that is not known."""
    inner = getattr(clip.tokenizer, getattr(clip.tokenizer, "clip", ""), None)
    tokenizer = getattr(inner, "tokenizer", None)
    if tokenizer is None:
        return None
    return lambda text: max(0, len(tokenizer(text)["input_ids"]) - 2)


def tokenizer_folder(clip: Any) -> Path:
    """Return the folder that this CLIP's own tokenizer was read from."""
    inner = getattr(clip.tokenizer, getattr(clip.tokenizer, "clip", ""), None)
    folder = Path(str(getattr(getattr(inner, "tokenizer", None), "name_or_path", "")))
    if not ((folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file()):
        raise LoraGraftError(
            "LG-NODE-008",
            "The CLIP's tokenizer cannot be found.",
            where=f"CLIP: {type(inner).__name__}",
            why="captions must be read with the words that this text encoder knows.",
            fix="load the CLIP with ComfyUI's own loader",
        )
    return folder


# ---- checks ----


def _check_present(model: Any, clip: Any, vae: Any) -> None:
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


def _check_model(model: Any) -> None:
    _check_patches(model, "MODEL")
    config, inner = model.model.model_config, model.model
    if type(inner) is not comfy.model_base.BaseModel or not isinstance(config, comfy.supported_models.SD15):
        raise _family("MODEL", f"{type(config).__name__} ({type(inner).__name__})")
    if config.unet_config.get("in_channels") != 4:
        raise _family(
            "MODEL", f"SD1.x with {config.unet_config.get('in_channels')} input channels (inpainting, edit)"
        )


def _check_clip(clip: Any) -> None:
    _check_patches(clip.patcher, "CLIP")
    inner = clip.cond_stage_model
    if getattr(inner, "clip", None) != "clip_l" or not hasattr(inner, "clip_l"):
        raise _family("CLIP", type(inner).__name__)


def _check_vae(vae: Any) -> None:
    names = vae.first_stage_model.state_dict()
    if (
        "encoder.conv_in.weight" not in names
        or "post_quant_conv.weight" not in names
        or vae.latent_channels != 4
    ):
        raise _family(
            "VAE", f"{type(vae.first_stage_model).__name__} with {vae.latent_channels} latent channels"
        )


def check_clip_skip(clip: Any, clip_skip: int) -> None:
    """Refuse a clip_skip other than the one that a CLIP Set Last Layer node put on the CLIP."""
    layer = getattr(clip, "layer_idx", None)
    if layer is not None and -layer != clip_skip:
        raise LoraGraftError(
            "LG-NODE-007",
            f"The CLIP stops at layer {layer}, but clip_skip is {clip_skip}.",
            where="Train LoRA: clip, clip_skip",
            why="training and sampling would read the captions differently.",
            fix=f"set clip_skip to {-layer}, or link the CLIP without CLIP Set Last Layer",
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


def _family(socket: str, found: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-NODE-003",
        f"This {socket} is not of a family that can be trained.",
        where=f"{socket}: {found}",
        why="this release trains SD1.x text-to-image models.",
        fix="load an SD1.x checkpoint, or use Load Demo Base",
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


# ---- the remembered hash ----


class _Hashes:
    """The content hash of bases seen, as long as ComfyUI keeps their modules."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, Any, str, str]]] = (
            weakref.WeakKeyDictionary()
        )

    def find(self, modules: tuple[nn.Module, nn.Module, nn.Module], weights: dict[str, torch.Tensor]) -> str:
        """Return the hash of ``weights``, computed once for the same modules with the same values."""
        denoiser, text, vae = modules
        entries = self._known.setdefault(denoiser, [])
        probe = _probe(weights)
        for known_text, known_vae, known_probe, known_hash in entries:
            if known_text() is text and known_vae() is vae and known_probe == probe:
                return known_hash
        value = api.hash_weights(weights)
        entries[:] = [e for e in entries if e[0]() is not None and e[1]() is not None]
        entries.append((weakref.ref(text), weakref.ref(vae), probe, value))
        return value


_hashes = _Hashes()


def _probe(weights: dict[str, torch.Tensor]) -> str:
    """Hash a few values of every weight, in milliseconds: a change made in place is noticed."""
    digest = hashlib.sha256()
    pieces = [w.reshape(-1)[:: max(1, w.numel() // 16)][:16].float().flatten() for w in weights.values()]
    for device in {p.device for p in pieces}:
        digest.update(torch.cat([p for p in pieces if p.device == device]).cpu().numpy().tobytes())
    digest.update(repr([(k, tuple(w.shape), str(w.dtype)) for k, w in weights.items()]).encode())
    return digest.hexdigest()
