"""A file imports only from lower floors: the table of docs/architecture.md, held over every import.

The rules are read from the source, so that imports inside functions and under TYPE_CHECKING count.
Every kind of violation is also planted in a small tree, to show that it is caught.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom. A unit is a file or a folder (all files in it that have no entry of their own);
# units of one floor are siblings and do not import each other. docs/architecture.md shows the same table.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("nodes.extension",),
    ("nodes",),
    (
        "nodes.host",
        "nodes.host_bases",
        "nodes.host_demo",
        "nodes.host_files",
        "nodes.host_pictures",
        "nodes.host_routes",
        "nodes.host_sampling",
        "nodes.host_taggers",
    ),
    ("nodes.host_any",),
    ("nodes.host_family", "nodes.host_weights"),
    ("nodes.host_checks", "nodes.host_packed", "nodes.host_prediction", "nodes.host_shadow"),
    ("nodes.host_names",),
    ("trainer.__main__", "trainer.demo.run", "trainer.launch"),
    ("trainer.commands",),
    ("trainer.api",),
    ("trainer.together",),
    ("trainer.assist",),
    ("trainer.fit", "trainer.loop"),
    ("trainer.milestones",),
    ("trainer.rollback", "trainer.samples", "trainer.saving", "trainer.validation"),
    ("trainer.costs", "trainer.whole_model"),
    ("trainer.opened", "trainer.planned", "trainer.resuming"),
    ("trainer.run", "trainer.publish"),
    ("trainer.losses", "trainer.origin", "trainer.tools"),
    (
        "trainer.demo",
        "trainer.draw",
        "trainer.imports",
        "trainer.inputs",
        "trainer.metadata",
        "trainer.plan",
        "trainer.preview",
        "trainer.progress",
        "trainer.runlog",
        "trainer.sweep",
        "trainer.usual",
    ),
    (
        "trainer.data",
        "trainer.families",
        "trainer.adapters",
        "trainer.optim",
        "trainer.checkpoint",
    ),
    ("trainer.engine",),
    ("trainer.checks",),
    ("trainer.contradictions",),
    ("trainer.block_weights",),
    ("trainer.config",),
    (
        "trainer.objective",
        "trainer.parts",
        "trainer.paths",
        "trainer.settings",
        "trainer.events",
        "trainer.safefile",
        "trainer.literals",
        "trainer.patterns",
        "trainer.presets",
        "trainer.sample_prompts",
        "trainer.trends",
    ),
    ("trainer.errors", "trainer.pages"),
)
ENTRY_POINTS = ("", "trainer")  # the two __init__ files above the floors, which import nothing eagerly

HOST_MODULES = {"comfy", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview"}
HOST_MODULES |= {"node_helpers", "nodes", "server"}
SCHEMA_MODULE = "comfy_api"  # what every node file may import; the rest of the host only nodes/host*.py
OWN_NAMES = {"loragraft", "trainer"}


def modules_of(root: Path) -> dict[str, Path]:
    """Return every module of the pack by its dotted name below the root ('' is the root itself)."""
    files = [root / "__init__.py", *(root / "nodes").rglob("*.py"), *(root / "trainer").rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def unit_of(module: str) -> str | None:
    """Return the entry of the table that a module belongs to: the longest that is a prefix of its name."""
    units = [u for floor in FLOORS for u in floor if module == u or module.startswith(u + ".")]
    return max(units, key=len, default=None)


def floor_of(unit: str) -> int:
    """Return the height of a unit's floor; higher may import lower."""
    return len(FLOORS) - next(i for i, floor in enumerate(FLOORS) if unit in floor)


