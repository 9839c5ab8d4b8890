"""Quantised weights of a safetensors file as packed tensors: fp8, int8 and the like, with their scales.

ComfyUI marks a layer by a small JSON text in a tensor "<layer>.comfy_quant", or all of them in the file's
metadata; older files have one tensor "scaled_fp8" and a scale for each layer; the oldest have fp8 numbers and
no scale. All become what `PackedTensor` holds, and the tensors that only describe them are gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.file_formats import ROTATIONS
from ...engine.packed_tensor import PackedTensor
from ...engine.storage import Packed
from ...errors import LoraGraftError, listed

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]

FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
OF_FILE = "_quantization_metadata"  # in the metadata of a file: {"layers": {layer: config}}
OF_LAYER = ".comfy_quant"
OLD_MARK = "scaled_fp8"
# Endings of what describes a layer's weight; those of an input's scale say how to compute in fp8, not what.
SCALES = (".weight_scale", ".scale_weight")
INPUTS = (".input_scale", ".scale_input")
SECOND_SCALE = ".weight_scale_2"
# Endings that show formats that are not read, and their names.
OTHERS = {
    ".weight.quant_map": "bitsandbytes' 4 bits",
    ".weight.absmax": "bitsandbytes' 4 bits",
    ".SCB": "bitsandbytes' 8 bits",
    ".weight_scale_inv": "fp8 with scales for squares",
    ".pre_quant_scale": "a format that scales inputs too",
    ".weight_s_rel": "asym_w4a8_int8",
    ".qweight": "GPTQ or AWQ",
    ".wscales": "SVDQuant",
}
MOST_TEXT = 2**24  # bytes of JSON


@dataclass(frozen=True)
class _Layer:
    """A layer's weight: which format, and what it is packed from."""

    kind: str
    config: Config


