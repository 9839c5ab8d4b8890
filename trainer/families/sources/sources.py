"""What files hold, and one base model of several: a checkpoint, or denoiser, VAE and text encoders apart.

People keep them as ComfyUI's folders diffusion_models, vae and text_encoders do. Everything is brought to the
names of a single file (see `base`), as views; which part a file is, its names and shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import LoraGraftError, listed
from ..modules.qwen_vae import file_names
from ..names.ldm_keys import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, unet_to_ldm
from ..names.ldm_vae import join_vae, vae_from_folder
from ..names.unet_kinds import unet_kind
from .text_files import TOKENIZERS, read_text_file
from .weights import Renamed, joined

Tensors = Mapping[str, torch.Tensor]

DENOISER, VAE = "denoiser", "VAE"
# What reading shapes raises where names promise others.
SHAPELESS = (KeyError, IndexError, ValueError, TypeError, ArithmeticError, RuntimeError)
# Beginnings of a denoiser's names in files that hold it, longest first; none counts too, see BARE.
DENOISER_PREFIXES = (UNET_PREFIX, "diffusion_model.")
VAE_PREFIXES = (VAE_PREFIX, "vae.")
# Tensors that a denoiser without a prefix has, one of them.
BARE = (
    "input_blocks.0.0.weight",  # U-Nets
    "joint_blocks.0.context_block.attn.qkv.weight",  # SD3
    "double_blocks.0.img_attn.qkv.weight",  # Flux and those built on it
    "transformer_blocks.0.img_mod.1.weight",  # Qwen-Image
    "noise_refiner.0.attention.qkv.weight",  # Lumina 2, Z-Image
)
DIFFUSERS_UNET = "down_blocks.0.resnets.0.conv1.weight"
# Tensors of denoisers with diffusers' names: several of them make one of the denoiser's own.
DIFFUSERS = (
    "transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.attn.to_q.weight",
    "noise_refiner.0.attention.to_q.weight",
    "noise_refiner.0.attn.to_q.weight",
)
# Tensors that tell VAEs: LDM's names, diffusers', Wan's (Qwen-Image's), and diffusers' of that one.
LDM_VAE, HF_VAE = "decoder.mid.block_1.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight"
WAN_VAE, HF_WAN_VAE = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
# Where checkpoints keep text encoders: beginnings of names, and the kind.
TEXT_PREFIXES = (
    (re.compile(r"cond_stage_model\.transformer\."), "clip_l"),
    (re.compile(r"cond_stage_model\.model\."), "clip_h"),
    (re.compile(r"conditioner\.embedders\.0\.transformer\."), "clip_l"),
    (re.compile(r"conditioner\.embedders\.1\.model\."), "clip_g"),
    (re.compile(r"(?:text_encoders|cond_stage_model)\.(\w+)\."), ""),  # named after the kind
)
ANY_OPENCLIP = "conditioner.embedders.0.model."  # SD2.x's, or that of SDXL's refiner
SAVED_ALONE = re.compile(r"(\w+)\.transformer\.(?=text_model\.|encoder\.|shared\.|model\.)")
LORA = re.compile(
    r"(^|[._])(lora_(up|down|unet|te\d?|transformer|A|B)|hada_w\d|lokr_w\d|oft_blocks|oft_diag|dora_scale)"
)
OTHERS = {
    "a ControlNet": ("control_model.", "controlnet_", "zero_convs.", "input_hint_block."),
    "a preview decoder (TAESD), which cannot encode": ("taesd_", "decoder.layers.", "1.conv.0."),
    "an embedding": ("emb_params", "string_to_param"),
    "an upscaler": ("conv_first.", "body.0.", "model.0.weight"),
    "a vision model": ("vision_model.",),
}


@dataclass(frozen=True)
class Source:
    """An opened file: the name that messages give it, and its tensors."""

    name: str
    weights: Tensors


@dataclass(frozen=True)
class Sources:
    """One base model's weights under single-file names, part by part, and what they came from.

    Parts are "denoiser", "VAE", kinds of text encoders, and "" for what belongs to none. ``files`` are the
    names of the parts' files, ``given`` the parts that came from further files; ``lines`` say what took the
    place of what.
    """

    parts: Mapping[str, Tensors]
    files: Mapping[str, str]
    given: Sequence[str]
    lines: Sequence[str]

    def weights(self, *, without: str | None = None) -> Tensors:
        """Return all tensors, or all but one part's."""
        return joined([tensors for part, tensors in self.parts.items() if part != without])


