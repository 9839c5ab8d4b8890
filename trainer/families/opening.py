"""Open a base model: from a single file, a diffusers folder, or tensors that a host already holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import LoraGraftError, listed
from ..parts import Parts
from ..safefile import tensor_bytes
from . import FAMILIES, detect
from .base import Family, Tensors
from .weights import FileWeights, Renamed, joined

TRAINABLE = (torch.float32, torch.float16, torch.bfloat16)
FOLDERS = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
# VAEs saved by old diffusers name the attention's layers so:
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
CLIP_HUB_NAME = "openai/clip-vit-large-patch14"


@dataclass
class Base:
    """An opened base model; nothing is moved or copied until ``load``.

    ``state_dicts`` maps denoiser, vae and text_encoder to diffusers-named tensors, which are views on a
    host's weights, or on a file's pages, each mapped when asked for; they are never written to. ``owned``
    says that nobody else holds what is loaded. ``name`` is free of folders.
    """

    family: Family
    name: str
    state_dicts: Mapping[str, Tensors]
    tokenizer_folder: str
    known_hash: str | None = None
    owned: bool = False

    @cached_property
    def weights_hash(self) -> str:
        """Identify the weights by their values, the same for a file and for a host's upcast copy of it."""
        return self.known_hash or _hash(self.state_dicts)

    def part_hash(self, part: str) -> str:
        """Return the share of ``weights_hash`` that belongs to one part."""
        return self.weights_hash.split("-")[list(FOLDERS).index(part)]

    def load(self) -> Parts:
        """Build fresh modules on these tensors, sharing their storage."""
        return self.family.load(self.state_dicts, load_tokenizer(self.tokenizer_folder))


def open_file(
    path: Path, *, tokenizer: Path | None, name: str | None = None, allow_download: bool = False
) -> Base:
    """Open a single .safetensors checkpoint; its pages are mapped, not read."""
    _refuse_other_formats(path)
    weights = _read_file(path, where=path.name)
    folder = find_tokenizer(tokenizer, allow_download=allow_download)
    family, state_dicts = _sorted(weights, where=path.name)
    return Base(family, name or path.stem, state_dicts, folder, owned=True)


def open_folder(
    path: Path, *, tokenizer: Path | None, name: str | None = None, allow_download: bool = False
) -> Base:
    """Open a diffusers folder (unet/, vae/, text_encoder/, tokenizer/) of safetensors files."""
    unet, vae, text = (_read_folder(path / FOLDERS[part]) for part in ("denoiser", "vae", "text_encoder"))
    new_vae = {_new_vae_name(k): k for k in vae}
    state_dicts = {
        "denoiser": unet,
        "vae": Renamed(vae, new_vae, frozenset(k for k, old in new_vae.items() if _is_old(old, vae))),
        "text_encoder": Renamed(
            text,
            {
                k if k.startswith("text_model.") else f"text_model.{k}": k
                for k in text
                if not k.endswith("position_ids")  # integers, which the module makes for itself
            },
        ),
    }
    for part, sd in state_dicts.items():
        _refuse_untrainable(sd, where=f"{path.name}/{FOLDERS[part]}")
    inside = path / "tokenizer"
    folder = find_tokenizer(tokenizer or (inside if inside.is_dir() else None), allow_download=allow_download)
    return Base(FAMILIES["sd15"], name or path.name, state_dicts, folder, owned=True)


def open_weights(
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    tokenizer: str,
    where: str = "MODEL, CLIP and VAE",
    known_hash: str | None = None,
) -> Base:
    """Open a base model from tensors under single-file names; they are shared, never written to."""
    family, state_dicts = _sorted({k: _view(v) for k, v in weights.items()}, where=where)
    return Base(family, name, state_dicts, tokenizer, known_hash)


def _sorted(weights: Tensors, *, where: str) -> tuple[Family, dict[str, Tensors]]:
    """Return the family of weights under single-file names, and its parts' state dicts."""
    family = detect(list(weights), where=where)
    state_dicts = family.split(weights)
    for part in state_dicts.values():
        _refuse_untrainable(part, where=where)
    return family, state_dicts


