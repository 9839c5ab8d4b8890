"""Fetch a tagger that the user asks for: only from the table, at its commit, verified by its hash.

Hugging Face's own library does it, so HF_ENDPOINT (mirrors) and HF_HUB_OFFLINE are honoured. Nothing
else in this package calls this.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoraGraftError, nearest
from .images import shown
from .tagger_models import KNOWN, Known, Pin, TaggerFiles, find_taggers

CHUNK_BYTES = 2**22
SPARE_BYTES = 2**30  # room that is left free on the disk
Progress = Callable[[int, int], None]


def known_tagger(name: str) -> Known:
    """Return the table's entry; raises LG-DATA-064 for what it does not hold."""
    for known in KNOWN:
        if known.name == name:
            return known
    guess = nearest(name, [known.name for known in KNOWN])
    raise _refused(
        name,
        "only taggers whose content is known beforehand are fetched.",
        f"take one of {', '.join(known.name for known in KNOWN)}"
        + (f"; nearest: {guess[0]}" if guess else "")
        + "; or put the files of another one there yourself",
    )


def download_lines(name: str, folder: Path) -> list[str]:
    """Say what a download would fetch, from where and where to; touches no network."""
    known = known_tagger(name)
    if missing := _missing(known, folder / name):
        lines = [f"{known.name} is not (wholly) in {folder}. A download would fetch:"]
        for pin in missing:
            size = f"{pin.size / 10**6:.1f} MB" if pin.size else "size not published"
            lines.append(f"  {known.repo}/{pin.file} at {known.commit[:12]}, {size}, sha256 {pin.sha256}")
        return lines
    return [f"{known.name} is in {folder}, verified."]


def download_tagger(name: str, folder: Path, *, progress: Progress | None = None) -> TaggerFiles:
    """Fetch a tagger of the table into ``folder/name``; what is there already is verified and kept.

    ``progress`` gets (bytes done, bytes in all); what it raises ends the download. A file lies under
    its name only once its hash is right. Raises LG-DATA-064 (not possible) and LG-DATA-065 (another
    content than expected).
    """
    known = known_tagger(name)
    target = folder / name
    missing = _missing(known, target)
    if missing:
        _check_room(known, missing, folder)
        part = folder / f"{name}.part"
        done, total = 0, sum(pin.size or 0 for pin in missing)
        for pin in missing:
            fetched = _fetch(known, pin, part, _counted(progress, done, total))
            _verify(known, pin, fetched)
            target.mkdir(parents=True, exist_ok=True)
            fetched.replace(target / pin.file)
            done += pin.size or 0
        shutil.rmtree(part, ignore_errors=True)  # the library's notes on what it fetched
    return find_taggers([folder], hub_cache=False)[name]


def _missing(known: Known, folder: Path) -> list[Pin]:
    """Return the files that are not there with the right content."""
    return [
        pin
        for pin in known.files
        if not (folder / pin.file).is_file() or _sha256(folder / pin.file) != pin.sha256
    ]


def _fetch(known: Known, pin: Pin, part: Path, progress: Progress | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _refused(
            known.name,
            "HF_HUB_OFFLINE is set, so nothing may be fetched.",
            f"unset HF_HUB_OFFLINE, or copy {pin.file} of {known.repo}, commit {known.commit}, yourself",
        )
    options: dict[str, Any] = {}
    # Older versions of the library show their progress only on the console.
    if progress is not None and "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        options["tqdm_class"] = _bar(progress)
    try:
        fetched = huggingface_hub.hf_hub_download(
            known.repo, pin.file, revision=known.commit, local_dir=part, token=False, **options
        )
    except LoraGraftError:
        raise
    except Exception as error:  # the library, its transport and the disk each have their own
        cause = f"; {error.__cause__}" if error.__cause__ else ""
        reason = f"{type(error).__name__}: {shown(str(error).rstrip('.') + cause, 300)}"
        raise _refused(
            known.name,
            f"{reason}.",
            "check the connection and the free space, set HF_ENDPOINT to a mirror, or copy the files "
            f"of {known.repo} (commit {known.commit}) there yourself",
        ) from error
    if progress is not None:
        progress(Path(fetched).stat().st_size, pin.size or 0)
    return Path(fetched)


def _bar(progress: Progress) -> type[Any]:
    """Return a progress bar class for the library that reports here and prints nothing."""
    base: Any = importlib.import_module("huggingface_hub.utils").tqdm

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._bytes = int(options.get("initial") or 0)
            self._all = int(options.get("total") or 0)
            options["disable"] = True
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            self._bytes += int(n or 0)
            progress(self._bytes, self._all)
            return None

    return Bar


def _counted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a reporter for one file of several; never backwards, although the library may start again."""
    if progress is None:
        return None
    best = before

    def step(done: int, size: int) -> None:
        nonlocal best
        best = max(best, before + done)
        progress(best, max(total, best, before + size))

    return step


def _verify(known: Known, pin: Pin, file: Path) -> None:
    size = file.stat().st_size
    found = _sha256(file)
    if found == pin.sha256 and pin.size in (None, size):
        return
    file.unlink()
    raise LoraGraftError(
        "LG-DATA-065",
        f"The downloaded {pin.file} of {known.name} is not what was published.",
        where=f"{known.repo} at {known.commit}: {size} bytes, sha256 {found}",
        why=f"expected {pin.size or 'any number of'} bytes, sha256 {pin.sha256}; the file was deleted.",
        fix="download again; if a mirror is set by HF_ENDPOINT, take another one",
    )


def _check_room(known: Known, missing: list[Pin], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _refused(
            known.name, f"{shown(folder)}: {error.strerror}.", "allow writing to the folder"
        ) from error
    needed = sum(pin.size or 0 for pin in missing) + SPARE_BYTES
    if free < needed:
        raise _refused(
            known.name,
            f"{needed / 2**30:.1f} GiB are needed at {shown(folder)}, {free / 2**30:.1f} are free.",
            "free some space, or take a smaller tagger such as wd-vit-tagger-v3",
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refused(name: str, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-064",
        f"The tagger {shown(name, 60)} is not downloaded.",
        where=shown(repr(name)),
        why=why,
        fix=fix,
    )