def bring_together(base: Source, *, vae: Source | None = None, texts: Sequence[Source] = ()) -> Sources:
    """Make one base of a file and of those that add parts to it, or take the place of its own.

    Raises LG-BASE-002 for a file that is not known, LG-BASE-012 for two files of one part, or one that is
    not what it was given as.
    """
    parts = dict(parts_of(base))
    files = dict.fromkeys((part for part in parts if part), base.name)
    given: list[str] = []
    lines: list[str] = []
    if DENOISER not in parts:
        raise _no_denoiser(base.name, files)
    is_sd1 = unet_kind(parts[DENOISER]) == "sd15"
    for source, is_vae in [*([(vae, True)] if vae else []), *((text, False) for text in texts)]:
        for part, weights in _given_as(source, is_vae=is_vae).items():
            if part in given:
                raise _twofold(part, files[part], source.name)
            if part in parts:
                lines.append(f"{part}: {source.name} takes the place of the one in {base.name}")
            parts[part], files[part] = _in_place(part, weights, is_sd1=is_sd1), source.name
            given.append(part)
    return Sources(parts, files, given, lines)


def parts_of(source: Source) -> dict[str, Tensors]:
    """Sort a file's tensors into parts, under single-file names; "" is what belongs to none.

    A file that has text encoders alone keeps these under HF's names. Raises LG-BASE-002.
    """
    weights = source.weights
    if any(LORA.search(k) for k in weights):
        raise _not_a_base(source, "a LoRA")
    names: dict[str, dict[str, str]] = {}
    for key in weights:
        part, new = _place(key, weights)
        names.setdefault(part, {})[new] = key
    if names.keys() - {""}:
        return {part: Renamed(weights, found) for part, found in names.items()}
    try:
        return _alone(source)
    except LoraGraftError:
        raise
    except SHAPELESS:  # names of a part, and shapes that no such part has
        raise _not_a_base(source, None) from None


def missing_parts(
    state_dicts: Mapping[str, Tensors], encoders: Mapping[str, str], optional: Sequence[str]
) -> list[str]:
    """Return what a family needs and a base does not have, in words."""
    needed = [part for part in ("denoiser", "vae") if not state_dicts.get(part)]
    texts = {part: kind for part, kind in encoders.items() if not state_dicts.get(part)}
    required = [part for part in texts if part not in optional or len(texts) == len(encoders)]
    return needed + [f"{part} ({texts[part]})" for part in required]


def unused_parts(sources: Sources, split: Callable[[Tensors], Mapping[str, Tensors]]) -> list[str]:
    """Return the parts that were given and that make no difference to how a family splits the weights."""

    def sizes(weights: Tensors) -> dict[str, int]:
        return {part: len(tensors) for part, tensors in split(weights).items()}

    whole = sizes(sources.weights())
    return [part for part in sources.given if sizes(sources.weights(without=part)) == whole]


def _place(key: str, weights: Tensors) -> tuple[str, str]:
    """Return which part of a checkpoint a tensor belongs to, and its single-file name."""
    for prefix in DENOISER_PREFIXES:
        if key.startswith(prefix):
            return DENOISER, UNET_PREFIX + key[len(prefix) :]
    for prefix in VAE_PREFIXES:
        if key.startswith(prefix):
            return VAE, VAE_PREFIX + key[len(prefix) :]
    for pattern, kind in TEXT_PREFIXES:
        match = pattern.match(key)
        if match:
            return kind or match[1], key
    if key.startswith(ANY_OPENCLIP):
        norm = ANY_OPENCLIP + "ln_final.weight"
        return ("clip_g" if norm in weights and weights[norm].shape[0] == 1280 else "clip_h"), key
    return "", key


