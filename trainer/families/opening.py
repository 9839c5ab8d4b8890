"""Open a base model: from a single file, a diffusers folder, or tensors that a host already holds."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..engine.packed_tensor import PackedTensor
from ..errors import LoraGraftError, listed
from ..parts import DENOISER, TEXT_ENCODERS, Parts
from ..safefile import tensor_bytes
from . import FAMILIES, detect
from .base import Family, Tensors
from .modules.building import unfit
from .sources.folders import read_hints, sorted_folder
from .sources.model_files import read_source
from .sources.quantised import read_quantised
from .sources.sources import SHAPELESS, Sources, bring_together, missing_parts, unused_parts
from .text.sentence_pieces import pieces_in
from .text.tokenizers import KINDS, find_tokenizer, load_tokenizer

TRAINABLE = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = ""
KNOWN_CLASSES = (torch.Tensor, torch.nn.Parameter, PackedTensor)
HASHED_AT_ONCE = 2**22  # values: no weight is there twice
PARTS = (DENOISER, "vae", *TEXT_ENCODERS)  # in the order of their hashes
Folders = Mapping[str, str]  # kind of tokenizer -> its folder


@dataclass
class Base:
    """An opened base model; nothing is moved or copied until ``load``.

    ``state_dicts`` maps the parts that it has to tensors under their modules' names, which are views on a
    host's weights, or on a file's pages, each mapped when asked for; they are never written to. ``owned``
    says that nobody else holds what is loaded. ``name`` is free of folders. ``velocity`` says whether it
    predicts velocity and not noise, ``zero_terminal`` whether its last timestep is noise alone; None where
    nothing tells. ``notes`` are lines for the log. ``vae_name`` is that of a VAE in a file of its own.
    """

    family: Family
    name: str
    state_dicts: Mapping[str, Tensors]
    tokenizer_folders: Folders
    known_hash: str | None = None
    owned: bool = False
    velocity: bool | None = None
    zero_terminal: bool | None = None
    notes: tuple[str, ...] = ()
    vae_name: str = ""

    @cached_property
    def weights_hash(self) -> str:
        """Identify the weights by their values, the same for a file and for a host's upcast copy of it."""
        return self.known_hash or _hash(self.state_dicts)

    def part_hash(self, part: str) -> str:
        """Return the share of ``weights_hash`` that belongs to one part."""
        return self.weights_hash.split("-")[_present(self.state_dicts).index(part)]

    @property
    def text_hash(self) -> str:
        """The share of ``weights_hash`` that belongs to the text encoders."""
        own = [part for part in _present(self.state_dicts) if part in TEXT_ENCODERS]
        return "-".join(self.part_hash(part) for part in own)

    def load(self) -> Parts:
        """Build fresh modules on these tensors, sharing their storage."""
        read = {kind: load_tokenizer(folder, kind) for kind, folder in self.tokenizer_folders.items()}
        own = {part: kind for part, kind in self.family.encoders.items() if part in self.state_dicts}
        return self.family.load(self.state_dicts, {part: read[kind] for part, kind in own.items()})


def open_file(
    path: Path,
    *,
    tokenizer: Path | Sequence[Path] | None,
    name: str | None = None,
    allow_download: bool = False,
    vae: Path | None = None,
    text_encoders: Sequence[Path] = (),
) -> Base:
    """Open a checkpoint, or a denoiser with its VAE and text encoders in files of their own.

    ``vae`` and ``text_encoders`` also take the place of those in a checkpoint. Pages are mapped, not read.
    """
    texts = [read_source(text) for text in text_encoders]
    sources = bring_together(read_source(path), vae=read_source(vae) if vae else None, texts=texts)
    weights = sources.weights()
    family, state_dicts, packed = _sorted(weights, where=path.name, files=sources.files)
    _refuse_unused(family, sources)
    own_tokenizer = pieces_in(weights)
    folders = _tokenizers(family, state_dicts, tokenizer, inside=own_tokenizer, allow_download=allow_download)
    hints = family.velocity_of(weights), family.zero_terminal_of(weights)
    notes = (*sources.lines, *packed)
    name = name or path.stem
    own = vae.stem if vae else ""
    return Base(family, name, state_dicts, folders, None, True, *hints, notes, own)


