"""The scores that one tagger gives to pictures, each computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import LoraGraftError, listed
from .cache import TensorCache, key_of
from .images import load_upright, pixels_key, shown
from .records import Record
from .tagger_models import Labels, TaggerFiles, read_labels
from .tagger_session import Floats, Session, open_session, prepare

# Part of the cache's keys: raise it when pictures would be prepared otherwise.
VERSION = 1
# Scores below this are taken as 0, so that an entry holds some hundred numbers and not ten thousand.
FLOOR = 1 / 1024
EDGE_BYTES = 2**20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """The scores of one picture from FLOOR on: which outputs, ascending, and how sure (0 to 1)."""

    outputs: npt.NDArray[np.int32]
    values: Floats


@dataclass(frozen=True)
class Scored:
    """One tagger's scores of all pictures in order, and what ran it."""

    labels: Labels
    scores: tuple[Scores, ...]
    lines: tuple[str, ...]


def score(
    records: Sequence[Record],
    files: TaggerFiles,
    *,
    device: str = "auto",
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Run one tagger over all pictures; those in the cache are not even opened.

    ``progress`` is called with (done, total) for every picture; what it raises ends the run, and what
    was computed stays in the cache. Raises LG-DATA-061 to -063, -066 and -009.
    """
    labels = read_labels(files.labels)
    store = TensorCache(cache) if cache is not None else None
    key = _model_key(files, device)
    keys = [_picture_key(record, key) for record in records]
    found = [_load(store, item, labels) for item in keys]
    todo = [index for index, scores in enumerate(found) if scores is None]
    done = len(records) - len(todo)
    lines = [f"{files.name}: {done} of {len(records)} pictures were scored before."] if done else []
    if progress is not None and done:
        progress(done, len(records))
    if todo:
        with open_session(files, device=device) as session:
            lines += [session.line, *session.notes]
            _check_count(session.num_tags, labels, files)
            for index, scores in _run(session, records, todo, labels, files, batch_size):
                found[index] = scores
                if store is not None and keys[index]:
                    store.put(
                        keys[index], {"outputs": _tensor(scores.outputs), "values": _tensor(scores.values)}
                    )
                done += 1
                if progress is not None:
                    progress(done, len(records))
    if store is not None:
        lines += store.notes
    return Scored(labels, tuple(scores for scores in found if scores is not None), tuple(lines))


def _run(
    session: Session,
    records: Sequence[Record],
    todo: Sequence[int],
    labels: Labels,
    files: TaggerFiles,
    batch_size: int,
) -> Iterator[tuple[int, Scores]]:
    """Yield (index, scores) in order; the next pictures are decoded while the tagger works."""
    size = session.max_batch or max(1, batch_size)
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    waiting: deque[list[Future[Floats]]] = deque()
    try:
        for number, batch in enumerate(batches):
            while len(waiting) < 2 and number + len(waiting) < len(batches):
                ahead = batches[number + len(waiting)]
                waiting.append([pool.submit(_prepared, records[i], session.size) for i in ahead])
            pixels = np.stack([future.result() for future in waiting.popleft()])
            names = [records[index].name for index in batch]
            scores = _scores_of(session, pixels, labels, files, names)
            yield from zip(batch, (_sparse(row) for row in scores), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepared(record: Record, size: int) -> Floats:
    return prepare(load_upright(record), size)


def _scores_of(
    session: Session, pixels: Floats, labels: Labels, files: TaggerFiles, names: Sequence[str]
) -> Floats:
    """Run one batch, filled up where the graph takes a fixed number, and check what comes out."""
    count = len(pixels)
    if session.max_batch is not None and count < session.max_batch:
        filler = np.full((session.max_batch - count, *pixels.shape[1:]), 255, dtype=np.float32)
        pixels = np.concatenate([pixels, filler])
    try:
        scores = session.run(pixels)[:count]
    except Exception as error:  # the runtimes' own exception types are not public
        raise LoraGraftError(
            "LG-DATA-066",
            f"The tagger {files.name} failed on {count} pictures.",
            where=listed(shown(name) for name in names),
            why=f"{shown(error, 200)}.",
            fix="lower batch_size, set device to cpu, or take another tagger",
        ) from error
    _check_count(scores.shape[-1] if scores.ndim == 2 else None, labels, files, shape=scores.shape)
    if not np.isfinite(scores).all() or scores.min() < -1e-3 or scores.max() > 1 + 1e-3:
        raise _no_tagger(files, "its outputs are no probabilities between 0 and 1")
    return scores


def _check_count(
    count: int | None, labels: Labels, files: TaggerFiles, *, shape: tuple[int, ...] | None = None
) -> None:
    if count is None and shape is not None:
        raise _no_tagger(files, f"its output has the shape {shape}, expected (pictures, tags)")
    if count is not None and count != len(labels.names):
        raise _no_tagger(files, f"it has {count} outputs, but {files.labels.name} names {len(labels.names)}")


def _no_tagger(files: TaggerFiles, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-062",
        "The file is no tagger of the WD family.",
        where=shown(files.graph or files.weights),
        why=f"{why}.",
        fix="take the model and its selected_tags.csv from the same repository and version",
    )


def _sparse(row: Floats) -> Scores:
    outputs = np.flatnonzero(row >= FLOOR).astype(np.int32)
    return Scores(outputs, np.minimum(row[outputs], 1).astype(np.float32))


def _picture_key(record: Record, model: list[object]) -> str:
    """Return the cache's key; "" for a picture that was never hashed, which is then computed each time."""
    if not record.content_hash:
        return ""
    return key_of(kind="tagger", version=VERSION, model=model, **pixels_key(record))


def _load(store: TensorCache | None, key: str, labels: Labels) -> Scores | None:
    tensors = store.get(key) if store is not None and key else None
    if tensors is None or set(tensors) != {"outputs", "values"}:
        return None
    outputs = tensors["outputs"].numpy()
    if len(outputs) and outputs[-1] >= len(labels.names):
        return None
    return Scores(outputs, tensors["values"].numpy())


def _tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _model_key(files: TaggerFiles, device: str) -> list[object]:
    """Return what tells one tagger from another: the file's length, both its ends, and its labels.

    Reading all of a gigabyte would take longer than tagging some pictures. A GPU's scores differ in the
    last digits, so what was asked for counts too.
    """
    path = files.graph or files.weights
    assert path is not None
    digest = hashlib.sha256()
    length = path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, length - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    labels = hashlib.sha256(files.labels.read_bytes()).hexdigest()
    return [length, path.stat().st_mtime_ns, digest.hexdigest(), labels, device]
