"""A LoRA file as modules: whatever naming it uses, each module has its tensors by role.

Roles are those of the formula dW = (alpha / r) up down; the naming of a file only decides how a tensor's
name ends. Other network types keep their own endings and are recognised by them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..adapters.files import DTYPES, as_saved, read_metadata, read_tensors
from ..errors import LoraGraftError, listed
from ..metadata import with_hashes
from ..safefile import write_safetensors

# How a tensor's name ends, and its role. The first that fits counts.
ENDINGS: tuple[tuple[str, str], ...] = (
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_mid.weight", "mid"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".alpha", "alpha"),
    (".dora_scale", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
)
# What the last part of another network type's tensor name begins with.
OTHER_TYPES: tuple[tuple[str, str], ...] = (
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("diff", "Full"),
    ("w_norm", "Norm"),
    ("b_norm", "Norm"),
    ("on_input", "IA3"),
    ("weight", "IA3"),
    ("rescale", "OFT"),
)
PLAIN = "LoRA"
DECLARED = "lora_adapter_metadata"  # where diffusers keeps ranks and alphas, as JSON in the file's header


@dataclass(frozen=True)
class Module:
    """One module of a LoRA file: its tensors by role, each with the ending of its name.

    ``down`` is (r, in[, k, k]), ``up`` (out, r[, 1, 1]); ``scale`` is alpha / r, 1 where nothing says
    otherwise.
    """

    name: str
    kind: str
    tensors: Mapping[str, torch.Tensor]
    endings: Mapping[str, str]
    declared_alpha: float | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.tensors["down"].shape[0])

    @property
    def alpha(self) -> float:
        """Alpha as the file states it, else the rank."""
        if "alpha" in self.tensors:
            return float(self.tensors["alpha"])
        return float(self.rank) if self.declared_alpha is None else self.declared_alpha

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by."""
        return self.alpha / self.rank

    @property
    def has_magnitude(self) -> bool:
        """Say whether the module is a DoRA: its change depends on the base's weight."""
        return "magnitude" in self.tensors

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return up (out, r) and down (r, in * k * k) as float32 matrices, without the scale."""
        up, down = self.tensors["up"].float().flatten(1), self.tensors["down"].float()
        if "mid" in self.tensors:  # Tucker form: a kernel between two 1x1 factors
            kernel = self.tensors["mid"].float()
            down = torch.einsum("rskl,si->rikl", kernel, down.flatten(1))
        return up, down.flatten(1)

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that the module changes."""
        down = self.tensors["down"]
        kernel = self.tensors["mid"].shape[2:] if "mid" in self.tensors else down.shape[2:]
        return (self.tensors["up"].shape[0], down.shape[1], *kernel)

    def with_factors(self, up: torch.Tensor, down: torch.Tensor, scale: float) -> Module:
        """Return the module with other factors, matrices as from ``factors``; the scale stays ``scale``."""
        out, fan_in, *kernel = self.shape()
        rank, ones = down.shape[0], [1] * len(kernel)
        tensors = {
            "down": down.reshape(rank, fan_in, *kernel).contiguous(),
            "up": up.reshape(out, rank, *ones).contiguous(),
        }
        if "alpha" in self.tensors:
            tensors["alpha"] = torch.tensor(scale * rank)
        elif scale != 1:  # this naming has no place for alpha, so that the factor must hold it
            tensors["up"] = tensors["up"] * scale
        return replace(self, tensors=tensors, declared_alpha=None)

    def named(self) -> dict[str, torch.Tensor]:
        """Return the tensors under their names in a file."""
        return {self.name + self.endings[role]: tensor for role, tensor in self.tensors.items()}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its modules by name, tensors that belong to none, and its metadata."""

    modules: Mapping[str, Module]
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors under their names."""
        return {key: tensor for module in self.modules.values() for key, tensor in module.named().items()}


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file of any naming; raises LG-SAVE-004 and LG-TOOL-001, -002."""
    return parse(read_tensors(path), read_metadata(path), name=path.name)


def parse(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, name: str = "LoRA"
) -> LoraFile:
    """Sort tensors into modules; raises LG-TOOL-001 where none is a LoRA's, LG-TOOL-002 for half modules."""
    metadata = dict(metadata or {})
    found: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    kinds: dict[str, str] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        place = _place(key)
        if place is None:
            strange.append(key)
            continue
        module, role, ending, kind = place
        found.setdefault(module, {})[role] = ending, tensor
        if kind and kinds.setdefault(module, kind) != kind:  # two network types in one module
            strange.append(key)
    if strange or not found:
        raise LoraGraftError(
            "LG-TOOL-001",
            f"{name[:60]} is no LoRA that can be worked on.",
            where=listed(strange or ["no tensors"], limit=3),
            why=f"{len(strange)} of {len(tensors)} tensor names are none of a known network type.",
            fix="name a LoRA file: kohya's, diffusers' (PEFT's) or ComfyUI's naming",
        )
    alphas = _declared(metadata)
    modules = {
        module: Module(
            module,
            kinds.get(module, PLAIN),
            {role: tensor for role, (_, tensor) in roles.items()},
            {role: ending for role, (ending, _) in roles.items()},
            _declared_alpha(module, alphas),
        )
        for module, roles in found.items()
    }
    _check_whole(modules.values(), name)
    return LoraFile(modules, metadata, name)


