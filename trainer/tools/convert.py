"""Bring a LoRA into another naming: kohya's, diffusers' (PEFT's) or ComfyUI's; its change stays the same.

diffusers' naming has no alpha, so the scale alpha / r goes into the up tensor; elsewhere tensors are
untouched. The joined projections of SD3 and Flux are several modules in diffusers: their rows share one down
tensor, and modules that do not share one are joined with a block-diagonal up tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import LoraGraftError, listed
from .deltas import KOHYA
from .lora_file import PLAIN, LoraFile, Module, require_plain
from .naming import (
    NAMINGS,
    UNET_COMFY,
    UNET_FLAT,
    architecture_of,
    from_kohya,
    parts_of,
    refuse_unknown,
    to_kohya,
    whole_of,
)
from .unflatten import flatten, unflatten

PROJECTION = re.compile(r"attentions_\d+_proj_(in|out)$")
TURNED = "context_block_adaLN_modulation_1"
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
    common = to_common(file)
    architecture = architecture_of(file.modules)
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
    """Return the file with kohya's names, whatever naming it has; raises LG-TOOL-006, -007."""
    architecture = architecture_of(file.modules)
    modules: dict[str, Module] = {}
    joined: dict[str, dict[str, Module]] = {}
    unknown, twice = [], []
    for module in file.modules.values():
        name = to_kohya(module.name, architecture)
        whole = whole_of(module.name.removeprefix("transformer."), architecture)
        if name is not None:
            twice += [module.name] if name in modules else []
            fitted = _with_projection(replace(module, name=name), architecture, kernel=True)
            fitted = _turned(fitted, architecture) if module.name.startswith("transformer.") else fitted
            modules[name] = _in(fitted, "kohya")
        elif whole:
            joined.setdefault(next(iter(whole)), {})[module.name.removeprefix("transformer.")] = module
        else:
            unknown.append(module.name)
    refuse_unknown(unknown, "kohya")
    if twice:
        raise LoraGraftError(
            "LG-TOOL-007",
            f"{len(twice)} modules are in the file under two names.",
            where=listed(twice, limit=3),
            why="which of the two counts is not said.",
            fix="remove one of them, or make the file again",
        )
    for path, parts in joined.items():
        name = UNET_FLAT + flatten(path)
        modules[name] = _join_rows(name, path, parts, architecture)
    return replace(file, modules=modules)


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
    """Return a module of SD3's last block whose rows are shift and scale, in diffusers scale and shift."""
    if architecture != "sd3" or not module.name.endswith(TURNED) or module.kind != PLAIN:
        return module
    up, down = module.tensors["up"], module.tensors["down"]
    if up.shape[0] != 2 * down.shape[1]:  # other blocks have a gate too, and a second modulation
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
    parts = parts_of(unflatten(module.name.removeprefix(UNET_FLAT)), architecture)
    if parts is None or len(parts) == 1:
        return None
    up, down = module.tensors["up"], module.tensors["down"]
    width = down.shape[1]  # q, k and v are as wide as the input; what is left is the MLP's
    sizes = [width] * min(3, len(parts)) + ([up.shape[0] - 3 * width] if len(parts) > 3 else [])
    if sum(sizes) != up.shape[0] or min(sizes) < 1:
        refuse_unknown([module.name], "diffusers")
    return [
        replace(module, name=f"transformer.{part}", tensors={**module.tensors, "up": rows.contiguous()})
        for part, rows in zip(parts, up.split(sizes), strict=True)
    ]


def _join_rows(name: str, path: str, parts: Mapping[str, Module], architecture: str) -> Module:
    """Return one module of diffusers' parts; a part that is not there changes nothing in its rows."""
    wanted = parts_of(path, architecture) or ()
    missing = [part for part in wanted if part not in parts]
    ordered = [parts[part] for part in wanted if part in parts]
    if missing:
        refuse_unknown([f"{name} (without {listed(missing, limit=3)})"], "kohya")
    ups = [
        module.tensors["up"] * module.scale if module.scale != 1 else module.tensors["up"]
        for module in ordered
    ]
    downs = [module.tensors["down"] for module in ordered]
    if all(torch.equal(down, downs[0]) for down in downs[1:]):
        up, down = torch.cat(ups), downs[0]
    else:
        up, down = torch.block_diag(*ups), torch.cat(downs)
    tensors = {"up": up, "down": down, "alpha": torch.tensor(float(down.shape[0]))}
    return Module(name, PLAIN, tensors, KOHYA)


def naming_of(file: LoraFile) -> str:
    """Tell the naming that most of the file's modules have."""
    names = list(file.modules)
    flat = sum(name.startswith("lora_") for name in names)
    comfy = sum(name.startswith((UNET_COMFY, "text_encoders.")) for name in names)
    return "kohya" if flat * 2 >= len(names) else "comfyui" if comfy * 2 >= len(names) else "diffusers"
