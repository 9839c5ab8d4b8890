"""The weights of a MODEL, CLIP and VAE as views that training can use, and the base they make.

Nothing here writes to a weight. ComfyUI loads weights inside inference mode, and on a GPU it may
keep them as read-only pages of the file: a view shares the storage, it never changes it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..trainer import api
from ..trainer.engine.packed_tensor import PackedTensor
from .host_checks import check_base
from .host_names import SD15, Known, text_encoders, tokenizer_folders
from .host_packed import shared, stored
from .host_prediction import prediction

# What ComfyUI's text encoders hold beside the weights of a checkpoint. It fills in a projection where the
# file has none, and uses that of one encoder alone.
NOT_STORED = ("logit_scale", "position_ids", "num_batches_tracked")
PROJECTION, PROJECTED = "text_projection.weight", ("clip_g",)


def open_known(model: Any, clip: Any, vae: Any) -> api.Base:
    """Open a base of one of the trainer's families on the weights of MODEL, CLIP and VAE.

    Its hash is remembered. Raises LG-NODE-001 to -008 for a base that cannot be trained.
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
        weights_hash=hashes.find(modules, weights, lambda: api.hash_weights(weights)),
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
        for name, weight in stored(module):
            if not name.endswith(NOT_STORED) and (projected or name != PROJECTION):
                yield prefix + name, shared(weight, socket, name)


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

    def find(
        self, modules: Sequence[nn.Module], weights: dict[str, torch.Tensor], computed: Callable[[], str]
    ) -> str:
        """Return the hash of ``weights``, ``computed`` once for the same modules with the same values."""
        first, *others = modules
        entries = self._known.setdefault(first, [])
        probe = _probe(weights)
        for known, known_probe, known_hash in entries:
            if known_probe == probe and _same(known, others):
                return known_hash
        value = computed()
        entries[:] = [e for e in entries if all(module() is not None for module in e[0])]
        entries.append((tuple(weakref.ref(module) for module in others), probe, value))
        return value


hashes = _Hashes()


def _same(known: Sequence[Any], modules: Sequence[nn.Module]) -> bool:
    return len(known) == len(modules) and all(k() is m for k, m in zip(known, modules, strict=True))


def _probe(weights: dict[str, torch.Tensor]) -> str:
    """Hash a few values of every weight, in milliseconds: a change made in place is noticed."""
    digest = hashlib.sha256()
    held = [tensor for weight in weights.values() for tensor in _held(weight)]
    pieces = [w.reshape(-1)[:: max(1, w.numel() // 16)][:16].float().flatten() for w in held]
    for device in {p.device for p in pieces}:
        digest.update(torch.cat([p for p in pieces if p.device == device]).cpu().numpy().tobytes())
    digest.update(repr([(k, tuple(w.shape), str(w.dtype)) for k, w in weights.items()]).encode())
    return digest.hexdigest()


def _held(weight: torch.Tensor) -> list[torch.Tensor]:
    return list(weight.packed.buffers()) if isinstance(weight, PackedTensor) else [weight]