def require_plain(file: LoraFile, doing: str) -> None:
    """Raise LG-TOOL-003 where a module is of another type than LoRA, or a DoRA."""
    kinds = {m.name: "DoRA" if m.has_magnitude else m.kind for m in file.modules.values()}
    if others := {name: kind for name, kind in kinds.items() if kind != PLAIN}:
        raise LoraGraftError(
            "LG-TOOL-003",
            f"{doing} works on LoRA and LoCon only, not {listed(sorted(set(others.values())))}.",
            where=f"{file.name}: {listed(others, limit=2)}",
            why="such a module is no product of two small matrices that could be taken apart.",
            fix="merge the file into its checkpoint, then extract a LoRA from the two checkpoints",
        )


def save_lora(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    precision: str,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA file with its hashes; raises LG-TOOL-004 where it exists, LG-SAVE-003 for infinities."""
    check_free(path, overwrite=overwrite)
    saved = as_saved(tensors, precision)
    write_safetensors(path, saved, with_hashes({k: v for k, v in metadata.items() if k != DECLARED}, saved))
    return path


def precision_of(file: LoraFile, wanted: str) -> str:
    """Return ``wanted``, or for "same" the number format of the file's largest tensors."""
    if wanted != "same":
        return wanted
    names = {dtype: name for name, dtype in DTYPES.items()}
    largest = max(file.tensors().values(), key=lambda tensor: tensor.numel())
    return names.get(largest.dtype, "fp32")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise LG-TOOL-004 where a file or folder would be replaced without being asked for."""
    if path.exists() and not overwrite:
        raise LoraGraftError(
            "LG-TOOL-004",
            f"'{path.name}' exists already.",
            where=str(path),
            why="it would be replaced.",
            fix="choose another name, or ask for it to be overwritten",
        )


def _place(key: str) -> tuple[str, str, str, str] | None:
    """Return a tensor's module, role, ending and network type ("" where its name does not tell)."""
    for ending, role in ENDINGS:
        if key.endswith(ending):
            return key[: -len(ending)], role, ending, "" if role in ("alpha", "magnitude") else PLAIN
    module, _, last = key.rpartition(".")
    if last == "weight" and module.rpartition(".")[2] in ("a1", "a2", "b1", "b2"):
        module, _, last = module.rpartition(".")
        return module, f"{last}.weight", f".{last}.weight", "GLoRA"
    for beginning, kind in OTHER_TYPES:
        if module and (last == beginning or (beginning.endswith("_") and last.startswith(beginning))):
            return module, last, f".{last}", kind
    return (module, last, f".{last}", "Full") if module and last == "diff_b" else None


def _check_whole(modules: Iterable[Module], name: str) -> None:
    half = [module.name for module in modules if not _is_whole(module)]
    if half:
        raise LoraGraftError(
            "LG-TOOL-002",
            f"{len(half)} modules of {name[:60]} are not whole.",
            where=listed(half, limit=3),
            why="a module needs a down and an up tensor of one rank, none of them empty, and one alpha.",
            fix="use a complete file; one that was cut or edited by hand must be made again",
        )


def _is_whole(module: Module) -> bool:
    """Say whether no tensor is empty, alpha one number, and a LoRA's up, down and kernel of one rank."""
    alpha = module.tensors.get("alpha", torch.ones(()))
    if not all(t.numel() for t in module.tensors.values()) or alpha.numel() != 1 or not alpha.isfinite():
        return False
    if module.kind != PLAIN:
        return True
    up, down, mid = (module.tensors.get(role) for role in ("up", "down", "mid"))
    if up is None or down is None or min(up.ndim, down.ndim) < 2:
        return False
    if mid is None:
        return down.shape[0] == up.shape[1]
    return mid.ndim == 4 and tuple(mid.shape[:2]) == (up.shape[1], down.shape[0])


def _declared(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        read = json.loads(metadata.get(DECLARED, "{}"))
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _declared_alpha(module: str, declared: Mapping[str, object]) -> float | None:
    """Return the alpha that diffusers' metadata states for a module: its pattern's, else its part's."""
    part, _, path = module.partition(".")
    pattern = declared.get(f"{part}.alpha_pattern")
    own = pattern.get(path) if isinstance(pattern, dict) else None
    value = own if own is not None else declared.get(f"{part}.lora_alpha")
    return float(value) if isinstance(value, (int, float)) else None
