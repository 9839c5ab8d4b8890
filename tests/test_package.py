"""The package's facts agree with each other, and importing it is light."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import loragraft
from loragraft_tests.shipping import package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
HOSTS_OWN = {"torch", "torchvision", "torchaudio", "numpy", "xformers", "opencv-python"}

LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("loragraft", {root!r} + "/__init__.py",
                                              submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["loragraft"] = module
spec.loader.exec_module(module)
"""


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter holds after running the code."""
    source = LOAD.format(root=str(ROOT)) + code + "\nprint(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_root_is_light() -> None:
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "comfy_api", "comfy"}
    assert not heavy & modules_after("")


def test_the_settings_need_no_torch() -> None:
    assert not {"torch", "diffusers", "transformers"} & modules_after("import loragraft.trainer.config")


def test_the_api_leaves_the_model_libraries_for_later() -> None:
    loaded = modules_after("import loragraft.trainer.api")
    assert not {"diffusers", "transformers", "accelerate", "tensorboard", "comfy"} & loaded


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == loragraft.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(loragraft.__version__)}\]", changelog, flags=re.MULTILINE)


def test_requirements_are_the_dependencies() -> None:
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert "dependencies" not in PROJECT["project"]


def test_requirements_have_lower_bounds_only() -> None:
    for requirement in REQUIREMENTS:
        assert requirement.name.lower() not in HOSTS_OWN
        bounds = sorted(s.operator for s in requirement.specifier)
        # Python 3.10 gets no new releases; there an upper bound keeps ComfyUI's huggingface_hub as it is.
        on_310 = requirement.name == "diffusers" and str(requirement.marker) == 'python_version < "3.11"'
        assert bounds == (["<", ">="] if on_310 else [">="]), requirement


# Found at run time, with a readable notice where they are absent.
OPTIONAL = {"tensorboard", "onnxruntime", "timm", "spandrel", "pillow_heif", "huggingface_hub"}


def test_every_import_is_declared() -> None:
    """What the shipped code imports is ours to declare, the host's own, or optional and found at run time."""
    declared = {r.name.lower().replace("-", "_") for r in REQUIREMENTS} | HOSTS_OWN
    declared |= {"pil", "yaml", "comfy_api"} | OPTIONAL
    for path in package.shipped_files(ROOT):
        if path.suffix != ".py" or path.name.startswith("host"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                head = name.split(".")[0]
                known = head in sys.stdlib_module_names or head.lower() in declared
                assert known or head == "tomllib", f"{path.relative_to(ROOT)}: {name}"


def test_no_extra_brings_what_the_host_has() -> None:
    for name, lines in PROJECT["project"]["optional-dependencies"].items():
        for line in lines:
            assert Requirement(line).name.lower() not in HOSTS_OWN, f"{name}: {line}"


def test_every_package_is_listed() -> None:
    found = {"loragraft"}
    for top in ("nodes", "trainer"):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(("loragraft", *init.parent.relative_to(ROOT).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_entry_points() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_registry_facts() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"]) and "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (
        (ROOT / project["license"]["file"]).read_text(encoding="utf-8").lstrip().startswith("Apache License")
    )
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["DisplayName"] == "LoraGraft" and comfy["PublisherId"]
    assert "web" not in comfy, "with WEB_DIRECTORY the scripts would be registered twice"
    assert loragraft.WEB_DIRECTORY == "./js" and (ROOT / "js").is_dir()
    assert not hasattr(loragraft, "NODE_CLASS_MAPPINGS"), "it would switch comfy_entrypoint off"


def test_command_line_runs_without_installation(tmp_path: Path) -> None:
    """A folder above the pack that bears its name is all that `python -m` needs."""
    (tmp_path / "loragraft").symlink_to(ROOT, target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-m", "loragraft.trainer", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_wheel_holds_code_and_data(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"
    files = package.shipped_files(ROOT)
    for path in files:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("loragraft-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    folders = ("nodes", "trainer", "js", "locales")
    wanted = {p.relative_to(ROOT).as_posix() for p in files if p.relative_to(ROOT).parts[0] in folders}
    assert {f"loragraft/{name}" for name in wanted} - names == set()
    required = {
        Requirement(x) for x in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in x
    }
    assert required == set(REQUIREMENTS)
