"""Chance as a function of a key: what is drawn for one thing never depends on what else is drawn."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator that is a function of ``key`` alone, e.g. (seed, step, sample, "noise")."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
