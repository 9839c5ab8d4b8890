"""Emphasis in captions: what (word), (word:1.2) and [word] mean, and what they do to the conditioning."""

from __future__ import annotations

import re

import torch

UP, DOWN = 1.1, 1 / 1.1
# An escaped bracket or backslash, a lone backslash, a bracket, the end of a weighted one, or plain text.
MARK = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:([+-]?(?:\d+\.?\d*|\.\d+))\)|[^\\()\[\]:]+|:")

SMALLEST_MEAN = 1e-6


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    """Split a caption into pieces and their weights, as webui and the reference trainer read it.

    (a) weighs a 1.1 times, (a:1.5) 1.5 times, [a] 1/1.1 times, and brackets within brackets multiply. A
    bracket that is never closed reaches to the end, one that was never opened is text, and so is \\(.
    Neighbours of equal weight are one piece.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in MARK.finditer(text):
        mark, number = match[0], match[1]
        if mark in opened:
            opened[mark].append(len(texts))
        elif number is not None and opened["("]:
            scale(opened["("].pop(), float(number))
        elif mark == ")" and opened["("]:
            scale(opened["("].pop(), UP)
        elif mark == "]" and opened["["]:
            scale(opened["["].pop(), DOWN)
        else:
            texts.append(mark[1:] if mark.startswith("\\") else mark)
            weights.append(1.0)
    for bracket, factor in (("(", UP), ("[", DOWN)):
        for start in opened[bracket]:
            scale(start, factor)
    pieces: list[tuple[str, float]] = []
    for each, weight in zip(texts, weights, strict=True):
        if pieces and pieces[-1][1] == weight:
            pieces[-1] = (pieces[-1][0] + each, weight)
        else:
            pieces.append((each, weight))
    return pieces


def emphasise(cond: torch.Tensor, weights: torch.Tensor, *, keep_mean: bool) -> torch.Tensor:
    """Return the conditioning (B, L, D) times the weights (B, L) of its places, in cond's dtype.

    ``keep_mean`` scales each caption's conditioning back to the mean that it had, as webui and
    HCP-Diffusion do; the reference trainer leaves it. A mean too near to 0 to divide by is left too.
    """
    weighted = cond * weights[..., None]
    if keep_mean:
        before, after = (x.float().mean(dim=(1, 2), keepdim=True) for x in (cond, weighted))
        weighted = weighted * torch.where(after.abs() > SMALLEST_MEAN, before / after, 1.0)
    return weighted.to(cond.dtype)