def open_folder(
    path: Path,
    *,
    tokenizer: Path | Sequence[Path] | None,
    name: str | None = None,
    allow_download: bool = False,
) -> Base:
    """Open a diffusers folder (unet/ or transformer/, vae/, text_encoder/, ...) of safetensors files."""
    family, state_dicts = sorted_folder(path, FAMILIES)
    notes = _checked(state_dicts, {part: f"{path.name}/{folder}" for part, folder in family.folders.items()})
    folders = _tokenizers(family, state_dicts, tokenizer, inside=path, allow_download=allow_download)
    said, weights = read_hints(path), family.join(state_dicts)
    velocity = family.velocity_of(weights) if said.velocity is None else said.velocity
    terminal = family.zero_terminal_of(weights) if said.zero_terminal is None else said.zero_terminal
    return Base(family, name or path.name, state_dicts, folders, None, True, velocity, terminal, notes)


def open_weights(
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    tokenizers: Folders,
    where: str = "MODEL, CLIP and VAE",
    known_hash: str | None = None,
    velocity: bool | None = None,
    zero_terminal: bool | None = None,
) -> Base:
    """Open a base model from tensors under single-file names; they are shared, never written to.

    ``velocity`` and ``zero_terminal`` are what a host knows of it; None asks the weights.
    """
    weights = read_quantised({k: _view(v) for k, v in weights.items()}, {}, where=where)
    family, state_dicts, notes = _sorted(weights, where=where)
    if velocity is None:
        velocity = family.velocity_of(weights)
    if zero_terminal is None:
        zero_terminal = family.zero_terminal_of(weights)
    own = {kind: tokenizers[kind] for part, kind in family.encoders.items() if part in state_dicts}
    return Base(family, name, state_dicts, own, known_hash, False, velocity, zero_terminal, notes)


def _tokenizers(
    family: Family,
    state_dicts: Mapping[str, Tensors],
    given: Path | Sequence[Path] | None,
    *,
    inside: Path | None = None,
    allow_download: bool,
) -> dict[str, str]:
    """Find the tokenizers of the text encoders that are there, in ``given`` folders by their files.

    Raises LG-BASE-007 for a given folder that is none of them, LG-BASE-008 for one that is not found.
    """
    left = [given] if isinstance(given, Path) else list(given or ())
    found: dict[str, str] = {}
    for part, kind in family.encoders.items():
        if part not in state_dicts or kind in found:
            continue
        own = next((folder for folder in left if KINDS[kind].lies_in(folder)), None)
        if own is None and left and len(found) + len(left) == _num_kinds(family, state_dicts):
            own = left[0]  # there is one for each kind, so this was meant
        left = [folder for folder in left if folder is not own]
        here = None if inside is None else inside / part.replace("text_encoder", "tokenizer")
        found[kind] = find_tokenizer(own, kind=kind, inside=here, allow_download=allow_download)
    if left:
        find_tokenizer(left[0], kind=next(iter(found)))  # refuses it where it is another kind's
        raise LoraGraftError(
            "LG-BASE-007",
            "More tokenizer folders were given than the base model has kinds of tokenizers.",
            where=listed(str(folder) for folder in left),
            why=f"{family.name} has: {listed(found)}.",
            fix="leave the others out",
        )
    return found


def _num_kinds(family: Family, state_dicts: Mapping[str, Tensors]) -> int:
    return len({kind for part, kind in family.encoders.items() if part in state_dicts})


def _present(state_dicts: Mapping[str, Tensors]) -> list[str]:
    return [part for part in PARTS if part in state_dicts]


def _sorted(
    weights: Tensors, *, where: str, files: Mapping[str, str] | None = None
) -> tuple[Family, dict[str, Tensors], tuple[str, ...]]:
    """Return the family of weights under single-file names, its parts' state dicts, and lines for the log.

    ``files`` are the names of the files that parts come from, if they come from files.
    """
    try:
        family = detect(weights, where=where)
        state_dicts = {part: sd for part, sd in family.split(weights).items() if sd}
        _refuse_missing(family, state_dicts, where, files or {})
        notes = _checked(state_dicts, dict.fromkeys(state_dicts, where))
    except LoraGraftError:
        raise
    except SHAPELESS as error:
        raise unfit("base model", "a known family", f"{where}: {error!r:.200}") from error
    return family, state_dicts, notes


