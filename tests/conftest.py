"""Load the pack by path under the name ``loragraft``, keep tests offline, and say what was skipped.

No installation is needed: the repository root is the package, whatever its folder is called.
Helpers that tests share are imported as ``loragraft_tests.<folder>.<module>``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

# Before anything imports torch or huggingface_hub. Two busy processes on two cores make OpenMP's
# barriers a hundred times slower, so every test process works with one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


def load_by_path(name: str, folder: Path) -> ModuleType:
    """Import ``folder`` as the package ``name`` from its ``__init__.py`` (or as an empty package)."""
    if name in sys.modules:
        return sys.modules[name]
    init = folder / "__init__.py"
    if init.exists():
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    else:
        spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(folder)]
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return module


load_by_path("loragraft", ROOT)
load_by_path("loragraft_tests", TESTS)


# ---- what this machine has ----


def comfyui_path() -> Path | None:
    """Return ComfyUI's folder: COMFYUI_PATH, else two folders up; None where there is none."""
    given = os.environ.get("COMFYUI_PATH")
    folder = Path(given).expanduser().resolve() if given else ROOT.parent.parent
    return folder if (folder / "main.py").is_file() and (folder / "comfy").is_dir() else None


def chromium_path() -> str | None:
    """Return the executable of the system's Chromium, or None."""
    given = os.environ.get("CHROMIUM_PATH")
    names = (given,) if given else ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def missing(kind: str) -> str | None:
    """Say what a test of this kind lacks here, or None when it can run."""
    if kind in ("comfy", "browser"):
        if comfyui_path() is None:
            return "no ComfyUI: COMFYUI_PATH is not set to one, and none lies two folders up"
        from loragraft_tests.comfyui.harness import cannot_run

        if reason := cannot_run():
            return reason
    if kind == "browser":
        if importlib.util.find_spec("playwright") is None:
            return "no playwright: pip install -e .[dev]"
        if chromium_path() is None:
            return "no Chromium: install chromium, or set CHROMIUM_PATH"
    if kind == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "no GPU"
    return None


# ---- collection: folders imply markers, and what cannot run is skipped with its reason ----

FOLDER_MARKERS = {"comfyui": "comfy", "browser": "browser", "gpu": "gpu"}
HOW_TO_RUN = {
    "comfy": "make test-comfy COMFYUI_PATH=/path/to/ComfyUI",
    "browser": "make test-comfy COMFYUI_PATH=/path/to/ComfyUI  (with Chromium installed)",
    "gpu": "make test on a machine with a GPU",
}
skipped_kinds: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-comfyui",
        action="store_true",
        help="fail instead of skipping where ComfyUI or Chromium is missing",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        with contextlib.suppress(ValueError):
            folder = item.path.relative_to(TESTS).parts[0]
            if folder in FOLDER_MARKERS:
                item.add_marker(FOLDER_MARKERS[folder])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """After deselection by markers, skip (or refuse to skip) what this machine cannot run."""
    required = session.config.getoption("--require-comfyui")
    if required and (reason := missing("comfy") or missing("browser")):
        raise pytest.UsageError(f"{reason}. Host and browser tests were asked for.")
    for item in session.items:
        for kind in HOW_TO_RUN:
            if item.get_closest_marker(kind) and (reason := missing(kind)):
                item.add_marker(pytest.mark.skip(reason=reason))
                skipped_kinds[kind] = skipped_kinds.get(kind, 0) + 1
                break


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind, count in skipped_kinds.items():
        terminalreporter.write_line(
            f"SKIPPED {count} {kind} tests ({missing(kind)}). To run them: {HOW_TO_RUN[kind]}", yellow=True
        )


# ---- no network: a connection that leaves this machine fails the test, even where it is caught ----

_outside: list[str] = []
_network_allowed = False


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a unix socket's path
    if address[0] is None:
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _watch_sockets(event: str, args: tuple[Any, ...]) -> None:
    if _network_allowed or not event.startswith("socket."):
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = (args[0],)
    elif event in ("socket.connect", "socket.sendto"):
        address = args[1]
    else:
        return
    if not _is_local(address):
        _outside.append(f"{event} {address!r}")
        raise PermissionError(f"tests use no network, but {event} went to {address!r}")


sys.addaudithook(_watch_sockets)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that looks up or connects to any other machine; marker ``network`` allows it."""
    global _network_allowed
    _network_allowed = request.node.get_closest_marker("network") is not None
    _outside.clear()
    yield
    _network_allowed = False
    caught, _outside[:] = list(_outside), []
    assert not caught, f"the network was used: {caught}"


# ---- places ----


@pytest.fixture
def places(tmp_path: Path) -> Any:
    """Return the trainer's Places (runs, loras, cache) below a fresh folder."""
    from loragraft.trainer.api import Places

    return Places(runs=tmp_path / "runs", loras=tmp_path / "loras", cache=tmp_path / "cache")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Return ComfyUI's folder."""
    folder = comfyui_path()
    if folder is None:
        pytest.skip(str(missing("comfy")))
    return folder
