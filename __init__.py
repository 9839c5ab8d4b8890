"""ComfyUI's door to LoraGraft: a web directory and a lazy entry point, nothing else.

Importing this file imports no torch and no ComfyUI, so that the same folder serves as the
Python package ``loragraft`` for headless use and for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

__version__ = "0.1.0"

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension that lists LoraGraft's nodes; called once by ComfyUI at start-up."""
    from .nodes.extension import create_extension

    return create_extension()
