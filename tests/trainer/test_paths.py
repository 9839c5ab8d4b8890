"""The path gate: what a shared workflow may name, and everything that it may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer import api
from loragraft.trainer.api import of_other_system, resolve, safe_name
from loragraft.trainer.data.dataset_toml import parse_config
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer.data_folders import Refusal

# Every one of these is refused as a path, on every system.
HOSTILE = [
    "", " ", "\t", "..", "../", "../x", "a/..", "a/../../x", "a/../b", "./../x", "a/./../../x", "..\\x",
    "a\\..\\..\\x", "/", "/etc/passwd", "//server/share", "\\\\server\\share", "\\\\?\\C:\\x", "\\", "\\x",
    "C:", "C:\\x", "C:/x", "c:x", "file:///etc/passwd", "http://x/y", "~", "~/x", "~root/x",
    "$HOME/x", "${HOME}", "a/$X", "%USERPROFILE%\\x", "a/%X%", "a%2e%2e/x",
    "a\0", "a\0.png", "a\nb", "a\rb", "a\x1bb", "a\x7f", "\x01", "x\n", "a/b\n", "a\x85b",
    "\ud800", "a/\udc80b", "a\u202egnp.exe", "a\u2028b", "a:stream", "a.txt:$DATA",
    "con", "CON", "con.txt", "a/NUL", "nul.safetensors", "com1", "LPT9.x", "aux/x", "prn ", "CONIN$",
    "com\u00b9", "lpt\u00b3.txt", "a.", "a ", "a. ", "a./b", "a /b", " a", "a/ b", "...", "a/...", ". .",
    "a<b", "a>b", 'a"b', "a|b", "a?b", "a*b", "x" * 201, "a/" * 120, "x" * 121, "\u540d" * 41,
]  # fmt: skip
FINE = [
    "a", "a/b", "a/b.png", ".hidden", "a/.b", "a b", "a-b_c", "\u540d\u524d/\u00fc.png", "x" * 120,
    "\u540d" * 40, "concert", "console/x", "com10", "null", "a.b.c", "a/./b", "a//b", "a/", "caf\u00e9",
    "cafe\u0301", "a,b;c=d&e", "(1) [x] {y}", "'", "!", "#", "@", "^", "+", "-rf", "\U0001f600",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the allowed folder; beside it lies what must stay out of reach."""
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "secret").write_text("x", encoding="utf-8")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_there_are_enough_payloads() -> None:
    assert len(set(HOSTILE)) >= 70


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(t)[:30] for t in HOSTILE])
def test_a_path_that_leaves_or_is_none_is_refused(root: Path, text: str) -> None:
    with Refusal("LG-PATH-002", "the folder"):
        resolve(root, text, what="the folder")


@pytest.mark.parametrize("text", FINE)
def test_ordinary_paths_stay_below_the_root(root: Path, text: str) -> None:
    found = resolve(root, text, what="folder")
    assert found.is_relative_to(os.path.realpath(root))
    assert found == Path(os.path.realpath(root), *[p for p in text.split("/") if p not in ("", ".")])


def test_the_root_itself_and_its_like_named_neighbour(root: Path) -> None:
    assert resolve(root, ".", what="folder") == Path(os.path.realpath(root))
    with Refusal("LG-PATH-002"):
        resolve(root, "../root2/secret", what="folder")
    with Refusal("LG-PATH-002"):
        resolve(root, str(root / "x"), what="folder")


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_links_may_lead_within_the_root_but_not_out(root: Path, tmp_path: Path) -> None:
    (root / "sub").mkdir()
    (root / "inside").symlink_to(root / "sub")
    (root / "outside").symlink_to(tmp_path / "root2")
    (root / "file").symlink_to(tmp_path / "root2" / "secret")
    (root / "dangling").symlink_to("/no/such/place")
    (root / "sub" / "up").symlink_to("../..")
    assert resolve(root, "inside/x", what="folder") == Path(os.path.realpath(root)) / "sub" / "x"
    for text in (
        "outside",
        "outside/secret",
        "outside/new",
        "file",
        "dangling",
        "sub/up",
        "inside/up/root2/secret",
    ):
        with Refusal("LG-PATH-002", "link"):
            resolve(root, text, what="folder")
    (tmp_path / "alias").symlink_to(root)
    assert resolve(tmp_path / "alias", "sub", what="folder") == Path(os.path.realpath(root)) / "sub"


def test_a_loop_of_links_ends_in_a_refusal(root: Path) -> None:
    if os.name == "nt":
        pytest.skip("links need a right on Windows")
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    for text in ("a", "a/x"):
        with pytest.raises(LoraGraftError):
            resolve(root, text, what="folder", must_exist=True)


def test_what_must_exist_is_looked_for(root: Path) -> None:
    (root / "here").mkdir()
    assert resolve(root, "here", what="folder", must_exist=True).is_dir()
    with Refusal("LG-PATH-003", "'gone'", str(root)):
        resolve(root, "gone", what="folder", must_exist=True)
    assert not (root / "gone").exists()


@pytest.mark.parametrize("text", [r"C:\data\images", "D:/images", r"\\server\share\a"])
def test_a_path_of_windows_is_called_one_elsewhere(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_other_system(text, "posix") == ", and this is a path of Windows"
    assert of_other_system(text, "nt") == ""
    if os.name != "nt":
        for code, look in (
            ("LG-DATA-001", lambda: api.scan_folder(text)),
            ("LG-BASE-001", lambda: api.open_base(Path(text))),
            ("LG-DATA-084", lambda: parse_config(Path(text + ".toml"))),
            ("LG-IMP-001", lambda: api.read_foreign(Path(text + ".toml"))),
        ):
            with Refusal(code, "and this is a path of Windows"):
                look()


def test_a_path_of_linux_is_called_one_on_windows() -> None:
    for text in ("/home/me/images", "~/images"):
        assert of_other_system(text, "nt") == ", and this is a path of Linux or macOS"
        assert of_other_system(text, "posix") == ""
    for text in ("images", "C-images", "c:", "a/b", "", "."):
        assert of_other_system(text, "nt") == of_other_system(text, "posix") == ""


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_resolved_inside_or_refused(text: str) -> None:
    root = Path("/allowed/root")
    try:
        found = resolve(root, text, what="folder")
    except LoraGraftError as error:
        assert error.code == "LG-PATH-002"
    else:
        assert found.is_relative_to(os.path.realpath(root))
        str(found).encode()


# ---- names ----


# Names of files, odd ones, that as paths would be read as something else.
ODD = {"~", "${HOME}", "a%2e%2e/x"}


@pytest.mark.parametrize(
    "name",
    [*[h for h in HOSTILE if h not in ODD], ".hidden", "a/b", "a\\b", "a.safetensors", "a.SafeTensors"],
    ids=lambda n: ascii(n)[:30],
)
def test_a_name_is_refused_where_some_system_could_not_hold_it(name: str) -> None:
    with Refusal("LG-PATH-001", "output_name"):
        safe_name(name, what="output_name")


@pytest.mark.parametrize("name", [f for f in FINE if "/" not in f and not f.startswith(".")])
def test_ordinary_names_are_kept_as_they_are(name: str, tmp_path: Path) -> None:
    assert safe_name(name) == name
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
