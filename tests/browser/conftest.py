"""One ComfyUI server and one Chromium for all browser tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser

from loragraft_tests.browser.page import Page, browser, open_page
from loragraft_tests.comfyui.harness import Comfy, cannot_run

PACK = Path(__file__).resolve().parents[2]
DEMO_BASE = PACK / "trainer" / "demo" / "base" / "demo_base.safetensors"


class Open(Protocol):
    """Open ComfyUI's page with some settings."""

    def __call__(self, **settings: Any) -> AbstractContextManager[Page]: ...


@pytest.fixture(scope="session")
def server(
    comfyui: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Comfy]:
    """Return a running ComfyUI with this pack in it."""
    if reason := cannot_run():
        (pytest.fail if request.config.getoption("--require-comfyui") else pytest.skip)(reason)
    with Comfy.start(comfyui, tmp_path_factory.mktemp("browser"), PACK) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Return a running Chromium."""
    with browser() as running:
        yield running


@pytest.fixture
def open_comfy(server: Comfy, chromium: Browser) -> Open:
    """Return a function that opens the page: ``with open_comfy(nodes2=True) as page``."""

    def open_it(**settings: Any) -> AbstractContextManager[Page]:
        return open_page(chromium, server, **settings)

    return open_it


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """Return the embedded base model's file; skip where it has not been made yet."""
    if not DEMO_BASE.is_file():
        pytest.skip("the demo base is not there: trainer/demo/base/demo_base.safetensors")
    return DEMO_BASE
