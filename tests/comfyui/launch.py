"""Run ComfyUI's main.py where there is no GPU: `python launch.py <ComfyUI folder> <its arguments>`.

On a CPU build of torch the usual torchvision cannot load its C library, and its import fails;
declaring two schemas first cures that. torchaudio, and torchvision where there is none, are needed
only by model families that no test uses, so an absent one is replaced by empty modules.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import ClassVar

STUBS = {
    "torchaudio": ("functional", "transforms"),
    "torchvision": ("ops", "transforms", "transforms.functional", "models", "models.optical_flow"),
}
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[object] = []  # the declaration lives as long as its object


class _Stub(types.ModuleType):
    """A module in which every name exists."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _CureTorchvision(MetaPathFinder):
    """Declares the schemas just before torchvision is first imported; finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: object = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and not kept:
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                library = torch.library.Library("torchvision", "DEF")
                kept.append(library)
                for schema in SCHEMAS:
                    library.define(schema)
        return None


def cure_imports() -> None:
    """Let ComfyUI import what it asks for, on a machine without a GPU too."""
    for name, parts in STUBS.items():
        if importlib.util.find_spec(name) is None:
            for full in (name, *(f"{name}.{part}" for part in parts)):
                module = _Stub(full)
                module.__spec__ = ModuleSpec(full, None, is_package=True)
                sys.modules[full] = module
    sys.meta_path.insert(0, _CureTorchvision())


def main() -> None:
    """Cure the imports, then hand over to main.py under the name `__main__`."""
    comfyui = Path(sys.argv[1]).resolve()
    sys.argv = [str(comfyui / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(comfyui)
    cure_imports()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
