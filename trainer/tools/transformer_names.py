"""The modules of transformers in single files and in diffusers, from the tables that the families load with.

A module of a single file is one of diffusers', or its rows are several of diffusers' modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..families.names import chroma_keys, flux2_keys, flux_keys, lumina2_keys, sd3_keys
from ..families.z_image import FROM_DIFFUSERS as Z_IMAGE_PAIRS

Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """A transformer's modules in a single file, each with the modules of diffusers that its rows are.

    ``blocks`` maps a file's list of blocks to diffusers' name of it, and to what is in a block. ``swapped``
    are modules that hold shift and scale, in diffusers scale and shift.
    """

    outside: Names
    blocks: Mapping[str, tuple[str, Names]]
    swapped: tuple[str, ...] = ()

    def parts_of(self, path: str) -> tuple[str, ...] | None:
        """Return diffusers' modules that make a file's module; None where there is none."""
        if found := self._block(path):
            number, inside, theirs, names = found
            return tuple(f"{theirs}.{number}.{part}" for part in names[inside]) if inside in names else None
        return self.outside.get(path)

    def whole_of(self, path: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the file's module that diffusers' module ``path`` is part of, with all its parts."""
        for ours, parts in self.outside.items():
            if path in parts:
                return ours, parts
        for ours, (theirs, names) in self.blocks.items():
            match = re.fullmatch(rf"{re.escape(theirs)}\.(\d+)\.(.+)", path)
            for inside, parts in names.items() if match else ():
                if match is not None and match[2] in parts:
                    whole = f"{ours}.{match[1]}.{inside}"
                    return whole, tuple(f"{theirs}.{match[1]}.{part}" for part in parts)
        return None

    def _block(self, path: str) -> tuple[str, str, str, Names] | None:
        for ours, (theirs, names) in self.blocks.items():
            if match := re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", path):
                return match[1], match[2], theirs, names
        return None


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    """Return names that are the same in both."""
    return {name: (name,) for name in names}


def _by_file(blocks: Mapping[str, tuple[str, Names]]) -> dict[str, tuple[str, Names]]:
    """Turn a table by diffusers' lists of blocks into one by the file's."""
    return {ours: (theirs, names) for theirs, (ours, names) in blocks.items()}


def _flux() -> Table:
    return Table(flux_keys.TOP, _by_file(flux_keys.BLOCKS), (flux_keys.SWAPPED,))


def _chroma() -> Table:
    guide = "distilled_guidance_layer"
    layers: Names = {ours: (theirs,) for ours, theirs in chroma_keys.GUIDE_LAYERS.items()}
    outside = {**chroma_keys.TOP, **_same(f"{guide}.in_proj", f"{guide}.out_proj")}
    return Table(outside, {**_by_file(chroma_keys.BLOCKS), f"{guide}.layers": (f"{guide}.layers", layers)})


def _flux2() -> Table:
    return Table(flux2_keys.TOP, _by_file(flux2_keys.BLOCKS), (flux_keys.SWAPPED,))


def _sd3() -> Table:
    stacks = {whole: (first, *others) for first, (whole, *others) in sd3_keys.STACKS.items()}
    inside: dict[str, tuple[str, ...]] = {}
    for theirs, ours in sd3_keys.LINEARS:
        parent, _, last = ours.rpartition(".")
        inside[theirs] = tuple(f"{parent}.{name}" for name in stacks[last]) if last in stacks else (ours,)
    outside: Names = {theirs: (ours,) for theirs, ours in sd3_keys.OUTSIDE}
    # The last block's text is only normalised: its modulation has no gate, which its shape tells.
    swapped = ("final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1")
    return Table(outside, {"joint_blocks": ("transformer_blocks", inside)}, swapped)


def _lumina2() -> Table:
    outside: Names = {ours: (theirs,) for ours, theirs in lumina2_keys.OUTSIDE.items()}
    lists = ("layers", "noise_refiner", "context_refiner")
    return Table(outside, {name: (name, lumina2_keys.INSIDE) for name in lists})


def _z_image() -> Table:
    def theirs(path: str) -> str:
        named = f".{path}."
        for diffusers, files in Z_IMAGE_PAIRS:
            named = named.replace(files, diffusers)
        return named.strip(".")

    linear = ("attention.out", "adaLN_modulation.0", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    inside: dict[str, tuple[str, ...]] = {name: (theirs(name),) for name in linear}
    inside["attention.qkv"] = tuple(f"attention.to_{letter}" for letter in "qkv")
    top = ["x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"]
    top += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    lists = ("layers", "noise_refiner", "context_refiner")
    return Table({name: (theirs(name),) for name in top}, {name: (name, inside) for name in lists})


def _qwen_image() -> Table:
    """Files have diffusers' names."""
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    inside = [f"attn.{name}" for name in attention]
    for stream in ("img", "txt"):
        inside += [f"{stream}_mod.1", f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2"]
    time = [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
    blocks: dict[str, tuple[str, Names]] = {"transformer_blocks": ("transformer_blocks", _same(*inside))}
    return Table(_same("img_in", "txt_in", *time, "norm_out.linear", "proj_out"), blocks)


TABLES: Mapping[str, Table] = {
    "sd3": _sd3(),
    "flux": _flux(),
    "chroma": _chroma(),
    "flux2": _flux2(),
    "qwen_image": _qwen_image(),
    "z_image": _z_image(),
    "lumina2": _lumina2(),
}
