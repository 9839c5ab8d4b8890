"""Open the base that a MODEL, a CLIP and a VAE make: as a family of the trainer's own, or through ComfyUI."""

from __future__ import annotations

from typing import Any

from ..trainer import api
from .host_any import open_any
from .host_checks import check_present
from .host_names import family_of
from .host_weights import open_known


def open_base(model: Any, clip: Any, vae: Any) -> api.Base:
    """Open the base on the host's own storage; raises LG-NODE errors for one that cannot be trained.

    A MODEL of none of the trainer's families is trained through ComfyUI itself.
    """
    check_present(model, clip, vae)
    return (open_any if family_of(model) is None else open_known)(model, clip, vae)
