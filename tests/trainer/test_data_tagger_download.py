"""Downloads by the real library from a hub on this machine: pinned, verified, only when asked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loragraft.trainer.data import tagger_download, tagger_models
from loragraft.trainer.data.tagger_download import download_lines, download_tagger, known_tagger
from loragraft.trainer.data.tagger_models import Known, Pin
from loragraft_tests.trainer.data_folders import Refusal

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GRAPH = bytes(range(256)) * 40_000  # some chunks
LABELS = b"tag_id,name,category,count\n1,cat,0,1\n"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: files at a commit, large ones behind a redirect."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {"model.onnx": GRAPH, "selected_tags.csv": LABELS}
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        self.server.headers.append(dict(self.headers))
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        content = self.server.files.get(name)
        if content is None or f"/{COMMIT}/" not in self.path:
            self.send_error(404)
            return
        if name == "model.onnx" and "/cdn/" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/cdn/{COMMIT}/{name}")
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", "0")
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body and ("/cdn/" in self.path or name != "model.onnx"):
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub that the library takes for the real one, with one tagger in the table."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
        server.shutdown()


def pin(name: str, content: bytes, size: int | None = None) -> Pin:
    return Pin(name, hashlib.sha256(content).hexdigest(), len(content) if size is None else size)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Put one small tagger into the table."""
    known = Known("wd-test", COMMIT, (pin("model.onnx", GRAPH), pin("selected_tags.csv", LABELS)))
    monkeypatch.setattr(tagger_download, "KNOWN", (known,))
    monkeypatch.setattr(tagger_download, "SPARE_BYTES", 0)
    return known


def test_a_download_is_whole_verified_and_tells_its_progress(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # not sent: what is fetched is public
    steps: list[tuple[int, int]] = []
    files = download_tagger("wd-test", tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert files.name == "wd-test" and files.graph is not None
    assert files.graph.read_bytes() == GRAPH and files.labels.read_bytes() == LABELS
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.onnx", "selected_tags.csv", "wd-test"]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {total for _, total in steps} == {len(GRAPH) + len(LABELS)}
    assert steps[-1][0] == len(GRAPH) + len(LABELS)
    assert any(f"/SmilingWolf/wd-test/resolve/{COMMIT}/model.onnx" in path for path in hub.seen)
    assert not any("authorization" in {k.lower() for k in headers} for headers in hub.headers)


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    download_tagger("wd-test", tmp_path)
    hub.seen.clear()
    download_tagger("wd-test", tmp_path)
    assert hub.seen == []
    assert download_lines("wd-test", tmp_path) == [f"wd-test is in {tmp_path}, verified."]
    (tmp_path / "wd-test/selected_tags.csv").write_bytes(b"damaged")
    assert "selected_tags.csv" in download_lines("wd-test", tmp_path)[1]
    download_tagger("wd-test", tmp_path)
    assert (tmp_path / "wd-test/selected_tags.csv").read_bytes() == LABELS
    assert not any("model.onnx" in path for path in hub.seen), "only the damaged file"


def test_another_content_is_refused_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.onnx"] = GRAPH[:-1] + b"!"
    with Refusal("LG-DATA-065", "model.onnx", "wd-test", hashlib.sha256(GRAPH).hexdigest()):
        download_tagger("wd-test", tmp_path)
    assert not list(tmp_path.rglob("model.onnx"))
    hub.files["model.onnx"] = GRAPH
    assert download_tagger("wd-test", tmp_path).graph is not None


def test_a_size_that_is_not_published_is_no_obstacle(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Known
) -> None:
    unsized = Pin("model.onnx", table.files[0].sha256, None)
    monkeypatch.setattr(tagger_download, "KNOWN", (Known("wd-test", COMMIT, (unsized, table.files[1])),))
    assert "size not published" in download_lines("wd-test", tmp_path)[1]
    steps: list[tuple[int, int]] = []
    download_tagger("wd-test", tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] <= steps[-1][1]


def test_cancel_stops_the_transfer(hub: Hub, tmp_path: Path) -> None:
    class Cancelled(BaseException):
        pass

    def progress(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        download_tagger("wd-test", tmp_path, progress=progress)
    assert not (tmp_path / "wd-test").exists()
    assert download_tagger("wd-test", tmp_path).graph is not None


def test_offline_means_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Refusal("LG-DATA-064", "HF_HUB_OFFLINE", "model.onnx", COMMIT):
        download_tagger("wd-test", tmp_path)
    assert hub.seen == []


def test_a_missing_file_an_unreachable_hub_and_a_full_disk_are_refusals(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files["selected_tags.csv"]
    with Refusal("LG-DATA-064", "404", "HF_ENDPOINT"):
        download_tagger("wd-test", tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(tagger_download, "SPARE_BYTES", 2**80)
        with Refusal("LG-DATA-064", "GiB are needed"):
            download_tagger("wd-test", tmp_path / "b")
    (tmp_path / "file").write_text("x")
    with Refusal("LG-DATA-064"):
        download_tagger("wd-test", tmp_path / "file" / "below")


def test_only_the_table_is_fetched(tmp_path: Path) -> None:
    for name in ("wd-tets", "../wd-test", "SmilingWolf/wd-test", "https://example.org/x", ""):
        with Refusal("LG-DATA-064", "wd-test"):
            known_tagger(name)
        with Refusal("LG-DATA-064"):
            download_tagger(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_looking_touches_no_network(hub: Hub, tmp_path: Path) -> None:
    lines = download_lines("wd-test", tmp_path / "taggers")
    assert len(lines) == 3 and "10.2 MB" in lines[1] and hashlib.sha256(LABELS).hexdigest() in lines[2]
    assert hub.seen == [] and not (tmp_path / "taggers").exists()


def test_the_environment_names_the_mirror(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, in which HF_ENDPOINT is all that points to this hub."""
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('loragraft', {str(ROOT / '__init__.py')!r},\n"
        f"    submodule_search_locations=[{str(ROOT)!r}])\n"
        "sys.modules['loragraft'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "from pathlib import Path\n"
        "from loragraft.trainer.data import tagger_download as d\n"
        "from loragraft.trainer.data.tagger_models import Known, Pin\n"
        f"pins = (Pin('selected_tags.csv', {hashlib.sha256(LABELS).hexdigest()!r}, {len(LABELS)}),\n"
        f"    Pin('model.onnx', {hashlib.sha256(GRAPH).hexdigest()!r}, {len(GRAPH)}))\n"
        f"d.KNOWN = (Known('wd-test', {COMMIT!r}, pins),)\n"
        "print(d.download_tagger('wd-test', Path(sys.argv[1])).name)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "taggers")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "wd-test", done.stderr
    assert (tmp_path / "taggers/wd-test/model.onnx").read_bytes() == GRAPH


def test_nothing_else_downloads() -> None:
    """The one call of the library is in tagger_download; tokenizers have their own, asked for by a flag."""
    callers = [
        path.relative_to(ROOT).as_posix()
        for folder in ("nodes", "trainer")
        for path in (ROOT / folder).rglob("*.py")
        if "tagger_download" in path.read_text("utf-8") or "download_tagger" in path.read_text("utf-8")
    ]
    allowed = {"trainer/api.py", "trainer/data/tagger_download.py", "trainer/commands/dataset_captions.py"}
    assert set(callers) <= allowed | {"nodes/tagging.py"}
    assert tagger_models.__doc__ and "nothing is fetched here" in tagger_models.__doc__