def imports_of(file: Path, module: str, known: dict[str, Path]) -> Iterator[tuple[int, str, bool, bool]]:
    """Yield (line, name, relative, at_top) of each import; relative names are resolved from the root.

    ``from . import x`` names the module x where there is one, else the package. A relative import
    that leaves the pack, or names nothing, is yielded as '?'.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(tree):
        at_top = id(node) in top
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False, at_top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", False, at_top
        elif isinstance(node, ast.ImportFrom):
            up = node.level - 1
            if up > len(package):
                yield node.lineno, "?", True, at_top
                continue
            base = ".".join([*package[: len(package) - up], *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                longer = f"{base}.{alias.name}".strip(".")
                yield node.lineno, longer if longer in known else base if base in known else "?", True, at_top
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and str(name.value).startswith("."):
                yield node.lineno, "?", True, at_top


def violations(root: Path) -> list[str]:
    """Return one line per import that breaks the floors; empty when all hold."""
    known = modules_of(root)
    found = []
    for module, file in known.items():
        unit = unit_of(module)
        if unit is None and module not in ENTRY_POINTS:
            found.append(f"{module}: has no floor; give it one in the table")
            continue
        for line, name, relative, at_top in imports_of(file, module, known):
            at = f"{file.relative_to(root).as_posix()}:{line}"
            reason = _broken_rule(module, unit, name, relative, at_top)
            if reason:
                found.append(f"{at}: {reason}")
    return list(dict.fromkeys(found)) + [f"import cycle: {' -> '.join(c)}" for c in cycles(root)]


def _broken_rule(module: str, unit: str | None, name: str, relative: bool, at_top: bool) -> str | None:
    head = name.split(".")[0]
    if not relative:
        if head in OWN_NAMES:
            return f"import {name} is absolute; imports inside the pack are relative"
        if head in HOST_MODULES and not module.startswith("nodes.host"):
            return f"{name} belongs to ComfyUI; only nodes/host*.py touch it"
        if head == SCHEMA_MODULE and module.startswith("trainer"):
            return f"{name} belongs to ComfyUI; the trainer knows nothing of it"
        return None
    if name == "?":
        return "names no module of the pack"
    if unit is None:
        return f"an entry point imports {name} eagerly" if at_top else None
    target = unit_of(name)
    if target is None:
        return f"imports {name or 'loragraft'}, which has no floor"
    if target == unit or floor_of(target) < floor_of(unit):
        return None
    kind = "its sibling" if floor_of(target) == floor_of(unit) else "upwards"
    return f"{module} imports {kind} {name}"


def cycles(root: Path) -> list[list[str]]:
    """Return the loops in which files import each other while they are loaded."""
    known = modules_of(root)
    edges = {
        module: {
            name
            for _, name, relative, at_top in imports_of(file, module, known)
            if relative and at_top and name in known and name != module
        }
        for module, file in known.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            loop = path[path.index(module) :]
            first = loop.index(min(loop))  # the same loop reads the same, wherever it was entered
            found.append([*loop[first:], *loop[:first], loop[first]])
        elif module not in done:
            for name in sorted(edges[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])
    return found


def test_every_import_goes_down() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_the_documentation_shows_the_same_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("```floors\n")[1].split("```")[0]
    shown = tuple(tuple(line.split()) for line in block.strip().splitlines())
    assert shown == FLOORS


PLANTED = {
    "upwards": ("trainer/config.py", "from .loop import x", "trainer.config imports upwards trainer.loop"),
    "upwards in a function": (
        "trainer/data/records.py",
        "def f():\n    from ..api import x",
        "trainer.data.records imports upwards trainer.api",
    ),
    "data imports families": (
        "trainer/data/records.py",
        "from ..families import x",
        "trainer.data.records imports its sibling trainer.families",
    ),
    "siblings": (
        "trainer/optim.py",
        "from . import checkpoint",
        "trainer.optim imports its sibling trainer.checkpoint",
    ),
    "trainer imports nodes": (
        "trainer/loop.py",
        "from ..nodes import host",
        "trainer.loop imports upwards nodes.host",
    ),
    "trainer imports the host": (
        "trainer/loop.py",
        "import comfy.utils",
        "comfy.utils belongs to ComfyUI",
    ),
    "trainer imports the schema": (
        "trainer/events.py",
        "from comfy_api.latest import io",
        "comfy_api.latest belongs to ComfyUI",
    ),
    "a node imports the host": (
        "nodes/train.py",
        "def f():\n    import folder_paths",
        "folder_paths belongs to ComfyUI",
    ),
    "absolute": ("trainer/loop.py", "from loragraft.trainer import config", "is absolute"),
    "under TYPE_CHECKING": (
        "trainer/errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .config import x",
        "trainer.errors imports upwards trainer.config",
    ),
    "out of the pack": ("trainer/loop.py", "from ...other import x", "names no module"),
    "no such module": ("trainer/loop.py", "from .nowhere import x", "names no module"),
    "by import_module": (
        "trainer/loop.py",
        "import importlib\nimportlib.import_module('.api', __package__)",
        "names no module",
    ),
    "no floor": ("trainer/extra.py", "", "trainer.extra: has no floor"),
    "eager root": ("__init__.py", "from .nodes import host", "an entry point imports nodes.host eagerly"),
    "cycle": (
        "trainer/data/records.py",
        "from .buckets import x",
        "import cycle: trainer.data.buckets -> trainer.data.records -> trainer.data.buckets",
    ),
}


@pytest.fixture
def small_pack(tmp_path: Path) -> Path:
    """Write a pack of the real shape in which every import goes down."""
    sources = {
        "__init__.py": "def f():\n    from .nodes.extension import x",
        "nodes/__init__.py": "",
        "nodes/extension.py": "from comfy_api.latest import io\nfrom .train import x",
        "nodes/host.py": "import comfy.sd\nimport folder_paths",
        "nodes/train.py": "from comfy_api.latest import io\nfrom . import host\nfrom ..trainer import api",
        "trainer/__init__.py": "",
        "trainer/api.py": "from .loop import x",
        "trainer/loop.py": "from . import optim\nfrom .data.records import x",
        "trainer/optim.py": "import torch\nfrom .config import x",
        "trainer/checkpoint.py": "from .errors import x",
        "trainer/config.py": "from .errors import x",
        "trainer/events.py": "",
        "trainer/errors.py": "",
        "trainer/families/__init__.py": "from ..objective import x",
        "trainer/objective.py": "",
        "trainer/data/__init__.py": "",
        "trainer/data/records.py": "from ..errors import x",
        "trainer/data/buckets.py": "from .records import x",
    }
    for name, source in sources.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return tmp_path


def test_the_small_pack_is_clean(small_pack: Path) -> None:
    assert violations(small_pack) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_violation_is_caught(small_pack: Path, kind: str) -> None:
    name, source, expected = PLANTED[kind]
    file = small_pack / name
    file.write_text(
        (file.read_text(encoding="utf-8") if file.exists() else "") + "\n" + source, encoding="utf-8"
    )
    found = violations(small_pack)
    assert any(expected in line for line in found), found
