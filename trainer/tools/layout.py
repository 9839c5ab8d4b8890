"""A checkpoint from a diffusers folder to a single file and back: names change, no value does.

A folder of any family becomes a file as ComfyUI's loaders read it. Constants of the noise schedule, which a
single file may hold, are left out: every loader makes them for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..engine.packed_tensor import unpacked
from ..errors import LoraGraftError, listed
from ..families import FAMILIES
from ..families.base import Family, Tensors
from ..families.names.ldm_keys import VAE_PREFIX
from ..families.names.vae_prefix import NEWER_PREFIX
from ..families.sources.folders import sorted_folder
from ..families.sources.model_files import read_source
from ..families.sources.sources import VAE, parts_of
from ..families.sources.weights import Renamed, joined
from .folder_layout import Tell, to_folder
from .lora_file import check_free
from .stream import Form, write_stream


def _quiet(done: int, total: int) -> None:
    """Tell nobody."""


def convert_checkpoint(
    model: Path,
    output: Path,
    *,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    tell: Tell = _quiet,
) -> list[str]:
    """Convert a folder to a file or a file to a folder; returns what is to be said of it."""
    if not model.is_dir():
        check_free(output, overwrite=overwrite)
        lost = to_folder(model, output, vae=vae, tokenizer=tokenizer, tell=tell)
        return [f"Not in the folder: {listed(lost, limit=3)}"] if lost else []
    if output.suffix.lower() != ".safetensors":
        raise LoraGraftError(
            "LG-TOOL-005",
            f"'{output.name}' is no name for a single-file checkpoint.",
            where="output",
            why="it must end with .safetensors.",
            fix=f"write {output.name}.safetensors",
        )
    check_free(output, overwrite=overwrite)
    to_single_file(model, output, vae=vae, tell=tell)
    return []


def to_single_file(folder: Path, output: Path, *, vae: Path | None = None, tell: Tell = _quiet) -> None:
    """Write a diffusers folder as one .safetensors file; ``vae`` is another VAE's file.

    Raises LG-TOOL-013 and LG-BASE errors.
    """
    family, parts = sorted_folder(folder, FAMILIES)
    if "vae" not in parts:
        raise _unfit(folder.name, family, ["no vae"])
    _refuse_lost(family, folder, parts)
    if vae is not None:
        parts = {**parts, "vae": other_vae(family, parts, vae)}
    weights = family.join(parts)
    forms: dict[str, Form] = {
        name: (weights[name].dtype, tuple(weights[name].shape)) for name in sorted(weights)
    }
    write_stream(output, forms, lambda name: unpacked(weights[name]), {}, tell=tell)


def other_vae(family: Family, parts: Mapping[str, Tensors], path: Path) -> Tensors:
    """Return the tensors of a VAE's file, or of a checkpoint's VAE, under the names of the family's module.

    Raises LG-TOOL-013 for one of another kind, LG-BASE errors for a file that is none.
    """
    found = parts_of(read_source(path))
    weights = family.join(parts)
    rest = Renamed(weights, {k: k for k in weights if not k.startswith((VAE_PREFIX, NEWER_PREFIX))})
    vae = family.split(joined([rest, found.get(VAE, {})]))["vae"]
    own = parts["vae"]
    wrong = set(vae) ^ set(own) or {k for k in own if vae[k].shape != own[k].shape}
    if wrong:
        raise _unfit(path.name, family, sorted(wrong))
    return vae


def _refuse_lost(family: Family, folder: Path, parts: Mapping[str, Tensors]) -> None:
    """Raise LG-TOOL-013 where a tensor of the folder would not be in the file."""
    again = family.split(family.join(parts))
    lost = [name for part, own in parts.items() for name in own if name not in again[part]]
    if lost:
        raise _unfit(folder.name, family, lost)


def _unfit(name: str, family: Family, tensors: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-TOOL-013",
        f"'{name}' does not fit the family {family.name}.",
        where=listed(tensors, limit=3),
        why="these tensors have no place in the other layout, or are not there.",
        fix="convert a complete model of one family, with a VAE of its kind",
    )
