"""Two processes that train together: they run scenarios and write down what they saw.

``python distributed_child.py FOLDER SCENARIO...``: FOLDER holds a base and images, and gets
``<scenario>-<rank>.json``. No port is used: the processes meet through a file. One imports everything and
becomes two, which takes half the time of two that import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the packages are loaded by path, as the tests do
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from loragraft.trainer import api, together
from loragraft.trainer.engine import distributed, meetings
from loragraft.trainer.engine.distributed import Alone, World
from loragraft.trainer.engine.steps import Fused, Micro
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.inputs import Inputs
from loragraft.trainer.loop import Answer, train_step
from loragraft.trainer.opened import open_runs
from loragraft.trainer.run import Run
from loragraft_tests.trainer import runs

SIZE = 2
KILLED = 9  # an exit status
EACH = 2  # images of each process in a full batch


def places(folder: Path, name: str) -> api.Places:
    return api.Places(*(folder / name / part for part in ("runs", "loras", "cache")))


def train_set(folder: Path) -> api.TrainSet:
    """Return images in three buckets, one with a mask, and regularisation images that count half."""
    own = api.scan_folder(folder / "images", masks="folder")
    reg = api.scan_folder(folder / "reg")
    config = api.make(api.DatasetConfig, {**runs.SMALL_BUCKETS, "prior_loss_weight": 0.5})
    return api.build_train_set(api.add_regularisation(own, reg), config)


def opened(folder: Path, world: Alone, name: str, **changes: Any) -> Run:
    """Return a run that is opened and prepared, its adapter away from zero."""
    base = api.open_base(folder / "tiny.safetensors", tokenizer=folder / "tokenizer")
    config = runs.settings(**{"train_batch_size": EACH * SIZE, **changes})
    job = together._job(base, train_set(folder), config, places(folder, name), "cpu", world)
    (run,) = open_runs([job], folder / "cache", {})
    run.adapter.select()
    list(run.inputs.prepare())
    for number, parameter in enumerate(run.parameters):
        random = torch.Generator().manual_seed(number)
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    run.engine.reload(run.adapter.row)
    return run


def epoch_gradients(run: Run) -> tuple[dict[str, torch.Tensor], list[float], list[list[int]]]:
    """Return each step's gradients in an epoch, its losses, and the images that this process was fed."""
    found: dict[str, torch.Tensor] = {}
    engine = run.engine

    def update(row: int, max_norm: float) -> torch.Tensor:
        for number, parameter in enumerate(run.parameters):
            grad = engine.flat.gradient(parameter) if isinstance(engine, Fused) else parameter.grad
            if grad is not None:
                found[f"{run.step}.{number}"] = grad.clone()
        if isinstance(engine, Fused):
            engine.flat.grads.zero_()
        else:
            run.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    engine.update = update  # type: ignore[method-assign]
    fed: list[list[int]] = []
    for step in range(run.plan.steps_per_epoch):
        for batch in run.batches(step):
            first, last = run.world.share(len(batch.indices))
            fed.append(list(batch.indices[first:last]))
        take_step(run)
    return found, run.micro_losses, fed


def take_step(run: Run) -> None:
    steps = train_step(run)
    try:
        micro: Micro = next(steps)
        while True:
            micro = steps.send(Answer(*run.engine.backward([micro]), 0.0))
    except StopIteration:
        pass


GRADIENTS = {
    "fused": {"engine": "fused", "gradient_accumulation_steps": 2},
    "eager": {
        **{"engine": "eager", "gradient_accumulation_steps": 1, "max_token_length": 150},
        **{"network_dropout": 0.3, "rank_dropout": 0.2},
    },
}


def gradients(folder: Path, world: Alone, kind: str) -> dict[str, Any]:
    run = opened(folder, world, "unused", **GRADIENTS[kind])
    tensors, losses, fed = epoch_gradients(run)
    if world.writes and world.size > 1:
        save_file(tensors, folder / f"{kind}.safetensors")
    return {"losses": losses, "fed": fed, "tensors": len(tensors)}


# ---- whole runs ----

WHOLE = {"max_train_steps": 6, "save_every_n_steps": 2, "train_batch_size": EACH * SIZE, "sample_steps": 2}


# An update without AdamW's division by what may be nearly zero, which makes rounding larger.
PLAIN = {"save_every_n_steps": None, "optimizer_type": "SGDNesterov", "learning_rate": 0.1}


def start(folder: Path, world: Alone, name: str, **changes: Any) -> Any:
    base = api.open_base(folder / "tiny.safetensors", tokenizer=folder / "tokenizer")
    config = runs.settings(**{**WHOLE, **changes})
    return api.train(base, train_set(folder), config, places=places(folder, name), device="cpu", world=world)


def go(events: Any, stop_after: int | None = None) -> list[str]:
    """Run, or close after a step; return the names of the events."""
    seen = []
    for event in events:
        seen.append(type(event).__name__)
        if isinstance(event, api.Step) and event.step == stop_after:
            events.close()
            break
    return seen