def _alone(source: Source) -> dict[str, Tensors]:
    """Return the one part, or the text encoders, that a file without a checkpoint's prefixes holds."""
    weights = source.weights
    saved = {m[1] for k in weights if (m := SAVED_ALONE.match(k))}
    if saved:  # several text encoders, as ComfyUI saves them together
        return _several(source, saved)
    text = read_text_file(weights)
    if text is not None:
        return {text.kind: text.weights}
    vae = _vae(weights)
    if vae is not None:
        return {VAE: vae}
    if any(name in weights for name in BARE):
        return {DENOISER: Renamed(weights, {UNET_PREFIX + k: k for k in weights})}
    if DIFFUSERS_UNET in weights and "time_embedding.linear_1.weight" in weights:
        names = {UNET_PREFIX + new: old for new, old in unet_to_ldm(weights).items()}
        return {DENOISER: Renamed(weights, names)}
    if any(name in weights for name in DIFFUSERS):
        raise LoraGraftError(
            "LG-BASE-002",
            "This is a denoiser with the names that diffusers gives it.",
            where=source.name,
            why="such a file is a piece of a folder, which also says what the piece is.",
            fix="name the folder with model_index.json, or the file that the model's authors published",
        )
    kind = next((k for k, starts in OTHERS.items() if any(n.startswith(starts) for n in weights)), None)
    raise _not_a_base(source, kind)


def _several(source: Source, kinds: set[str]) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for kind in sorted(kinds):
        prefix = f"{kind}.transformer."
        inside = {k[len(prefix) :]: k for k in source.weights if k.startswith(prefix)}
        text = read_text_file(Renamed(source.weights, inside))
        if text is None:
            raise _not_a_base(source, None)
        found[kind] = text.weights
    return found


def _vae(weights: Tensors) -> Tensors | None:
    if "encoder.conv_in.weight" not in weights and "encoder.conv1.weight" not in weights:
        return None
    if LDM_VAE in weights or WAN_VAE in weights:
        return Renamed(weights, {VAE_PREFIX + k: k for k in weights})
    if HF_WAN_VAE in weights:
        return Renamed(weights, {VAE_PREFIX + new: old for new, old in file_names(weights).items()})
    if HF_VAE in weights:
        statistics = {VAE_PREFIX + k: k for k in weights if k.startswith("bn.")}  # Flux.2's
        return joined([join_vae(vae_from_folder(weights)), Renamed(weights, statistics)])
    return None


def _given_as(source: Source, *, is_vae: bool) -> dict[str, Tensors]:
    """Return the VAE, or the text encoders, of a file that was given as such."""
    parts = parts_of(source)
    wanted = {p: w for p, w in parts.items() if p and (p == VAE if is_vae else p not in (DENOISER, VAE))}
    if wanted:
        return wanted
    role = "VAE" if is_vae else "text encoder"
    raise LoraGraftError(
        "LG-BASE-012",
        f"'{source.name}' holds no {role}.",
        where=f"{source.name}: {listed(p for p in parts if p)}",
        why=f"it was given as the {role}.",
        fix="give the base as the base model, a VAE as --vae and text encoders as --text_encoder",
    )


def _in_place(part: str, weights: Tensors, *, is_sd1: bool) -> Tensors:
    """Bring a text encoder to where the single-file names have it; a VAE is there already."""
    if part == VAE or any(p.match(k) for k in weights for p, _ in TEXT_PREFIXES):
        return weights
    if is_sd1 and part == "clip_l":
        inside = [k for k in weights if k.startswith("text_model.")]  # it has no use for a projection
        return Renamed(weights, {TEXT_PREFIX + k: k for k in inside})
    prefix = f"text_encoders.{part}.transformer."
    return Renamed(weights, {f"text_encoders.{k}" if k in TOKENIZERS else prefix + k: k for k in weights})


def _no_denoiser(name: str, found: Mapping[str, str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-012",
        f"The base model '{name}' holds no denoiser.",
        where=f"{name}: {listed(found) or 'no part that is known'}",
        why="the U-Net or transformer is what is trained.",
        fix="name the denoiser's file, or a whole checkpoint, as the base; a VAE as --vae, text encoders as "
        "--text_encoder",
    )


def _twofold(part: str, first: str, second: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-012",
        f"Two files hold the same part of the base model: {part}.",
        where=f"{first}, {second}",
        why="which of them is meant cannot be told.",
        fix="give one of them",
    )


def _not_a_base(source: Source, kind: str | None) -> LoraGraftError:
    first = next(iter(sorted(source.weights)), "none")
    return LoraGraftError(
        "LG-BASE-002",
        f"'{source.name}' is {kind}, not a base model."
        if kind
        else "The base model's architecture is not known.",
        where=f"{source.name} ({len(source.weights)} tensors, first: {first})",
        why="its tensor names are those of no denoiser, VAE or text encoder that is known.",
        fix="use a checkpoint of a supported family, or its denoiser with --vae and --text_encoder",
    )
