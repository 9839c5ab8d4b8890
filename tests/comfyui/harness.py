"""A real ComfyUI server in a scratch folder, for tests: start, stop, queue, wait, interrupt, log.

    with Comfy.start(comfyui, base, pack) as server:
        prompt_id = server.queue(prompt)
        entry = server.wait(prompt_id)

Nothing of ComfyUI's own folder is written to. All waiting is on the server's events.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = ("models/checkpoints", "models/loras", "custom_nodes", "input", "output", "temp", "user")
REQUIRED = (
    "torch",
    "aiohttp",
    "alembic",
    "av",
    "comfyui_frontend_package",
    "einops",
    "kornia",
    "scipy",
    "spandrel",
    "sqlalchemy",
    "torchsde",
    "transformers",
)
FINAL = ("execution_success", "execution_error", "execution_interrupted")

Event = dict[str, Any]


class ServerError(RuntimeError):
    """The server did not do what a test needs; the message ends with its log."""


def python() -> str:
    """Return the interpreter that has ComfyUI's requirements: COMFYUI_PYTHON, else this one."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def cannot_run() -> str | None:
    """Say why the interpreter cannot run ComfyUI, or None."""
    lacking = f"', '.join(n for n in {REQUIRED!r} if not find_spec(n))"
    code = f"from importlib.util import find_spec; exit({lacking} or 0)"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return f"{python()} lacks of ComfyUI's requirements: {reason}; install them, or set COMFYUI_PYTHON"


