"""``loragraft train`` in the processes that accelerate, torchrun or mpirun started: joining, and batches."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from datetime import timedelta

import torch

from ..engine.distributed import ALONE, Alone, World
from ..errors import LoraGraftError, one_line

EXCHANGE = timedelta(minutes=10)  # the longest wait for a process that was ready
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What accelerate can be told and the run has settings of its own for: (variable, what does nothing, setting).
OWN_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", ("", "no"), "mixed_precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "gradient_accumulation_steps"),
    ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "engine"),
)
SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def add_flag(command: argparse.ArgumentParser) -> None:
    """Give the command --split_batches."""
    command.add_argument(
        "--split_batches",
        action="store_true",
        help="in several processes, train_batch_size counts the images of all of them together, so that the "
        "same command continues on another number of processes",
    )


def join(device: str | None) -> Alone:
    """Return the processes that a launcher started, or ALONE; all others join too. Raises LG-DIST-001."""
    started = _number_started(os.environ)
    if started < 2:
        return ALONE
    on_cpu = device == "cpu" or _is_on("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    _check(device, on_cpu)
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu, timeout=EXCHANGE)
    except (RuntimeError, ValueError, OSError) as error:
        raise _refusal("they do not find each other", one_line(str(error), 300)) from error
    if state.num_processes != started:
        raise _refusal(f"{started} were started", f"accelerate found {state.num_processes}")
    turn = 0 if state.process_index == 0 else 1 if state.local_process_index == 0 else 2
    return World(torch.device("cpu") if on_cpu else state.device, turn)


def launcher_lines(environment: Mapping[str, str]) -> list[str]:
    """Say which settings of accelerate's are not used, because the run has its own."""
    return [
        f"accelerate's {name.removeprefix('ACCELERATE_').lower()} '{value}' is not used; the run's setting "
        f"{setting} decides"
        for name, idle, setting in OWN_SETTINGS
        if (value := environment.get(name, "")).lower() not in idle
    ]


def device_of(world: Alone, wished: str | None) -> torch.device | str | None:
    """Return the device that this process trains on; accelerate's --cpu counts as a wish."""
    if world.device is not None:
        return world.device
    return wished or ("cpu" if _is_on("ACCELERATE_USE_CPU") else None)


def whole_batch(world: Alone, size: int, is_whole: bool, where: str = "train_batch_size") -> int:
    """Return how many images all processes take together where ``size`` is given; see --split_batches.

    Raises LG-DIST-006 where they cannot share it evenly.
    """
    if not is_whole:
        return size * world.size
    if size % world.size:
        below = size - size % world.size
        raise LoraGraftError(
            "LG-DIST-006",
            f"{world.size} processes cannot share batches of {size} images evenly.",
            where=where,
            why="with --split_batches it counts the images of all processes together.",
            fix=f"take a multiple of {world.size}, for instance {below or world.size}, or start a number of "
            f"processes that divides {size}",
        )
    return size


def refuse_sweep(world: Alone) -> None:
    """Raise LG-DIST-007 where several processes were started for a sweep."""
    if world.size > 1:
        raise LoraGraftError(
            "LG-DIST-007",
            f"{world.size} processes were started for a sweep.",
            where="--sweep",
            why="a sweep's runs train side by side on one device; several processes train one run together.",
            fix="start the sweep without the launcher, or take --sweep away",
        )


def _number_started(environment: Mapping[str, str]) -> int:
    sizes = ("WORLD_SIZE", *MPI_SIZES) if "LOCAL_RANK" in environment else MPI_SIZES
    return max((int(environment[name]) for name in sizes if environment.get(name, "").isdigit()), default=1)


def _check(device: str | None, on_cpu: bool) -> None:
    """Refuse what this trainer does not do in several processes."""
    for name in SHARDING:
        if _is_on(name):
            raise _refusal(
                f"{name.removeprefix('ACCELERATE_USE_')} is switched on",
                "it divides a model between GPUs; here every process holds the whole base",
            )
    if device is not None and ":" in device:
        raise _refusal(f"--device {one_line(device, 40)} names one GPU", "each process takes one of its own")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not on_cpu and here > gpus:
        raise _refusal(f"{here} were started on a machine with {gpus} GPUs", "each needs one of its own")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _refusal(what: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DIST-001",
        f"Several processes cannot train together: {what}.",
        where="the launcher: accelerate launch, torchrun or mpirun",
        why=f"{why}.",
        fix="start one process a GPU, all with the same command, as docs/multi-gpu.md shows",
    )