def _view(weight: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the same storage that training can use: no gradient, not in inference mode."""
    if not weight.is_inference():
        return weight.detach()
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return view.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())


def hash_parts(state_dicts: Mapping[str, Tensors]) -> str:
    """Return ``Base.weights_hash`` for the weights of parts."""
    return _hash(state_dicts)


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return ``Base.weights_hash`` for weights under single-file names."""
    views = read_quantised({k: _view(v) for k, v in weights.items()}, {}, where="weights")
    return _hash(detect(views, where="weights").split(views))


def _hash(state_dicts: Mapping[str, Tensors]) -> str:
    """Return one 20-digit hash a part, joined by '-', over names, shapes and values as float32.

    Of weights that are packed, it is over their bytes as they are stored.
    """

    def of_tensor(state_dict: Tensors, name: str) -> bytes:
        tensor = state_dict[name]
        digest = hashlib.sha256()
        if isinstance(tensor, PackedTensor):
            digest.update(tensor.packed.storage.encode())
            for kind, stored in sorted(tensor.packed.named_buffers()):
                digest.update(kind.encode())
                digest.update(tensor_bytes(stored.detach().cpu().contiguous()))
        else:
            for values in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
                digest.update(tensor_bytes(values.to(device="cpu", dtype=torch.float32).contiguous()))
        return hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode() + digest.digest()).digest()

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        digests = (
            hashlib.sha256(b"".join(pool.map(partial(of_tensor, sd), sorted(sd)))).hexdigest()[:20]
            for sd in (state_dicts[part] for part in _present(state_dicts))
        )
        return "-".join(digests)


def _refuse_missing(
    family: Family, state_dicts: Mapping[str, Tensors], where: str, files: Mapping[str, str]
) -> None:
    missing = missing_parts(state_dicts, family.encoders, family.optional)
    if missing:
        found = listed(f"{part} ({file})" for part, file in files.items()) or listed(state_dicts)
        raise LoraGraftError(
            "LG-BASE-012",
            f"The base model is not complete: {listed(missing)} missing.",
            where=f"{where}: {family.name}, found: {found}",
            why="a module would keep random weights.",
            fix="add the missing file (--vae FILE, --text_encoder FILE), or use a whole checkpoint",
        )


def _refuse_unused(family: Family, sources: Sources) -> None:
    unused = unused_parts(sources, family.split)
    if unused:
        raise LoraGraftError(
            "LG-BASE-012",
            f"A text encoder was given that {family.name} does not read: {listed(unused)}.",
            where=listed(sources.files[part] for part in unused),
            why="it would be ignored, and another one may be meant.",
            fix="leave it out",
        )


def _checked(state_dicts: Mapping[str, Tensors], where: Mapping[str, str]) -> tuple[str, ...]:
    """Look at every tensor once: raise LG-BASE-005 for what cannot be trained on; say what is packed."""
    lines = []
    for part, weights in state_dicts.items():
        kinds: Counter[str] = Counter()
        wrong: dict[str, str] = {}
        for name, weight in weights.items():
            if weight.dtype not in TRAINABLE:
                wrong[name] = str(weight.dtype).removeprefix("torch.")
            elif type(weight) not in KNOWN_CLASSES:
                wrong[name] = f"packed as {type(weight).__name__}"
            elif weight.ndim > 1:
                kinds[weight.packed.storage if isinstance(weight, PackedTensor) else PLAIN] += 1
        if wrong:
            raise _untrainable(wrong, where[part])
        plain = kinds.pop(PLAIN, 0)
        if kinds:
            counts = listed(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            rest = f"; {plain} are plain" if plain else ""
            lines.append(f"{part}: {counts} weights stay packed until they are used{rest}")
    return tuple(lines)


def _untrainable(wrong: Mapping[str, str], where: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-005",
        f"The base model's weights are quantised ({listed(sorted(set(wrong.values())))}).",
        where=f"{where}: {listed(wrong, limit=2)}",
        why="nothing tells how these numbers are read.",
        fix="load the fp8, fp16, bf16 or fp32 version of the model, or a GGUF file",
    )
