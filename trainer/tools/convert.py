"""Bring a LoRA into another naming: kohya's, diffusers' (PEFT's) or ComfyUI's; its change stays the same.

diffusers' naming has no alpha, so the scale alpha / r goes into the up tensor; elsewhere tensors are
untouched. The joined projections of transformers are several modules in diffusers: their rows share one down
tensor, and modules that do not share one are joined with a block-diagonal up tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import LoraGraftError, listed
from .architecture import OTHER, architecture_of
from .deltas import KOHYA
from .lora_file import PLAIN, LoraFile, Module, require_plain
from .naming import (
    DIFFUSERS,
    NAMINGS,
    UNET_COMFY,
    UNET_FLAT,
    bare,
    from_kohya,
    parts_of,
    refuse_unknown,
    to_kohya,
    whole_of,
)
from .transformer_names import TABLES
from .unflatten import flatten, unflatten

PROJECTION = re.compile(r"attentions_\d+_proj_(in|out)$")
FEED_FORWARD = 4  # times as wide as a transformer whose feed-forward lies beside the projections: Flux.1
PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
ENDINGS = {"kohya": KOHYA, "diffusers": PEFT, "comfyui": KOHYA}


def convert_naming(file: LoraFile, naming: str) -> LoraFile:
    """Return the file under another naming; raises LG-TOOL-006 for modules without a name in it.

    DoRA and other network types keep their tensors between kohya's and ComfyUI's naming; diffusers' has no
    place for them (LG-TOOL-003).
    """
    if naming not in NAMINGS:
        raise LoraGraftError(
            "LG-TOOL-005",
            f"There is no naming {naming[:30]!r}.",
            where="naming",
            why=f"known are {', '.join(NAMINGS)}.",
            fix="choose one of these",
        )
    architecture = architecture_of(file.modules, file.metadata)
    if architecture == OTHER and naming == naming_of(file):
        return file
    common = to_common(file)
    if naming == "diffusers":
        require_plain(common, "Converting to diffusers' naming")
    modules: dict[str, Module] = {}
    unknown = []
    for module in common.modules.values():
        split = _split_rows(module, architecture) if naming == "diffusers" else None
        name = module.name if naming == "kohya" else from_kohya(module.name, naming, architecture)
        if split is not None:
            modules.update({part.name: _in(part, naming) for part in split})
        elif name is None:
            unknown.append(module.name)
        else:
            fitted = _with_projection(module, architecture, kernel=naming != "diffusers")
            fitted = _turned(fitted, architecture) if naming == "diffusers" else fitted
            modules[name] = _in(replace(fitted, name=name), naming)
    refuse_unknown(unknown, naming)
    return replace(file, modules=modules)


def to_common(file: LoraFile) -> LoraFile:
    """Return the file with kohya's names, whatever naming it has; raises LG-TOOL-003, -006, -007."""
    architecture = architecture_of(file.modules, file.metadata)
    modules: dict[str, Module] = {}
    joined: dict[str, dict[str, Module]] = {}
    unknown, twice = [], []
    for module in file.modules.values():
        name = to_kohya(module.name, architecture)
        whole = whole_of(module.name, architecture) if not module.name.startswith("lora_") else None
        if name is not None:
            twice += [module.name] if name in modules else []
            fitted = _with_projection(replace(module, name=name), architecture, kernel=True)
            fitted = _turned(fitted, architecture) if _is_diffusers(module.name, architecture) else fitted
            modules[name] = _in(fitted, "kohya")
        elif whole is not None:
            joined.setdefault(whole[0], {})[bare(module.name)] = module
        else:
            unknown.append(module.name)
    refuse_unknown(unknown, "kohya")
    for path, parts in joined.items():
        name = UNET_FLAT + flatten(path)
        twice += [name] if name in modules else []
        modules[name] = _join_rows(name, path, parts, file, architecture)
    if twice:
        raise LoraGraftError(
            "LG-TOOL-007",
            f"{len(twice)} modules are in the file under two names.",
            where=listed(twice, limit=3),
            why="which of the two counts is not said.",
            fix="remove one of them, or make the file again",
        )
    return replace(file, modules=modules)


def _is_diffusers(name: str, architecture: str) -> bool:
    """Say whether a transformer's module has a name that diffusers gives it, and its file does not."""
    path = bare(name)
    whole = None if name.startswith("lora_") else whole_of(name, architecture)
    return whole is not None and whole[0] != path


def _with_projection(module: Module, architecture: str, *, kernel: bool) -> Module:
    """Return an SD2.x projection with kohya's 1x1 kernel, or as the linear layer that diffusers has."""
    if architecture != "sd2" or module.kind != PLAIN or not PROJECTION.search(module.name):
        return module
    tensors = {
        role: t[..., None, None]
        if kernel and t.ndim == 2
        else t[..., 0, 0]
        if not kernel and t.ndim == 4
        else t
        for role, t in module.tensors.items()
    }
    return replace(module, tensors=tensors)


