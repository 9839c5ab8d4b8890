"""The GUI's LoRA types: the network_module and the network_args that kohya_ss hands on for each.

Facts: bmaltais' kohya_ss 26.0.0, kohya_gui/lora_gui.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.kohya_keys import NUMBER, SWITCH, TEXT, WHOLE
from ..errors import one_line
from .imported import Findings
from .kohya_blocks import DIMS, INDICES
from .kohya_gui_table import EITHER
from .kohya_network import FLUX as FLUX_MODULE
from .kohya_network import SD3 as SD3_MODULE
from .kohya_scripts import FLUX, SD3, Script

LYCORIS = "lycoris.kohya"


@dataclass(frozen=True)
class Network:
    """What a LoRA type becomes: ``always`` and ``given`` (where not 0, off or empty) are keys it hands on."""

    module: str
    always: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    algo: str = ""


DROPOUTS = ("rank_dropout", "module_dropout")
CONV = ("conv_dim", "conv_alpha")
BLOCKS = (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
)
LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
GGPO, INPUTS = ("ggpo_beta", "ggpo_sigma"), "in_dims"
LAYERS = (*DIMS[FLUX_MODULE], INPUTS, *INDICES[FLUX_MODULE])
_PRESET = "LyCORIS_preset"
_WHOLE_LYCORIS = (_PRESET, *CONV, *DROPOUTS, "rank_dropout_scale", "train_norm")
_PLAIN_LYCORIS = (*_WHOLE_LYCORIS, "use_tucker", "bypass_mode", "dora_wd", "use_scalar")
# Key -> its name in LyCORIS' network_args, where that differs.
LYCORIS_NAMES: Mapping[str, str] = {_PRESET: "preset", "constrain": "constraint", "unit": "block_size"}

TYPES: Mapping[str, Network] = {
    "Standard": Network("networks.lora", given=(*BLOCKS, *DROPOUTS)),
    "Kohya LoCon": Network("networks.lora", always=CONV, given=(*BLOCKS, *DROPOUTS)),
    "Kohya DyLoRA": Network("networks.dylora", given=(*CONV, *BLOCKS, *DROPOUTS, "unit")),
    "Flux1": Network(FLUX_MODULE, given=(*LAYERS, "split_qkv", "train_t5xxl", *DROPOUTS)),
    "LyCORIS/BOFT": Network(LYCORIS, (*_WHOLE_LYCORIS, "use_tucker"), algo="boft"),
    "LyCORIS/Diag-OFT": Network(
        LYCORIS, (*_WHOLE_LYCORIS, "use_tucker", "constrain", "rescaled"), algo="diag-oft"
    ),
    "LyCORIS/DyLoRA": Network(
        LYCORIS, (_PRESET, *CONV, *DROPOUTS, "use_tucker", "unit", "train_norm"), algo="dylora"
    ),
    "LyCORIS/GLoRA": Network(LYCORIS, (*_WHOLE_LYCORIS, "use_tucker"), algo="glora"),
    "LyCORIS/iA3": Network(LYCORIS, (_PRESET, *CONV, "train_on_input"), algo="ia3"),
    "LyCORIS/LoCon": Network(LYCORIS, _PLAIN_LYCORIS, algo="locon"),
    "LyCORIS/LoHa": Network(LYCORIS, _PLAIN_LYCORIS, algo="loha"),
    "LyCORIS/LoKr": Network(
        LYCORIS,
        (*_PLAIN_LYCORIS, "factor", "use_cp", "decompose_both"),
        algo="lokr",
    ),
    "LyCORIS/Native Fine-Tuning": Network(
        LYCORIS, (_PRESET, *DROPOUTS, "rank_dropout_scale", "train_norm"), algo="full"
    ),
}
_KOHYAS_OWN, _OTHER_MODEL = "a network of kohya's own that is not here", "it is for another model"
# LoRA type that cannot be trained -> why, and the nearest.
INSTEAD: Mapping[str, tuple[str, str]] = {
    "Kohya LoHa": (_KOHYAS_OWN, "LyCORIS/LoHa"),
    "Kohya LoKr": (_KOHYAS_OWN, "LyCORIS/LoKr"),
    "LoRA-FA": (_KOHYAS_OWN, "Standard"),
    "Flux1 OFT": (_KOHYAS_OWN, "LyCORIS/Diag-OFT"),
    **dict.fromkeys(("HunyuanImage-2.1", "Anima", "Lumina"), (_OTHER_MODEL, "Standard")),
}
LOCON = "LoCon"  # what older versions called LyCORIS/LoCon

# Keys of the networks, and the kinds of their values.
KEYS: Mapping[str, str] = {
    "LoRA_type": TEXT,
    _PRESET: TEXT,
    **dict.fromkeys(("conv_dim", "factor", "unit"), WHOLE),
    **dict.fromkeys(("conv_alpha", "constrain", *DROPOUTS, *LORA_PLUS, *GGPO), NUMBER),
    **dict.fromkeys((*BLOCKS, *LAYERS), EITHER),
    **dict.fromkeys(
        ("bypass_mode", "decompose_both", "dora_wd", "enable_all_linear", "rank_dropout_scale"), SWITCH
    ),
    **dict.fromkeys(("rescaled", "split_qkv", "train_lora_ggpo", "train_norm", "train_on_input"), SWITCH),
    **dict.fromkeys(("train_t5xxl", "use_cp", "use_scalar", "use_tucker"), SWITCH),
    "train_blocks": TEXT,
}


def network(gui: Mapping[str, Any], script: Script, found: Findings) -> dict[str, Any]:
    """Return network_module and network_args; {} where the type does not fit the model, which is refused."""
    name = "LyCORIS/LoCon" if gui["LoRA_type"] == LOCON else gui["LoRA_type"]
    chosen = TYPES.get(name)
    if name in INSTEAD:
        why, instead = INSTEAD[name]
        found.refuse(f"LoRA_type {name}", why, f'write "LoRA_type": "{instead}"')
        return {}
    if chosen is None:
        found.expect("LoRA_type", name, f"one of {', '.join(TYPES)}", '"LoRA_type": "Standard"')
        return {}
    if script.program == FLUX and chosen.module not in (FLUX_MODULE, LYCORIS):
        why = "the GUI does not start with the two"
        found.refuse(f"LoRA_type {name} with flux1_checkbox", why, 'write "LoRA_type": "Flux1"')
        return {}
    keys = [*chosen.always, *(key for key in chosen.given if gui[key])]
    keys += [key for key in GGPO if chosen.module == FLUX_MODULE and gui["train_lora_ggpo"] and gui[key]]
    keys += [key for key in LORA_PLUS if gui[key]]
    names = LYCORIS_NAMES if chosen.module == LYCORIS else {}
    pairs = [(names.get(key, key), gui[key]) for key in keys]
    if chosen.algo:
        pairs.append(("algo", chosen.algo))
    if chosen.module == FLUX_MODULE and gui["split_mode"]:
        pairs.append(("train_blocks", "single"))
    elif chosen.module == FLUX_MODULE and gui["train_blocks"] not in ("", "all"):
        found.notes.append(f"train_blocks {one_line(gui['train_blocks'], 40)}: the GUI does not hand it on.")
    # The GUI cuts at blanks, so that a value with one in it falls apart.
    words = " ".join(f"{key}={value}" for key, value in pairs).replace('"', "").split()
    is_sd3 = chosen.module == "networks.lora" and script.program == SD3
    return {"network_module": SD3_MODULE if is_sd3 else chosen.module, "network_args": words}
