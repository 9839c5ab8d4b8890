"""The pack's only route: a question about settings, answered from the question alone; it reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from server import PromptServer, web

ROUTE = "/loragraft/ahead"


def register(answer: Callable[[str], dict[str, Any]]) -> None:
    """Let the server that is being started answer GET questions with ``answer``."""

    async def ahead(request: web.Request) -> web.Response:
        # In a thread: the loop here serves everything that the page does.
        return web.json_response(await asyncio.to_thread(answer, request.query.get("ask", "")))

    PromptServer.instance.routes.get(ROUTE)(ahead)