def whole(folder: Path, world: World) -> dict[str, Any]:
    """Six steps with saves and samples; what this process wrote anywhere below the folder."""
    with written(folder) as files:
        seen = go(start(folder, world, "whole", sample_prompts=("a",), preview_image=True))
    return {"events": seen, "written": files}


def stopped(folder: Path, world: World) -> dict[str, Any]:
    """Process 1 is asked to stop after step 3."""
    events = start(folder, world, "stopped", **PLAIN)
    try:
        seen = go(events, stop_after=3 if world.rank == 1 else None)
        world.stop()
        return {"events": seen}
    except meetings.Stopped:
        return {"stopped": True, "told": world.is_told}


def failing(folder: Path, world: World, error: Exception) -> dict[str, Any]:
    """Process 1 ends with ``error`` at its third draw."""
    draws = 0
    draw = Inputs.draw

    def broken(*given: Any) -> Any:
        nonlocal draws
        draws += 1
        if world.rank == 1 and draws > 2:
            raise error
        return draw(*given)

    Inputs.draw = broken  # type: ignore[method-assign]
    try:
        go(start(folder, world, f"failing-{type(error).__name__}", save_every_n_steps=None))
    finally:
        Inputs.draw = draw  # type: ignore[method-assign]
    return {}


def refused(folder: Path, world: World) -> dict[str, Any]:
    return failing(
        folder, world, LoraGraftError("LG-RUN-005", "Broken.", where="ä.png", why="so.", fix="it.")
    )


def crashed(folder: Path, world: World) -> dict[str, Any]:
    return failing(folder, world, RuntimeError("a wire came loose"))


def apart(folder: Path, world: World) -> dict[str, Any]:
    go(start(folder, world, "apart", seed=world.rank))
    return {}


def drifted(folder: Path, world: World) -> dict[str, Any]:
    """Process 1 has other weights from the second step on."""
    run = opened(folder, world, "unused", engine="fused")
    take_step(run)
    if world.rank == 1:
        run.parameters[0].data += 1e-6
    take_step(run)
    return {}


def rolled_back(folder: Path, world: World) -> dict[str, Any]:
    """Process 1 meets a NaN in step 4, once: both go back to the save of step 2."""
    draw, met = Inputs.draw, []

    def broken(inputs: Inputs, step: int, *given: Any) -> Any:
        fed = draw(inputs, step, *given)
        if world.rank == 1 and step == 3 and not met:
            met.append(step)
            fed = fed._replace(latents=fed.latents * float("nan"))
        return fed

    Inputs.draw = broken  # type: ignore[method-assign, assignment]
    try:
        seen = go(start(folder, world, "rolled_back"))
    finally:
        Inputs.draw = draw  # type: ignore[method-assign]
    return {"steps": seen.count("Step")}


def finished(folder: Path, world: World) -> dict[str, Any]:
    """The run of `whole` again: it is finished."""
    return {"events": go(start(folder, world, "whole", sample_prompts=("a",), preview_image=True))}


def killed(folder: Path, world: World) -> dict[str, Any]:
    """Process 1 vanishes after step 3, without a word."""
    for event in start(folder, world, "killed", save_every_n_steps=None):
        if world.rank == 1 and isinstance(event, api.Step) and event.step == 3:
            os._exit(KILLED)
    return {}


SCENARIOS: dict[str, Callable[[Path, World], dict[str, Any]]] = {
    "fused": lambda folder, world: gradients(folder, world, "fused"),
    "eager": lambda folder, world: gradients(folder, world, "eager"),
    **{
        f.__name__: f
        for f in (whole, finished, stopped, refused, crashed, apart, drifted, rolled_back, killed)
    },
}


@contextmanager
def written(folder: Path) -> Iterator[list[str]]:
    """Collect what is opened for writing, made, renamed or removed below ``folder``."""
    found: list[str] = []
    watching = [True]
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        mode = arguments[1] if event == "open" and len(arguments) > 1 else ""
        flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
        writes = isinstance(mode, str) and any(c in mode for c in "wax+")
        writes = writes or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (event in changes or (event == "open" and writes)) and str(arguments[0]).startswith(str(folder)):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    try:
        yield found
    finally:
        watching.clear()


def main(rank: int, folder: Path, names: list[str]) -> None:
    distributed.CHECK_EVERY = 1
    meetings.Meetings.linger = lambda self: None  # type: ignore[method-assign]  # this process lives on
    for name in names:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{name}.meeting", rank=rank, world_size=SIZE
        )
        result: dict[str, Any] = {}
        try:
            with World(torch.device("cpu"), 2 * rank) as world:
                result = SCENARIOS[name](folder, world)
        except Exception as error:
            result = {"error": getattr(error, "code", type(error).__name__), "text": str(error)}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    import diffusers.models.unets.unet_2d_condition  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401 - what a base imports when it is opened

    other = os.fork()
    main(0 if other else 1, Path(sys.argv[1]), sys.argv[2:])
    if other:
        status = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
        sys.exit(0 if status in (0, KILLED) else status)
