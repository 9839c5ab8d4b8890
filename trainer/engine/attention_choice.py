"""Which attention backend a run takes: as set, or the fastest by measurement where there is a CUDA GPU.

Elsewhere a rule decides, and a run that has begun stays with what it took: two backends differ in their
last bits, so a result must not depend on a clock more than it has to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import LoraGraftError, one_line
from .attention import BACKENDS, Attend, is_general, original_processor

MAX_SCORES_MIB = 64  # auto leaves `plain` out above: it keeps a layer's scores for the backward pass
MARGIN = 0.95  # auto leaves sdpa only for what takes less than this share of its time
WARMUPS, REPEATS = 3, 11
XFORMERS_REMEDY = "install the xformers that is built for this torch, or set attention to auto, sdpa or plain"


class Shape(NamedTuple):
    """The sizes of one attention product."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int


def largest_shapes(
    unet: nn.Module, batch: int, latent_size: tuple[int, int], context: int
) -> tuple[Shape, ...]:
    """Return a U-Net's largest self-attention and its largest cross-attention; nothing for other models.

    ``latent_size`` is (height, width), ``context`` the number of text tokens.
    """
    parts: Any = unet
    down, up = (list(getattr(parts, name, ())) for name in ("down_blocks", "up_blocks"))
    if not down or len(up) != len(down):
        return ()
    levels = range(len(down))  # each but the last halves the map, and up blocks run the other way
    blocks = [*zip(down, levels, strict=True), *zip(up, reversed(levels), strict=True)]
    if parts.mid_block is not None:
        blocks.append((parts.mid_block, levels[-1]))
    found: dict[bool, Shape] = {}
    for block, level in blocks:
        tokens = math.prod(-(-side // 2**level) for side in latent_size)
        for attn in block.modules():
            if not is_general(original_processor(attn)):
                continue
            is_cross = attn.is_cross_attention
            keys, dim = context if is_cross else tokens, attn.inner_dim // attn.heads
            shape = Shape(batch, attn.heads, tokens, keys, dim)
            found[is_cross] = max(
                shape, found.get(is_cross, shape), key=lambda s: s.queries * s.keys * s.heads
            )
    return tuple(found[is_cross] for is_cross in sorted(found))


class Choice(NamedTuple):
    """A backend's name, and why it is this one: a line for the log."""

    name: str
    why: str


Timer = Callable[[Attend, torch.device, torch.dtype, Sequence[Shape]], float]


def measured_ms(attend: Attend, device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]) -> float:
    """Return the milliseconds of forward and backward on a CUDA device: medians, summed over ``shapes``."""
    try:
        with torch.cuda.device(device), torch.enable_grad():
            return sum(_median_ms(attend, device, dtype, shape) for shape in shapes)
    finally:
        torch.cuda.empty_cache()


def _median_ms(attend: Attend, device: torch.device, dtype: torch.dtype, shape: Shape) -> float:
    numbers = torch.Generator(device).manual_seed(0)  # of its own: the process's go on as they would

    def tensor(length: int) -> torch.Tensor:
        size = (shape.batch, length, shape.heads, shape.dim)  # the layout that a processor hands over
        return torch.randn(size, generator=numbers, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = (tensor(n).requires_grad_() for n in (shape.queries, shape.keys, shape.keys))
    grad, times = tensor(shape.queries), []
    for _ in range(WARMUPS + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(attend(q, k, v, None), (q, k, v), grad)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARMUPS:])


def choose(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[Shape],
    *,
    deterministic: bool = False,
    before: str | None = None,
    timer: Timer = measured_ms,
) -> Choice:
    """Return the backend for the setting `attention`: auto, or a name of BACKENDS.

    auto takes the fastest for ``shapes`` on a CUDA device, measured once in a process, and sdpa
    elsewhere and in ``deterministic`` runs. ``before`` is what the run used so far: auto stays with it.
    Raises LG-RUN-009 where a backend that is asked for by name cannot run.
    """
    if setting != "auto":
        obstacle = _obstacle(setting, device, deterministic)
        if obstacle is None and setting == "xformers" and shapes:
            trial = _trial(setting, device, dtype, shapes, timer)
            obstacle = trial if isinstance(trial, _Obstacle) else None
        if obstacle is not None:
            raise LoraGraftError(
                "LG-RUN-009",
                f"The attention backend {setting} cannot run here.",
                where="attention",
                why=f"{obstacle.why}.",
                fix=obstacle.fix,
            )
        return Choice(setting, "as set")
    changed = ""
    if before is not None:
        obstacle = _obstacle(before, device, deterministic)
        if obstacle is None:
            return Choice(before, "as the run began")
        changed = f"the run began with {before}, but {obstacle.why}; "
    rule = _rule(device, deterministic, shapes)
    if rule is not None:
        return Choice("sdpa", changed + rule)
    name, why = _fastest(device, dtype, tuple(shapes), timer)
    return Choice(name, changed + why)


class _Obstacle(NamedTuple):
    why: str
    fix: str


def _obstacle(name: str, device: torch.device, deterministic: bool) -> _Obstacle | None:
    """Say what keeps a backend from running at all; None where nothing is known."""
    if name not in BACKENDS:
        return _Obstacle(f"there is no backend {name}", f"set attention to auto, {', '.join(BACKENDS)}")
    if name != "xformers":
        return None
    if device.type != "cuda":
        return _Obstacle(f"xformers has no kernels for {device.type}", "set attention to auto, sdpa or plain")
    if find_spec("xformers") is None:
        return _Obstacle("xformers is not installed", XFORMERS_REMEDY)
    if deterministic:
        why = "xformers does not promise the same bits every time"
        return _Obstacle(why, "set attention to auto, sdpa or plain, or switch deterministic off")
    return None


def _rule(device: torch.device, deterministic: bool, shapes: Sequence[Shape]) -> str | None:
    """Say why sdpa is taken without a measurement; None where one decides."""
    if device.type != "cuda":
        return f"always on {device.type}, so that the bits do not depend on a clock"
    if deterministic:
        return "always in deterministic runs"
    return None if shapes else "there is nothing to measure"


@cache
def _fastest(device: torch.device, dtype: torch.dtype, shapes: tuple[Shape, ...], timer: Timer) -> Choice:
    """Measure what can run; the same question gets the same answer as long as the process lives."""
    times: dict[str, float] = {}
    said = []
    for name in BACKENDS:
        found = _obstacle(name, device, False) or _trial(name, device, dtype, shapes, timer)
        if isinstance(found, float):
            times[name] = found
        said.append(found.why if isinstance(found, _Obstacle) else f"{name}: {found:.2f} ms")
    best = min(times, key=lambda name: times[name], default="sdpa")
    if times.get("sdpa", math.inf) * MARGIN <= times.get(best, math.inf):
        best = "sdpa"
    return Choice(best, ", ".join(said))


def _trial(
    name: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape], timer: Timer
) -> float | _Obstacle:
    """Time a backend; what cannot compute ``shapes``, or needs too much memory for them, is an obstacle."""
    scores = max(4 * s.batch * s.heads * s.queries * s.keys for s in shapes) // 2**20
    if name == "plain" and scores > MAX_SCORES_MIB:
        return _Obstacle(f"plain would keep {scores} MiB of scores for one layer", "")
    try:
        return timer(BACKENDS[name], device, dtype, shapes)
    except Exception as error:  # a build that does not fit torch or the card says so in many ways
        return _Obstacle(f"{name} fails ({one_line(str(error), 160)})", XFORMERS_REMEDY)