def _turned(module: Module, architecture: str) -> Module:
    """Return a module whose rows are shift and scale with these in the other order, as diffusers has them."""
    swapped = TABLES[architecture].swapped if architecture in TABLES else ()
    if module.kind != PLAIN or not module.name.endswith(tuple(flatten(path) for path in swapped)):
        return module
    up, down = module.tensors["up"], module.tensors["down"]
    if up.shape[0] != 2 * down.shape[1]:  # most blocks of SD3 have a gate too, and a second modulation
        return module
    return replace(module, tensors={**module.tensors, "up": torch.cat(up.chunk(2)[::-1])})


def _in(module: Module, naming: str) -> Module:
    """Return a module with a naming's endings; alpha is stated, or where it has no place multiplied in."""
    if module.kind != PLAIN:
        return module
    tensors = dict(module.tensors)
    endings = {role: module.endings[role] for role in tensors if role == "magnitude"} | ENDINGS[naming]
    if naming == "diffusers":
        scale = module.scale
        up, down = module.tensors["up"], module.tensors["down"]
        if "mid" in tensors:
            _, whole = module.factors()
            down = whole.reshape(module.rank, *module.shape()[1:]).to(down.dtype)
        tensors = {"down": down, "up": up if scale == 1 else (up.float() * scale).to(up.dtype)}
    else:
        tensors["alpha"] = tensors.get("alpha", torch.tensor(module.alpha))
    return replace(module, tensors=tensors, endings=endings, declared_alpha=None)


def _split_rows(module: Module, architecture: str) -> list[Module] | None:
    """Return diffusers' modules of a joined module: rows of its up tensor, each with the down tensor."""
    if not module.name.startswith(UNET_FLAT):
        return None
    parts = parts_of(unflatten(module.name.removeprefix(UNET_FLAT)), architecture)
    if parts is None or len(parts) == 1:
        return None
    up, down = module.tensors["up"], module.tensors["down"]
    sizes = _rows(up.shape[0], down.shape[1], len(parts))
    if sum(sizes) != up.shape[0] or min(sizes) < 1:
        refuse_unknown([module.name], "diffusers")
    return [
        replace(module, name=DIFFUSERS + part, tensors={**module.tensors, "up": rows.contiguous()})
        for part, rows in zip(parts, up.split(sizes), strict=True)
    ]


def _rows(rows: int, width: int, parts: int) -> list[int]:
    """Return how many rows of a joined module are the query's, the key's, the value's, and the MLP's.

    The query is as wide as the input; keys and values are so too, or have fewer heads, both the same.
    """
    if parts == 3:
        return [width, (rows - width) // 2, (rows - width) // 2]
    return [width, width, width, rows - 3 * width]


def _join_rows(
    name: str, path: str, parts: Mapping[str, Module], file: LoraFile, architecture: str
) -> Module:
    """Return one module of diffusers' parts; a part that is not there changes nothing in its rows."""
    require_plain(replace(file, modules={m.name: m for m in parts.values()}), "Joining query, key and value")
    wanted = parts_of(path, architecture) or ()
    ordered = [parts[part] for part in wanted if part in parts]
    downs = [module.tensors["down"] for module in ordered]
    shared = all(torch.equal(down, downs[0]) for down in downs[1:])
    down = downs[0] if shared else torch.cat(downs)
    rows = []
    column = 0
    for number, part in enumerate(wanted):
        if part not in parts:
            size = _missing_rows(number, wanted, parts, architecture)
            if size is None:
                refuse_unknown([f"{name} (without {listed(wanted[1:3])})"], "kohya")
            rows.append(down.new_zeros(size or 0, down.shape[0]))
            continue
        module = parts[part]
        up = module.tensors["up"] * module.scale if module.scale != 1 else module.tensors["up"]
        if not shared:
            up = torch.nn.functional.pad(up, (column, down.shape[0] - column - up.shape[1]))
            column += module.rank
        rows.append(up)
    tensors = {"up": torch.cat(rows), "down": down, "alpha": torch.tensor(float(down.shape[0]))}
    return Module(name, PLAIN, tensors, KOHYA)


def _missing_rows(
    number: int, wanted: Sequence[str], parts: Mapping[str, Module], architecture: str
) -> int | None:
    """Return how many rows a part has that is not in the file; None where the others do not tell."""
    width = next(iter(parts.values())).tensors["down"].shape[1]
    if number == 3:
        return FEED_FORWARD * width
    for other in wanted[1:3]:  # key and value are of one size
        if number > 0 and other in parts:
            return int(parts[other].tensors["up"].shape[0])
    return None if number > 0 and architecture == "lumina2" else width


def naming_of(file: LoraFile) -> str:
    """Tell the naming that most of the file's modules have."""
    names = list(file.modules)
    flat = sum(name.startswith("lora_") for name in names)
    comfy = sum(name.startswith((UNET_COMFY, "text_encoders.")) for name in names)
    return "kohya" if flat * 2 >= len(names) else "comfyui" if comfy * 2 >= len(names) else "diffusers"
