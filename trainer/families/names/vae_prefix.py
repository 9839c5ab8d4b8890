"""The autoencoder's prefix in complete checkpoints: LDM's, or that of transformers' which ComfyUI writes."""

from __future__ import annotations

from ..base import Tensors
from ..sources.weights import Renamed
from .ldm_keys import VAE_PREFIX

NEWER_PREFIX = "vae."


def with_ldm_prefix(weights: Tensors) -> Tensors:
    """Return single-file weights whose autoencoder, with either prefix, has LDM's (views)."""
    return Renamed(weights, {_moved(k, NEWER_PREFIX, VAE_PREFIX): k for k in weights})


def with_newer_prefix(weights: Tensors) -> Tensors:
    """Return single-file weights whose autoencoder, with either prefix, has the newer one (views)."""
    return Renamed(weights, {_moved(k, VAE_PREFIX, NEWER_PREFIX): k for k in weights})


def _moved(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key