def _view(weight: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the same storage that training can use: no gradient, not in inference mode."""
    if not weight.is_inference():
        return weight.detach()
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return view.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return ``Base.weights_hash`` for weights under single-file names."""
    return _hash(detect(list(weights), where="weights").split({k: _view(v) for k, v in weights.items()}))


def find_tokenizer(folder: Path | None, *, allow_download: bool = False) -> str:
    """Find CLIP's tokenizer: the given folder, a ComfyUI, the Hugging Face cache, or on request the hub."""
    if folder is not None:
        if not (folder / "vocab.json").is_file():
            raise LoraGraftError(
                "LG-BASE-007",
                "The tokenizer folder has no vocab.json.",
                where=str(folder),
                why="captions cannot be turned into tokens without it.",
                fix="name the folder that holds vocab.json and merges.txt",
            )
        return str(folder)
    pack = Path(__file__).resolve().parents[2]
    hosts = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    for host in [*hosts, pack.parent.parent]:
        if (host / "comfy" / "sd1_tokenizer" / "vocab.json").is_file():
            return str(host / "comfy" / "sd1_tokenizer")
    from transformers import CLIPTokenizer

    try:
        CLIPTokenizer.from_pretrained(CLIP_HUB_NAME, local_files_only=not allow_download)
    except OSError:
        raise LoraGraftError(
            "LG-BASE-008",
            "CLIP's tokenizer was not found.",
            where="tokenizer",
            why="a single-file checkpoint holds no tokenizer, and none is shipped with this package.",
            fix="one of: --tokenizer FOLDER (ComfyUI has it in comfy/sd1_tokenizer), COMFYUI_PATH, "
            "a diffusers folder as the base, the Hugging Face cache, or --allow-download",
        ) from None
    return CLIP_HUB_NAME


def load_tokenizer(folder: str) -> Any:
    """Load the tokenizer from a folder, or under its hub name from the local cache."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise LoraGraftError(
            "LG-BASE-007",
            "The tokenizer cannot be read.",
            where=folder,
            why=str(error)[:200],
            fix="name a folder with CLIP's complete vocab.json and merges.txt",
        ) from error


def _hash(state_dicts: Mapping[str, Tensors]) -> str:
    """Return one 20-digit hash a part, joined by '-', over names, shapes and values as float32."""

    def of_tensor(state_dict: Tensors, name: str) -> bytes:
        tensor = state_dict[name]
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        return hashlib.sha256(
            f"{name}{tuple(tensor.shape)}".encode() + hashlib.sha256(tensor_bytes(values)).digest()
        ).digest()

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        digests = (
            hashlib.sha256(b"".join(pool.map(partial(of_tensor, sd), sorted(sd)))).hexdigest()[:20]
            for sd in (state_dicts[part] for part in FOLDERS)
        )
        return "-".join(digests)


def _read_folder(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    # a folder may hold the same weights twice, in full and in half precision
    whole = [f for f in files if ".fp16" not in f.name and ".non_ema" not in f.name] or files
    if not whole:
        raise LoraGraftError(
            "LG-BASE-001",
            f"The diffusers folder has no safetensors file in '{folder.name}'.",
            where=str(folder),
            why="only .safetensors weights are read: other formats can run code when they are opened.",
            fix="save the model again with safe_serialization, or name a single .safetensors checkpoint",
        )
    return joined([_read_file(file, where=f"{folder.name}/{file.name}") for file in whole])


def _read_file(path: Path, *, where: str) -> FileWeights:
    try:
        return FileWeights(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{where}' cannot be read.",
            where=str(path),
            why=str(error)[:200],
            fix="check that the file is a complete .safetensors checkpoint; download or copy it again",
        ) from None


def _refuse_other_formats(path: Path) -> None:
    if not path.exists():
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{path.name}' does not exist.",
            where=str(path),
            why="there is no such file.",
            fix="check the path; quotes and a trailing space count as part of it",
        )
    if path.suffix.lower() != ".safetensors":
        why = {
            ".ckpt": "a .ckpt can run code when it is opened.",
            ".pt": "a .pt can run code when it is opened.",
            ".gguf": "GGUF weights are quantised; a LoRA needs the plain ones.",
        }.get(path.suffix.lower(), "only .safetensors files are read.")
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{path.name}' is not a .safetensors file.",
            where=str(path),
            why=why,
            fix="convert it to .safetensors (in ComfyUI: load it, then CheckpointSave), or use another file",
        )


def _refuse_untrainable(weights: Tensors, *, where: str) -> None:
    wrong = sorted(
        {str(v.dtype).removeprefix("torch.") for v in weights.values() if v.dtype not in TRAINABLE}
    )
    odd = sorted(k for k, v in weights.items() if type(v) not in (torch.Tensor, torch.nn.Parameter))
    if wrong or odd:
        named = [k for k in weights if weights[k].dtype not in TRAINABLE] or odd
        raise LoraGraftError(
            "LG-BASE-005",
            f"The base model's weights are quantised ({listed(wrong) or 'packed tensors'}).",
            where=f"{where}: {listed(named, limit=2)}",
            why="this release trains on fp32, fp16 and bf16 weights only.",
            fix="load the fp16, bf16 or fp32 version of the model",
        )


def _new_vae_name(key: str) -> str:
    if ".attentions." in key:
        for old, new in OLD_VAE_NAMES.items():
            key = key.replace(old, new)
    return key


def _is_old(key: str, vae: Tensors) -> bool:
    """Say whether this is an attention's matrix stored as a 1x1 kernel."""
    return ".attentions." in key and vae[key].ndim == 4
