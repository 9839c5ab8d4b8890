"""Run steps on a device that is not the CPU, without data: `second_device_child.py FOLDER CASES`.

Tensors have shapes, dtypes and a device, and no values. So an operation on tensors of two devices, a value
that the host reads and a copy from the host show themselves, as they would on a GPU. In a process of its own,
because the device stays torch's accelerator until the process ends. Prints one line of JSON a case.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

TESTS = Path(__file__).resolve().parent.parent
NAME = "second"
SIZE = (64, 96)  # (height, width) in pixels
RANDOM = ("normal", "uniform", "bernoulli", "randn", "randperm", "random", "dropout")
MODE = FakeTensorMode()  # one for all: tables that are made once are kept from case to case
ASKS_DEVICE = torch.ops.prim.device.default


class Watch(TorchDispatchMode):
    """Counts operations, and notes what a captured step must not do."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is ASKS_DEVICE:
            return results
        name = func._schema.name.removeprefix("aten::")
        given = {
            (t.device.type, t.ndim > 0) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        made = {t.device.type for t in tree_iter(results) if isinstance(t, torch.Tensor)}
        devices = {device for device, _ in given} | made
        if NAME in devices and len(devices) > 1:
            self.faults.append(f"{name} between {' and '.join(sorted(devices))}")
        if any(name.startswith(word) or f"_{word}" in name for word in RANDOM):
            self.faults.append(f"{name} draws")
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if NAME in made and not (aliases and not any(a.is_write for a in aliases)):
            self.kernels[name] += 1
        return results


def load(name: str, folder: Path) -> None:
    """Import a folder as a package."""
    init = folder / "__init__.py"
    if init.exists():
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    else:
        spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(folder)]
    assert spec is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)


def without_data(module: torch.nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Put tensors without data on ``device`` in the places of a module's own; what is shared stays shared.

    Tables that are neither parameters nor buffers stay on the CPU, as they do when a module is moved.
    """
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []
    for inner in module.modules():
        tables = {name: own for name, own in vars(inner).items() if isinstance(own, torch.Tensor)}
        vars(inner).update({name: mode.from_tensor(own) for name, own in tables.items()})
        for table in (inner._parameters, inner._buffers):
            for name, own in table.items():
                if own is None:
                    continue
                if id(own) not in made:
                    kept.append(own)
                    with mode:
                        fake = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=device)
                    is_parameter = isinstance(own, torch.nn.Parameter)
                    made[id(own)] = torch.nn.Parameter(fake, False) if is_parameter else fake
                table[name] = made[id(own)]  # type: ignore[assignment]


def step(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Open a case's run, and take a micro-batch and an update of it; return what was seen."""
    from loragraft.trainer import api, costs, opened, together
    from loragraft.trainer.engine import frozen, precision, steps
    from loragraft_tests.trainer import runs, tiny_families

    base = tiny_families.open_tiny(case["family"], folder / case["family"])
    data = {"resolution": 64, "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 128}
    train_set = runs.train_set(folder / "images" / "1_zibu", **data)
    options = dict(case["settings"])
    is_shared = options.pop("shared", False)
    config = runs.settings(**{"train_batch_size": 2, "memory": "off", **options})
    places = api.Places(folder / "runs", folder / "loras", folder / "cache")
    job = together._job(base, train_set, config, places, "cpu", together.ALONE)
    device, mode, watch = torch.device(NAME, 0), MODE, Watch()
    job = dataclasses.replace(job, precision=precision.Precision(job.precision.name, device))
    place = precision.place

    def placed(parts: Any, wanted: Any, **how: Any) -> list[str]:
        here = precision.Precision(wanted.name, torch.device("cpu"))
        if is_shared:  # a host's weights on the device keep their dtype, and are cast at each use
            frozen.freeze(parts.denoiser, here.dtype, None, keeps=lambda weight: True)
        lines = place(parts, here, **how)
        for module in (parts.denoiser, parts.vae, parts.text_encoders):
            without_data(module, mode, device)
        mode.__enter__()
        return lines

    opened.place = placed
    try:
        (run,) = opened.open_runs([job], folder / "cache", {})
        largest = costs.Largest([run])
        meta = largest.inputs(2, SIZE)
        fed = tuple(None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device) for x in meta)
        engine = run.engine
        assert isinstance(engine, steps.Fused | steps.Eager)

        def gradients() -> torch.Tensor:
            if isinstance(engine, steps.Fused):
                return engine.run((0,), [1], fed)
            losses = engine.loss_of((0,), fed)
            losses.sum().backward()
            return losses

        gradients()  # what is made once and kept is made
        engine.update(0, 1.0)
        with watch:
            losses = gradients()
            norm = engine.update(0, 1.0)
        assert losses.device.type == norm.device.type == NAME
    finally:
        mode.__exit__(None, None, None)
        opened.place = place
    return {"faults": watch.faults, "kernels": watch.kernels.total(), "engine": engine.name}


def broken(how: str) -> Any:
    """Return a loss that does what no captured step may do, made of the real one."""
    from loragraft.trainer import losses

    real = losses.diffusion_losses

    def wrong(pred: torch.Tensor, *others: Any) -> torch.Tensor:
        found: torch.Tensor = real(pred, *others)
        if how == "reads":
            return found * (1.0 if found.sum().item() > 0 else 2.0)
        if how == "mixes":
            return found * torch.ones(len(found), device="cpu")
        if how == "copies":
            return found * torch.arange(len(found), device="cpu").to(found.device)
        return found + torch.randn_like(found)

    losses.diffusion_losses = wrong
    return real


def main() -> None:
    """Take all cases; one that fails says so and the next one is taken."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    load("loragraft", TESTS.parent)
    load("loragraft_tests", TESTS)
    from loragraft_tests.trainer import tiny

    tiny.write_images(folder / "images" / "1_zibu", [(64, 64), (96, 64), (64, 64)])
    from loragraft.trainer import losses

    for case in cases:
        real = broken(case["broken"]) if "broken" in case else losses.diffusion_losses
        try:
            found = step(folder, case)
        except Exception as error:  # whatever stands in a step's way is what the case is to show
            found = {"faults": [f"{type(error).__name__}: {str(error)[:300]}"], "kernels": 0, "engine": ""}
        finally:
            losses.diffusion_losses = real
        print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # torch's thread for the device would abort the process at its end


if __name__ == "__main__":
    main()
