"""Which architecture a LoRA file is for: by its modules' names, and where these are the same by shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from .lora_file import PLAIN, Module

OTHER = "other"  # a model that only its host knows
LONGEST_SD3, LONGEST_FLUX = 38, 19  # blocks of two streams

# Beginnings of a denoiser's names in any naming.
_START = r"(?:lora_unet_|(?:base_model\.model\.)?(?:diffusion_model\.|transformer\.)?)"
# Names that one transformer alone has; the first that fits counts.
MARKS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("sd3", re.compile(r"joint_blocks|transformer_blocks\.\d+\.attn2\.")),
    ("chroma", re.compile(r"distilled_guidance_layer[._]")),
    (
        "flux2",
        re.compile(
            r"(double|single)_stream_modulation|\.to_qkv_mlp_proj$|\.ff(_context)?\.linear_(in|out)$"
            r"|single_transformer_blocks\.\d+\.attn\.to_out$"
        ),
    ),
    ("qwen_image", re.compile(rf"^{_START}transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")),
    ("qwen_image", re.compile(r"^(lora_unet_transformer_blocks_|diffusion_model\.transformer_blocks\.)\d")),
)
FLUX = re.compile(r"(double|single)_blocks|single_transformer_blocks")  # Chroma and FLUX.2 have them too
STREAM = re.compile(rf"^{_START}(layers|noise_refiner|context_refiner)[._]\d+[._]")  # Lumina 2 and Z-Image
LUMINA2 = re.compile(r"\.attn\.to_[qkv]$|\.feed_forward\.linear_\d$|\d[._]adaLN_modulation[._]1$")
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
UNET = re.compile(r"(input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)[._]")
LDM_FLAT = ("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")
SDXL_TEXT = ("lora_te1_", "lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")
SD2_LAYERS = re.compile(r"clip_h|encoder[._]layers[._](1[2-9]|2\d)")  # SD1.x's text encoder has 12 layers
SD2_CONTEXT = 1024
DEEP = re.compile(r"transformer_blocks[._][1-9]")  # a block beside the first one: SDXL alone has any
# What metadata say of files whose names fit several: ss_base_model_version.
VERSIONS = {
    "flux1": "flux",
    "chroma": "chroma",
    "flux2": "flux2",
    "z_image": "z_image",
    "lumina2": "lumina2",
}


def architecture_of(modules: Mapping[str, Module], metadata: Mapping[str, str] | None = None) -> str:
    """Tell sd (SD1.x), sd2, sdxl or a key of TABLES from modules of any naming; "other" for none of them."""
    names = [name for name in modules if not name.startswith(("lora_te", "text_encoder"))]
    if any(UNET.search(name) or name.startswith("unet.") for name in names):
        return _unet(modules, metadata or {})
    if names:
        told = VERSIONS.get((metadata or {}).get("ss_base_model_version", ""), "")
        return _transformer(names, modules, told)
    if any(name.startswith(("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.")) for name in modules):
        return "sd3" if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in modules) else "flux"
    return _unet(modules, metadata or {})


def _transformer(names: Collection[str], modules: Mapping[str, Module], told: str) -> str:
    for architecture, mark in MARKS:
        if any(mark.search(name) for name in names):
            return architecture
    if any(FLUX.search(name) for name in names):
        return told or ("flux2" if _is_gated(modules) else "flux")
    if any(STREAM.match(name) for name in names):
        return told if told in ("z_image", "lumina2") else _of_one_stream(names, modules)
    if any(name.startswith("text_encoder_3.") for name in modules):
        return "sd3"
    blocks = [int(found[1]) for name in names if (found := BLOCK.search(name))]
    if not blocks:
        return told or OTHER
    return "qwen_image" if max(blocks) >= LONGEST_SD3 else "sd3" if max(blocks) >= LONGEST_FLUX else "flux"


def _of_one_stream(names: Collection[str], modules: Mapping[str, Module]) -> str:
    """Tell Lumina 2, whose keys and values have fewer heads, from Z-Image."""
    if any(LUMINA2.search(name) for name in names):
        return "lumina2"
    for name in names:
        if re.search(r"attention[._]qkv$", name) and modules[name].kind == PLAIN:
            rows, width = modules[name].shape()[:2]
            return "z_image" if rows == 3 * width else "lumina2"
    return "z_image"


def _is_gated(modules: Mapping[str, Module]) -> bool:
    """Say whether feed-forward layers have a gate, as FLUX.2's: twice as wide inside as what comes out.

    Of a layer without its partner the released models' widths tell: 3 times the model's in FLUX.2, else 4.
    """
    shapes = {
        re.sub(r"[._]", " ", name): module.shape()[:2]
        for name, module in modules.items()
        if module.kind == PLAIN
    }
    for name, (rows, columns) in shapes.items():
        if name.endswith(("mlp 0", "linear1")):
            inside = rows - (3 * columns if name.endswith("linear1") else 0)
            back = shapes.get(name[:-1] + "2")
            after = None if back is None else back[1] - (back[0] if name.endswith("linear1") else 0)
            return inside == 2 * after if after is not None else inside == 6 * columns
        if name.endswith("mlp 2") and name[:-1] + "0" not in shapes:
            return columns == 3 * rows
        if name.endswith("linear2") and name[:-1] + "1" not in shapes:
            return columns == 4 * rows
    return False


def _unet(modules: Mapping[str, Module], metadata: Mapping[str, str]) -> str:
    if any(n.startswith((*SDXL_TEXT, *LDM_FLAT)) or DEEP.search(n) for n in modules):
        return "sdxl"
    told = metadata.get("ss_v2") == "True" or metadata.get("ss_base_model_version", "").startswith("sd_v2")
    if told or any(SD2_LAYERS.search(n) or _reads_clip_h(n, m) for n, m in modules.items()):
        return "sd2"
    return "sd"


def _reads_clip_h(name: str, module: Module) -> bool:
    """Say whether a cross-attention's key or value is of SD2.x's width of text."""
    is_key = re.search(r"attn2[._]to_[kv]$", name) is not None and module.kind == PLAIN
    return is_key and module.shape()[1] == SD2_CONTEXT
