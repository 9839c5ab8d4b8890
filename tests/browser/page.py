"""ComfyUI's page in the system's Chromium: open it, drive it, read the live panel, look at it.

with browser() as chromium, open_page(chromium, server, nodes2=True) as page:
    page.load(workflow)
    page.queue()
    page.wait("done(4)")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, sync_playwright
from playwright.sync_api import Page as RawPage

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = {"width": 1600, "height": 1000}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.InstalledVersion": "1.49.6",
    "Comfy.VueNodes.AutoScaleLayout": False,
}

# What tests ask the page, as functions of the page itself.
PROBE = Path(__file__).with_name("probe.js").read_text("utf-8")


class Page:
    """One open page. ``errors`` holds console errors and uncaught exceptions, ``dialogs`` what popped up."""

    def __init__(self, raw: RawPage, url: str) -> None:
        self.raw, self.url = raw, url
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        raw.on("console", self._console)
        raw.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        raw.on("dialog", self._dialog)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} [{(message.location or {}).get('url', '')}]")

    def _dialog(self, dialog: Any) -> None:
        if dialog.type != "beforeunload":
            self.dialogs.append(f"{dialog.type}: {dialog.message}")
        dialog.accept()

    def go(self) -> None:
        """Load the page (again) and wait until the graph can be used."""
        self.raw.goto(self.url)
        self._settle()

    def reload(self) -> None:
        """Press F5."""
        self.raw.reload()
        self._settle()

    def _settle(self) -> None:
        self.raw.wait_for_function(
            "() => window.comfyAPI?.app?.app && window.comfyAPI?.api?.api", timeout=60_000
        )
        self.raw.evaluate(PROBE)
        self.raw.wait_for_function("() => window.probe.ready()", timeout=60_000)

    def ask(self, code: str, *arguments: Any) -> Any:
        """Evaluate an expression of ``probe``; ``a`` holds the arguments."""
        return self.raw.evaluate(f"async (a) => await window.probe.{code}", list(arguments))

    def wait(self, code: str, *arguments: Any, timeout_s: float = 60) -> None:
        """Wait until an expression of ``probe`` holds."""
        self.raw.wait_for_function(
            f"(a) => window.probe.{code}", arg=list(arguments), timeout=timeout_s * 1000
        )

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in UI format."""
        self.ask("app.loadGraphData(a[0], true, true, null)", workflow)
        self.wait("app.rootGraph.nodes.length === a[0]", len(workflow["nodes"]))

    def build(self, *types: str) -> list[str]:
        """Open a workflow of one node of each type, in a row; return their ids."""
        ids: list[str] = self.ask("build(a[0])", list(types))
        return ids

    def set(self, setting: str, value: Any) -> None:
        """Change a setting in the running page."""
        self.ask("app.extensionManager.setting.set(a[0], a[1])", setting, value)

    def frame(self, margin: int = 60) -> None:
        """Bring all nodes into view, and wait until they are drawn there."""
        self.ask("frame(a[0])", margin)

    def queue(self) -> None:
        """Press Run."""
        self.ask("app.queuePrompt(0, 1)")

    def shoot(self, name: str) -> None:
        """Save a screenshot into the folder named by LORAGRAFT_SCREENSHOTS, if any."""
        if folder := os.environ.get("LORAGRAFT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.raw.screenshot(path=str(Path(folder, f"{name}.png")))

    def our_errors(self) -> list[str]:
        """Return the errors that name our pack, and every uncaught one."""
        ours = ("loragraft", "uncaught:")
        return [e for e in self.errors if any(word in e.lower() for word in ours)]


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the system's Chromium (CHROMIUM_PATH names another one)."""
    path = next(
        p for name in (os.environ.get("CHROMIUM_PATH"), *CHROMIUM) if name and (p := shutil.which(name))
    )
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def open_page(
    chromium: Browser,
    server: Any,
    *,
    nodes2: bool = False,
    locale: str = "en",
    light: bool = False,
    size: dict[str, int] | None = None,
    scale: float = 1,
) -> Iterator[Page]:
    """Open the server's page in a fresh profile, with first-run dialogs off."""
    settings = {
        **SETTINGS,
        "Comfy.Locale": locale,
        "Comfy.VueNodes.Enabled": nodes2,
        "Comfy.ColorPalette": "light" if light else "dark",
    }
    server.request("POST", "/settings", settings)
    viewport: Any = size or SIZE
    context = chromium.new_context(viewport=viewport, device_scale_factor=scale, reduced_motion="reduce")
    try:
        page = Page(context.new_page(), server.url)
        page.go()
        yield page
    finally:
        context.close()