def free_port() -> int:
    """Return a port that nothing uses at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_gpu() -> bool:
    """Say whether the server shall use a GPU: LORAGRAFT_HOST_DEVICE=gpu, as `make test-gpu` sets."""
    return os.environ.get("LORAGRAFT_HOST_DEVICE") == "gpu"


class Comfy:
    """A running server. ``base`` is its scratch folder, ``url`` where a browser finds it."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.base, self.port, self._process = base, port, process
        self.client_id = uuid.uuid4().hex
        self.start_seconds = 0.0
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None

    # ---- start and stop ----

    @classmethod
    def start(
        cls,
        comfyui: Path,
        base: Path,
        pack: Path,
        *,
        port: int | None = None,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        timeout_s: float = 180,
    ) -> Comfy:
        """Start ComfyUI with ``pack`` linked into its custom_nodes; returns when it answers."""
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "ComfyUI-LoraGraft"
        if not link.is_symlink():
            link.symlink_to(pack, target_is_directory=True)
        port = port or free_port()
        command = [
            python(),
            str(HERE / "launch.py"),
            str(comfyui),
            *([] if on_gpu() else ["--cpu"]),
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--base-directory",
            str(base),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
            "--disable-auto-launch",
            "--verbose",
            "INFO",
            *args,
        ]
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        with (base / "server.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=base)
        server = cls(base, port, process)
        begun = time.monotonic()
        try:
            while True:
                try:
                    server.get("/system_stats")
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() - begun > timeout_s:
                        raise server._failed("did not start") from None
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)  # nothing announces an open port; an early death ends this
            server._listen()
        except BaseException:
            server.stop()
            raise
        server.start_seconds = time.monotonic() - begun
        return server

    def stop(self) -> None:
        """End the server process."""
        if self._socket is not None:
            self._socket.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Comfy:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- what a test asks ----

    @property
    def url(self) -> str:
        """Return the address for a browser."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Return all that the server printed, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.base / "server.log").read_text("utf-8", "replace"))

    def object_info(self) -> dict[str, Any]:
        """Return the schemas of all nodes."""
        return self.get("/object_info")

    def post_prompt(
        self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Post an API-format prompt; return the HTTP status and the answer, whatever they are."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        return self.request("POST", "/prompt", body)

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Queue an API-format prompt and return its id; raises where validation refuses it."""
        status, answer = self.post_prompt(prompt, workflow)
        if status != 200 or answer.get("node_errors"):
            raise ServerError(f"/prompt answered {status}: {json.dumps(answer)[:4000]}")
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, timeout_s: float = 300) -> dict[str, Any]:
        """Return the prompt's history entry once it has ended, however it ended."""

        def ended(event: Event) -> bool:
            return event["type"] in FINAL and event["data"].get("prompt_id") == prompt_id

        self.wait_event(ended, timeout_s=timeout_s)
        # The entry is written just after the last event, before the queue's status is sent again.
        for _ in range(200):
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return dict(entry)
            with self._changed:
                self._changed.wait(0.05)
        raise self._failed(f"has no history of {prompt_id}")

    def run(
        self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None, timeout_s: float = 300
    ) -> dict[str, Any]:
        """Queue a prompt and return its outputs by node; raises where it failed."""
        entry = self.wait(self.queue(prompt, workflow), timeout_s)
        if entry["status"]["status_str"] != "success":
            raise ServerError(error_text(entry) or f"the prompt failed: {json.dumps(entry['status'])[:3000]}")
        return dict(entry["outputs"])

    def interrupt(self) -> None:
        """Press Cancel."""
        self.request("POST", "/interrupt", {})

    def events(self, kind: str | None = None, since: int = 0) -> list[Event]:
        """Return the events received so far (from number ``since``), of one type or all."""
        with self._changed:
            return [e for e in self._events[since:] if kind in (None, e["type"])]

    def mark(self) -> int:
        """Return how many events were received, as ``since`` for later."""
        with self._changed:
            return len(self._events)

    def wait_event(self, wanted: Callable[[Event], bool], *, since: int = 0, timeout_s: float = 120) -> Event:
        """Return the first event from number ``since`` on that ``wanted`` accepts, once it is there."""
        deadline = time.monotonic() + timeout_s
        seen = since
        with self._changed:
            while True:
                for event in self._events[seen:]:
                    if wanted(event):
                        return event
                seen = len(self._events)
                rest = deadline - time.monotonic()
                if rest <= 0 or self._process.poll() is not None:
                    raise self._failed(f"sent no such event within {timeout_s:g} s")
                self._changed.wait(min(rest, 5))

    def get(self, path: str) -> dict[str, Any]:
        """GET a JSON answer."""
        return self.request("GET", path)[1]

    def view(self, image: dict[str, str]) -> bytes:
        """Return the bytes of an output image as the browser gets them."""
        from urllib.parse import urlencode

        keys = ("filename", "subfolder", "type")
        return self._raw("GET", "/view?" + urlencode({k: image[k] for k in keys}))[1]

    def request(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """Send a JSON request; return the HTTP status and the JSON answer ({} where there is none)."""
        status, data = self._raw(method, path, body)
        try:
            return status, json.loads(data) if data else {}
        except ValueError:
            return status, {"text": data.decode("utf-8", "replace")}

    # ---- inside ----

    def _raw(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _failed(self, what: str) -> ServerError:
        return ServerError(f"ComfyUI {what}; the end of its log:\n{self.log[-3000:]}")

    def _listen(self) -> None:
        """Open the event socket (RFC 6455, as little of it as a client needs)."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET /ws?clientId={self.client_id} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            "",
            "",
        )
        sock.sendall("\r\n".join(lines).encode())
        stream = sock.makefile("rb")
        if b"101" not in stream.readline():
            raise self._failed("refused the event socket")
        while stream.readline().strip():
            pass
        sock.settimeout(None)
        self._socket = sock
        threading.Thread(target=self._read, args=(sock, stream), daemon=True).start()

    def _read(self, sock: socket.socket, stream: Any) -> None:
        message = b""
        try:
            while True:
                first, second = stream.read(2)
                length = second & 127
                if length >= 126:
                    length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
                data = stream.read(length)
                opcode = first & 15
                if opcode == 9:  # ping: answer with a masked pong
                    sock.sendall(bytes([0x8A, 0x80 | len(data), 0, 0, 0, 0]) + data)
                elif opcode == 8:
                    break
                elif opcode in (0, 1, 2):
                    message += data
                    if opcode == 2:
                        self._add({"type": "binary", "data": {"size": len(data)}})
                        message = b""
                    elif first & 128:
                        self._add(json.loads(message))
                        message = b""
        except (OSError, ValueError, TypeError):
            pass
        with self._changed:
            self._changed.notify_all()

    def _add(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()


def error_text(entry: dict[str, Any]) -> str:
    """Return the message of a failed prompt's error, or ""."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return str(data["exception_message"])
    return ""
