"""The KL VAE's weights in a single file (LDM names) and in diffusers' module, both ways."""

from __future__ import annotations

from ..base import Tensors
from ..sources.weights import Renamed
from .ldm_keys import VAE_PREFIX, is_vae_attention_weight, vae_to_diffusers, vae_to_ldm

# VAEs saved by old diffusers name the attention's layers so:
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def split_vae(weights: Tensors) -> Tensors:
    """Return the VAE of single-file weights under diffusers' names (views)."""
    below = [k[len(VAE_PREFIX) :] for k in weights if k.startswith(VAE_PREFIX)]
    names = {new: VAE_PREFIX + old for new, old in vae_to_diffusers(below).items()}
    return Renamed(weights, names, frozenset(n for n, old in names.items() if is_vae_attention_weight(old)))


def join_vae(vae: Tensors) -> Tensors:
    """Return a VAE's weights under single-file names (views)."""
    names = {VAE_PREFIX + new: old for new, old in vae_to_ldm(vae).items()}
    kernels = frozenset(n for n in names if is_vae_attention_weight(n) and vae[names[n]].ndim == 2)
    return Renamed(vae, names, kernels=kernels)


def vae_from_folder(vae: Tensors) -> Tensors:
    """Bring a diffusers folder's VAE to today's names; old ones hold attention matrices as 1x1 kernels."""
    names = {_new_name(k): k for k in vae}
    kernels = (new for new, old in names.items() if ".attentions." in old and vae[old].ndim == 4)
    return Renamed(vae, names, frozenset(kernels))


def _new_name(key: str) -> str:
    if ".attentions." in key:
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new)
    return key