class QuantisedWeights(Mapping[str, torch.Tensor]):
    """The tensors of a file; those of quantised layers are packed when asked for, vectors unpacked."""

    def __init__(self, weights: Tensors, layers: Mapping[str, _Layer], where: str) -> None:
        self._weights, self._layers, self._where = weights, layers, where
        used = {k for k in weights if k.endswith((OF_LAYER, *SCALES, *INPUTS, SECOND_SCALE))}
        used |= {k for k in weights if k == OLD_MARK or k.endswith(f".{OLD_MARK}")}
        self._names = [k for k in weights if k not in used]

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        layer = self._layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None:
            try:
                packed = PACKERS[layer.kind](weight, _Scales(self._weights, name), layer.config)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:
                raise _unreadable(self._where, name, f"{layer.kind}: {error}") from None
        elif weight.dtype in FP8:
            packed = _packed(FP8[weight.dtype], weight.shape, codes=weight.view(torch.uint8))
        else:
            return weight
        return PackedTensor(packed) if packed.shape[1:] else packed.unpack(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_quantised(weights: Tensors, metadata: Mapping[str, str], *, where: str) -> Tensors:
    """Return a file's tensors with quantised ones packed; the same mapping where none are.

    Raises LG-BASE-005 for a format that is not read, LG-BASE-001 for one that is damaged.
    """
    others = {ending: k for k in weights for ending in OTHERS if k.endswith(ending)}
    if others:
        ending, name = next(iter(others.items()))
        raise _not_read(where, OTHERS[ending], [name])
    layers = _layers(weights, metadata, where)
    unknown = {n: layer.kind for n, layer in layers.items() if layer.kind not in PACKERS}
    if unknown:
        raise _not_read(where, listed(sorted(set(unknown.values())), limit=3), sorted(unknown))
    if not layers and not any(weights[k].dtype in FP8 for k in weights):
        return weights
    return QuantisedWeights(weights, layers, where)


def _layers(weights: Tensors, metadata: Mapping[str, str], where: str) -> dict[str, _Layer]:
    """Return the layers that the file marks, or that have a scale, by name."""
    found: dict[str, _Layer] = {}
    if OF_FILE in metadata:
        listed_ = _json(metadata[OF_FILE].encode(), where, OF_FILE).get("layers")
        for name, config in (listed_ if isinstance(listed_, dict) else {}).items():
            if f"{name}.weight" in weights:
                found[name] = _layer(config, where, name)
    for key in weights:
        name, dot, ending = key.rpartition(".")
        if f".{ending}" == OF_LAYER:
            found[name] = _layer(_json(_bytes(weights[key]), where, key), where, name)
        elif dot and f".{ending}" in SCALES and name not in found and f"{name}.weight" in weights:
            dtype = weights[f"{name}.weight"].dtype
            if dtype in FP8:
                found[name] = _Layer(FP8[dtype], {})
            elif dtype == torch.int8:
                found[name] = _Layer("int8_tensorwise", {})
    return {name: layer for name, layer in found.items() if f"{name}.weight" in weights}


def _layer(config: Any, where: str, name: str) -> _Layer:
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise _unreadable(where, name, "its description names no format")
    return _Layer(config["format"], config)


def _json(text: bytes, where: str, name: str) -> dict[str, Any]:
    try:
        if len(text) > MOST_TEXT:
            raise ValueError(f"{len(text)} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, name, f"its description cannot be read: {error}") from None
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() * tensor.element_size() > MOST_TEXT:
        return b""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


# ---- how each format is packed ----


@dataclass(frozen=True)
class _Scales:
    """What lies beside a layer's weight."""

    weights: Tensors
    name: str

    def beside(self, *endings: str) -> torch.Tensor | None:
        """Return the tensor with one of these endings in place of ".weight"."""
        layer = self.name.removesuffix(".weight")
        return next((self.weights[layer + e] for e in endings if layer + e in self.weights), None)

    def by_row(self, rows: int, *endings: str) -> torch.Tensor | None:
        """Return a scale as (rows,) float32; ValueError for one that is neither a number nor by row."""
        scale = self.beside(*endings)
        if scale is None:
            return None
        scale = scale.detach().to(torch.float32).reshape(-1)
        if len(scale) not in (1, rows):
            raise ValueError(f"{len(scale)} scales for {rows} rows")
        return scale.expand(rows).contiguous()


def _packed(kind: str, shape: torch.Size, **tensors: torch.Tensor | None) -> Packed:
    return Packed(kind, shape, {name: t for name, t in tensors.items() if t is not None})


def _fp8(weight: torch.Tensor, scales: _Scales, config: Config) -> Packed:
    """fp8, its scale a number for all or one a row; bytes of a file that says so are fp8 too."""
    kind = FP8.get(weight.dtype) or str(config["format"])
    if weight.element_size() != 1:
        raise ValueError(f"its weight is {weight.dtype}")
    scale = scales.by_row(weight.shape[0], *SCALES) if weight.ndim else None
    return _packed(kind, weight.shape, codes=weight.view(torch.uint8), scale=scale)


def _int8(weight: torch.Tensor, scales: _Scales, config: Config) -> Packed:
    scale = scales.by_row(weight.shape[0], *SCALES)
    if weight.dtype != torch.int8 or scale is None:
        raise ValueError(f"its weight is {weight.dtype}, with{'out' if scale is None else ''} a scale")
    inner = config.get("params")
    settings = {**(inner if isinstance(inner, dict) else {}), **config}
    if not settings.get("convrot", False):
        return _packed("int8_tensorwise", weight.shape, codes=weight, scale=scale)
    group = settings.get("convrot_groupsize", 256)
    if group not in ROTATIONS or weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"groups of {group!s:.20} in {tuple(weight.shape)}")
    return _packed(f"int8_convrot_{group}", weight.shape, codes=weight, scale=scale)


def _mxfp8(weight: torch.Tensor, scales: _Scales, config: Config) -> Packed:
    _check_matrix(weight, of=32)
    exponents = _untiled(scales.beside(*SCALES), weight.shape[0], weight.shape[1] // 32)
    return _packed("mxfp8", weight.shape, codes=weight.view(torch.uint8), exponents=exponents)


def _nvfp4(weight: torch.Tensor, scales: _Scales, config: Config) -> Packed:
    _check_matrix(weight, of=8)
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    scale = scales.by_row(rows, SECOND_SCALE)
    if scale is None:
        raise ValueError("it has no scale for all")
    return _packed(
        "nvfp4",
        torch.Size((rows, columns)),
        codes=weight.view(torch.uint8),
        scales=_untiled(scales.beside(*SCALES), rows, columns // 16),
        scale=scale,
    )


def _check_matrix(weight: torch.Tensor, *, of: int) -> None:
    if weight.ndim != 2 or weight.element_size() != 1 or weight.shape[1] % of:
        raise ValueError(f"its weight is {weight.dtype}, {tuple(weight.shape)}")


def _untiled(scales: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    """Return blocks' scales (rows, columns) as bytes.

    They lie as cuBLAS reads them: in tiles of 128 rows and 4 columns, each as 32 rows of 4 times 4.
    """
    if scales is None or scales.element_size() != 1 or not columns:
        raise ValueError("its blocks have no scales")
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scales.contiguous().view(torch.uint8).reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns].contiguous()


PACKERS: Mapping[str, Callable[[torch.Tensor, _Scales, Config], Packed]] = {
    "float8_e4m3fn": _fp8,
    "float8_e5m2": _fp8,
    "int8_tensorwise": _int8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}


def _not_read(where: str, kind: str, names: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-005",
        f"The base model's weights are quantised in a way that is not read ({kind}).",
        where=f"{where}: {listed(names, limit=2)}",
        why=f"of safetensors files these are read: plain weights, {', '.join(PACKERS)}.",
        fix="load the fp8, bf16 or fp16 version of the model, or a GGUF file",
    )


def _unreadable(where: str, name: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-001",
        f"The base model '{where}' cannot be read.",
        where=f"{where}: {name}",
        why=why[:300],
        fix="download or copy the file again",
    )
