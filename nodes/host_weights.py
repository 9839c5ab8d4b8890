"""The weights of a MODEL, CLIP and VAE as views that training can use, and the base they make.

Nothing here writes to a weight. ComfyUI loads weights inside inference mode, and on a GPU it may
keep them as read-only pages of the file: a view shares the storage, it never changes it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..trainer import api
from ..trainer.errors import LoraGraftError
from .host_checks import check_base
from .host_names import SD15, Known, text_encoders, tokenizer_folders
from .host_prediction import prediction

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What ComfyUI's text encoders hold beside the weights of a checkpoint. It fills in a projection where the
# file has none, and uses that of one encoder alone.
NOT_STORED = ("logit_scale", "position_ids")
PROJECTION, PROJECTED = "text_projection.weight", ("clip_g",)


def open_base(model: Any, clip: Any, vae: Any) -> api.Base:
    """Open the base that MODEL, CLIP and VAE make, on their own storage; its hash is remembered.

    Raises LG-NODE-001 to -008 for a base that cannot be trained.
    """
    known = check_base(model, clip, vae)
    weights = dict(shared_weights(model, clip, vae, known))
    encoders = [encoder.transformer for encoder in text_encoders(clip).values()]
    modules = (model.model.diffusion_model, *encoders, vae.first_stage_model)
    velocity, zero_terminal = prediction(model)
    return api.open_base_from_weights(
        weights,
        name=base_name(model),
        tokenizers=tokenizer_folders(clip),
        weights_hash=_hashes.find(modules, weights),
        velocity=velocity,
        zero_terminal=zero_terminal,
    )


def shared_weights(model: Any, clip: Any, vae: Any, known: Known) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield single-file names with views on the host's storage, out of inference mode."""
    parts = [("MODEL", "model.diffusion_model.", model.model.diffusion_model, True)]
    for name, encoder in text_encoders(clip).items():
        prefix = "cond_stage_model." if known is SD15 else f"text_encoders.{name}."
        parts.append(("CLIP", f"{prefix}transformer.", encoder.transformer, name in PROJECTED))
    parts.append(("VAE", "first_stage_model.", vae.first_stage_model, True))
    for socket, prefix, module, projected in parts:
        for name, weight in module.state_dict().items():
            if not name.endswith(NOT_STORED) and (projected or name != PROJECTION):
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


class _Hashes:
    """The content hash of bases seen, as long as ComfyUI keeps their modules."""

    def __init__(self) -> None:
        # first module -> the others, a probe of all values, the hash
        self._known: weakref.WeakKeyDictionary[nn.Module, list[tuple[tuple[Any, ...], str, str]]] = (
            weakref.WeakKeyDictionary()
        )

    def find(self, modules: Sequence[nn.Module], weights: dict[str, torch.Tensor]) -> str:
        """Return the hash of ``weights``, computed once for the same modules with the same values."""
        first, *others = modules
        entries = self._known.setdefault(first, [])
        probe = _probe(weights)
        for known, known_probe, known_hash in entries:
            if known_probe == probe and _same(known, others):
                return known_hash
        value = api.hash_weights(weights)
        entries[:] = [e for e in entries if all(module() is not None for module in e[0])]
        entries.append((tuple(weakref.ref(module) for module in others), probe, value))
        return value


_hashes = _Hashes()


def _same(known: Sequence[Any], modules: Sequence[nn.Module]) -> bool:
    return len(known) == len(modules) and all(k() is m for k, m in zip(known, modules, strict=True))


def _probe(weights: dict[str, torch.Tensor]) -> str:
    """Hash a few values of every weight, in milliseconds: a change made in place is noticed."""
    digest = hashlib.sha256()
    pieces = [w.reshape(-1)[:: max(1, w.numel() // 16)][:16].float().flatten() for w in weights.values()]
    for device in {p.device for p in pieces}:
        digest.update(torch.cat([p for p in pieces if p.device == device]).cpu().numpy().tobytes())
    digest.update(repr([(k, tuple(w.shape), str(w.dtype)) for k, w in weights.items()]).encode())
    return digest.hexdigest()
