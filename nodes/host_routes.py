"""The pack's only route: a question about settings, answered from the question alone; it reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server import PromptServer, web

ROUTE = "/loragraft/ahead"


def register(answer: Callable[[str], dict[str, Any]]) -> None:
    """Let the server that is being started answer GET questions with ``answer``."""

    @PromptServer.instance.routes.get(ROUTE)
    async def ahead(request: web.Request) -> web.Response:
        return web.json_response(answer(request.query.get("ask", "")))
