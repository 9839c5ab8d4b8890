"""What ships is clean and small, and every error code is documented and provoked."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from loragraft_tests.shipping import package

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"LG-[A-Z]+-\d{3}")
SHIPPED = package.shipped_files(ROOT)
NAMES = {path.relative_to(ROOT).as_posix() for path in SHIPPED}


def test_nothing_forbidden_ships() -> None:
    found = package.scan(ROOT, SHIPPED)
    assert not found, "\n".join(found)


def test_what_ships() -> None:
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= NAMES
    assert {"nodes/extension.py", "trainer/api.py", "trainer/__main__.py"} <= NAMES
    assert any(name.startswith("js/") for name in NAMES)
    assert any(name.startswith("locales/") for name in NAMES)
    for folder in ("tests/", "docs/", "benchmarks/", ".ci/", ".git", "output/", ".venv"):
        assert not [name for name in NAMES if name.startswith(folder)]
    code = {"", ".py", ".js", ".json", ".md", ".toml", ".txt"}
    strange = (
        {Path(name).suffix for name in NAMES} - code - {".caption", ".png", ".jpg", ".webp", ".safetensors"}
    )
    assert not strange


def test_sizes(tmp_path: Path) -> None:
    assert package.demo_bytes(ROOT, SHIPPED) <= package.MAX_DEMO_BYTES
    assert package.write_zip(ROOT, SHIPPED, tmp_path / "a.zip") <= package.MAX_ZIP_BYTES


def test_the_zip_holds_each_file_and_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        package.write_zip(ROOT, SHIPPED, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == NAMES


PLANTED = (
    ("a.py", "model.eval()"),
    ("a.py", "exec(x)"),
    ("a.py", "import subprocess"),
    ("a.py", "os.system('x')"),
    ("a.py", "# unlike pickle"),
    ("a.py", "import marshal"),
    ("a.py", "__import__('x')"),
    ("a.py", "from ctypes import cdll"),
    ("a.py", "import requests"),
    ("a.py", "from urllib.request import urlopen"),
    ("a.py", "torch.load(path)"),
    ("a.py", "s.connect(('a', 1))"),
    ("a.py", "sys.path.append('x')"),
    ("a.py", "ROOT = '/home/me/x'"),
    ("a.json", '"C:\\\\Users\\\\me"'),
    ("a.md", "see /tmp/x"),
    ("a.js", "e.innerHTML = x"),
    ("a.js", "e.insertAdjacentHTML('beforeend', x)"),
    ("a.js", "new Function('x')"),
    ("a.js", "f.bind(this)"),
    ("a.js", "node.connect(0, other, 0)"),
    ("a.js", "import 'https://cdn.example/x.js'"),
    ("a.js", "const a=1;" * 40),
    ("b.min.js", ""),
)


@pytest.mark.parametrize(("name", "text"), PLANTED)
def test_the_scan_catches(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(f"// a line before\n{text}\n", encoding="utf-8")
    assert len(package.scan(tmp_path, [tmp_path / name])) >= 1


def test_the_scan_passes_clean_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("model.train(False)\nvalue = evaluate(x)\n", encoding="utf-8")
    (tmp_path / "a.js").write_text('e.textContent = "http: no";\nnode.connected = 1;\n', encoding="utf-8")
    assert package.scan(tmp_path, [tmp_path / "a.py", tmp_path / "a.js"]) == []


def test_ignored_files_do_not_ship(tmp_path: Path) -> None:
    for name in ("a.py", "docs/b.md", "trainer/docs/c.md", "__pycache__/d.pyc", "output/e.png", ".git/HEAD"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    for name in (".gitignore", ".comfyignore"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in package.shipped_files(tmp_path)]
    assert found == ["a.py", "trainer/docs/c.md"]


def test_every_error_code_is_documented() -> None:
    used = {
        code for path in SHIPPED if path.suffix == ".py" for code in CODE.findall(path.read_text("utf-8"))
    }
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (LG-[A-Z]+-\d{3})\b", text, flags=re.MULTILINE)
    assert len(headings) == len(set(headings)), "a code has two headings"
    assert set(headings) == used


def test_every_error_code_is_provoked_by_a_test() -> None:
    used = {
        code for path in SHIPPED if path.suffix == ".py" for code in CODE.findall(path.read_text("utf-8"))
    }
    tested = {
        code for path in (ROOT / "tests").rglob("test_*.py") for code in CODE.findall(path.read_text("utf-8"))
    }
    assert used - tested == set()


def test_every_error_is_raised_with_a_literal_code() -> None:
    """A code that is put together from parts could be found by neither of the tests above."""
    for path in SHIPPED:
        if path.suffix == ".py" and path.name != "errors.py":
            for call in re.findall(r"LoraGraftError\(\s*([^\s,)]*)", path.read_text("utf-8")):
                assert CODE.fullmatch(call.strip("\"'")) or call.isidentifier(), f"{path}: {call}"
