"""Build the registry's zip from the files that ship, and scan them for what may not ship.

The zip holds what .gitignore and .comfyignore leave. The scan is as blunt as the registry's own:
it matches substrings, in comments and messages too. Exits with 1 and writes nothing on a finding.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

from pathspec import GitIgnoreSpec

ROOT = Path(__file__).resolve().parent.parent
MAX_ZIP_BYTES = 20 * 2**20
MAX_DEMO_BYTES = 16 * 2**20  # embedded base model and sample dataset together
MAX_JS_LINE = 300  # a longer one was written by a machine

TEXT_SUFFIXES = {".py", ".js", ".json", ".md", ".toml", ".txt", ".css", ".html", ".yml", ".yaml", ""}

# (what it is, pattern), over each line of a file.
FORBIDDEN_IN_PYTHON = (
    ("eval", r"eval\("),
    ("exec", r"exec\("),
    ("subprocess", r"subprocess"),
    ("os.system", r"os\.system|os\.popen|os\.startfile|shell=True"),
    ("pickle", r"pickle|cloudpickle|\bdill\b"),
    ("marshal", r"\bmarshal\b"),
    ("__import__", r"__import__"),
    ("ctypes", r"\bctypes\b"),
    ("requests", r"\brequests\b"),
    ("urllib", r"urllib|http\.client|aiohttp"),
    ("torch.load", r"torch\.load|torch\.save"),
    ("socket", r"\.connect\(|\.bind\(|import socket|socket\.socket"),
    ("opencv", r"\bcv2\b"),
    ("remote code", r"trust_remote_code=True"),
    ("process-wide change", r"sys\.path\.|os\.chdir|os\.environ\[.*\]\s*=[^=]|os\.putenv"),
)
FORBIDDEN_IN_JS = (
    ("innerHTML", r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment"),
    ("eval", r"eval\(|\bFunction\(|import\("),
    ("bind", r"\.bind\("),
    ("connect", r"\.connect\("),
    ("javascript link", r"javascript:"),
    (
        "another server",
        r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink|1999/xhtml))|\bWebSocket\b|XMLHttpRequest",
    ),
    ("vendored or minified", r"@license|sourceMappingURL"),
)
FORBIDDEN_EVERYWHERE = (("machine path", r"/tmp/|/work/|/root/|/home/|[A-Z]:\\\\?Users"),)


def shipped_files(root: Path) -> list[Path]:
    """Return what the registry's zip holds, sorted: all files but the ignored ones."""
    lines = [".git/"]
    for name in (".gitignore", ".comfyignore"):
        lines += (root / name).read_text(encoding="utf-8").splitlines()
    ignored = GitIgnoreSpec.from_lines(lines)
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [
            f for f in folders if not ignored.match_file(f"{(here / f).relative_to(root).as_posix()}/")
        ]
        for name in files:
            path = here / name
            if not ignored.match_file(path.relative_to(root).as_posix()):
                found.append(path)
    return sorted(found)


def scan(root: Path, files: list[Path]) -> list[str]:
    """Return one line per finding in the files that ship; empty when they are clean."""
    found = []
    for path in files:
        name = path.relative_to(root).as_posix()
        if path.suffix not in TEXT_SUFFIXES:
            continue
        if name.endswith(".min.js"):
            found.append(f"{name}: vendored or minified")
        rules = list(FORBIDDEN_EVERYWHERE)
        if path.suffix == ".py":
            rules += FORBIDDEN_IN_PYTHON
        if path.suffix in (".js", ".html", ".css"):
            rules += FORBIDDEN_IN_JS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [
                f"{name}:{number}: {what}: {line.strip()[:100]}"
                for what, rule in rules
                if re.search(rule, line)
            ]
            if path.suffix == ".js" and len(line) > MAX_JS_LINE:
                found.append(f"{name}:{number}: vendored or minified: a line of {len(line)} characters")
    return found


def demo_bytes(root: Path, files: list[Path]) -> int:
    """Return the size of the embedded base model and sample dataset."""
    demo = root / "trainer" / "demo"
    return sum(f.stat().st_size for f in files if f.is_relative_to(demo) and f.suffix != ".py")


def write_zip(root: Path, files: list[Path], target: Path) -> int:
    """Write the zip and return its size in bytes; the same files give the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())  # dated 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return target.stat().st_size


def main() -> None:
    """Scan, then write dist/loragraft.zip."""
    files = shipped_files(ROOT)
    found = scan(ROOT, files)
    if demo_bytes(ROOT, files) > MAX_DEMO_BYTES:
        found.append(
            f"trainer/demo: {demo_bytes(ROOT, files):,} bytes of model and images, at most {MAX_DEMO_BYTES:,}"
        )
    if found:
        sys.exit("\n".join(found))
    target = ROOT / "dist" / "loragraft.zip"
    size = write_zip(ROOT, files, target)
    if size > MAX_ZIP_BYTES:
        sys.exit(f"{target.name} has {size:,} bytes, at most {MAX_ZIP_BYTES:,} are allowed")
    print(f"{target.relative_to(ROOT)}: {len(files)} files, {size / 2**20:.1f} MiB, 0 findings")


if __name__ == "__main__":
    main()
