"""kohya's network_module and network_args become settings; each module has its own keys and defaults.

Facts: sd-scripts 0.10.1 networks/lora.py and dylora.py, LyCORIS' kohya.py, the older locon package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import one_line
from ..settings.presets import PRESETS
from .imported import Findings
from .kohya_blocks import DIMS, INDICES, block_settings
from .kohya_scripts import UNNAMED, Script

FLUX, SD3 = "networks.lora_flux", "networks.lora_sd3"
MODULES = ("networks.lora", FLUX, SD3, "networks.dylora", "lycoris.kohya", "locon.locon_kohya")
FOREIGN_MODULES = {
    "networks.lora_lumina": "Lumina",
    "networks.lora_hunyuan_image": "HunyuanImage",
    "networks.lora_anima": "Anima",
    "networks.oft": "another kind of OFT; algo=oft of lycoris.kohya is there",
    "networks.oft_flux": "Flux",
    "networks.lora_fa": "LoRA-FA",
    "networks.control_net_lllite": "a ControlNet",
    "networks.control_net_lllite_for_train": "a ControlNet",
}

WHOLE, NUMBER, SWITCH, WORDS, PLAIN = (
    "a whole number",
    "a number",
    "true or false",
    "pattern=value,...",
    "text",
)


EXAMPLES = {WHOLE: "4", NUMBER: "1", SWITCH: "True", WORDS: "to_k$=1e-4", PLAIN: "sine"}


@dataclass(frozen=True)
class Key:
    """One key of network_args: the setting it becomes and the kind of its value."""

    setting: str
    kind: str


def _keys(**kinds: str) -> dict[str, Key]:
    return {name: Key(name, kind) for name, kind in kinds.items()}


DROPOUTS = {
    "dropout": Key("network_dropout", NUMBER),
    "rank_dropout": Key("rank_dropout", NUMBER),
    "module_dropout": Key("module_dropout", NUMBER),
}
LORA_PLUS = _keys(
    loraplus_lr_ratio=NUMBER, loraplus_unet_lr_ratio=NUMBER, loraplus_text_encoder_lr_ratio=NUMBER
)
CONV = _keys(conv_dim=WHOLE, conv_alpha=NUMBER)
BLOCKS = _keys(
    down_lr_weight=PLAIN,
    mid_lr_weight=PLAIN,
    up_lr_weight=PLAIN,
    block_lr_zero_threshold=NUMBER,
    block_dims=PLAIN,
    block_alphas=PLAIN,
    conv_block_dims=PLAIN,
    conv_block_alphas=PLAIN,
)
PATTERNS = _keys(network_reg_dims=WORDS, network_reg_lrs=WORDS)


def _chosen(module: str) -> dict[str, Key]:
    """Return the keys that choose layers, and train_t5xxl; kohya_blocks says what becomes of the first."""
    kinds = {**dict.fromkeys(DIMS[module], WHOLE), **dict.fromkeys(INDICES[module], PLAIN)}
    return _keys(**kinds, train_t5xxl=SWITCH)


# Names of one switch: LyCORIS takes the first that is given.
TUCKER = ("use_conv_cp", "use_cp", "use_tucker")
LYCORIS = {
    **DROPOUTS,
    **LORA_PLUS,
    **CONV,
    **_keys(algo=PLAIN, preset=PLAIN, train_norm=SWITCH, dora_wd=SWITCH, wd_on_output=SWITCH),
    **_keys(rs_lora=SWITCH, factor=WHOLE, decompose_both=SWITCH, full_matrix=SWITCH),
    **_keys(unbalanced_factorization=SWITCH, constraint=NUMBER, rescaled=SWITCH),
    **{name: Key("use_tucker", SWITCH) for name in TUCKER},
    "block_size": Key("unit", WHOLE),
}
KEYS: Mapping[str, Mapping[str, Key]] = {
    "networks.lora": {**DROPOUTS, **LORA_PLUS, **CONV, **BLOCKS, **PATTERNS},
    FLUX: {**DROPOUTS, **LORA_PLUS, **CONV, **PATTERNS, **_chosen(FLUX), **_keys(train_blocks=PLAIN)},
    SD3: {**DROPOUTS, **LORA_PLUS, **CONV, **_chosen(SD3)},
    "networks.dylora": {**LORA_PLUS, **CONV, "unit": Key("unit", WHOLE)},
    "lycoris.kohya": LYCORIS,
    "locon.locon_kohya": {**DROPOUTS, **CONV},
}
_OUTSIDE = "layers outside of the blocks have no ranks of their own"
_EVERYTHING = "remove it; preset everything of lycoris.kohya trains them too"
# Keys that a module reads and that cannot be honoured: the values that ask for nothing, why, what to do.
REFUSED: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "disable_conv_cp": (("true", "1"), "it is an old name", "use_tucker=True means the same"),
    "use_scalar": (("false", "0"), "no factor is trained beside alpha", "remove it"),
    "bypass_mode": (("false", "0"), "the way of computing is chosen by the engine", "remove it"),
    "train_t5xxl": (("false", "0"), "the base model has no T5", "remove it"),
    "split_qkv": (
        ("false", "0"),
        "one LoRA lies over query, key and value, as where nothing is said",
        "remove it",
    ),
    "in_dims": (("[0,0,0,0,0]", "0,0,0,0,0"), _OUTSIDE, _EVERYTHING),
    "emb_dims": (("[0,0,0,0,0,0]", "0,0,0,0,0,0"), _OUTSIDE, _EVERYTHING),
    **dict.fromkeys(("ggpo_sigma", "ggpo_beta"), ((), "no noise is added to the weights", "remove it")),
}
# Keys that guides and GUIs give a module and that it never reads.
UNREAD: Mapping[str, tuple[str, ...]] = {"lycoris.kohya": ("train_on_input", "rank_dropout_scale")}
MAX_DIM, LYCORIS_UNIT = 1024, 4
# Where all layers are linear, presets with convolutions mean those without.
LINEAR_LAYERS = {"full": "full-lin", "unet-only": "unet-transformer-only"}
# LyCORIS' names for what is one algorithm here.
ALGO_NAMES = {"diag-oft": "oft", "lora": "locon"}
SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def read_network(
    module: str | None,
    arguments: Iterable[str],
    dim: int,
    alpha: float,
    found: Findings,
    script: Script = UNNAMED,
) -> dict[str, Any]:
    """Return the settings of a network; ``dim`` and ``alpha`` are network_dim and network_alpha.

    Faults and notes go to ``found``: an unknown module or key, a value of the wrong kind.
    ``train_t5xxl`` is handed on; the caller knows its rate.
    """
    module = module or script.module
    if module == "networks.lora" and script.module != module:
        found.notes.append(f"network_module {module}: for {script.base} it means {script.module}.")
        module = script.module
    if module not in KEYS:
        if module in FOREIGN_MODULES:
            found.refuse(
                f"network_module {module}",
                f"it is for {FOREIGN_MODULES[module]}",
                f"use {script.module} or lycoris.kohya",
            )
        else:
            found.refuse(
                f"network_module {one_line(module, 60)}",
                "it names Python code that is not known here",
                f"use one of {', '.join(MODULES)}",
            )
        return {}
    if module in DIMS and module != script.module:
        found.refuse(
            f"network_module {module}",
            f"{script.program} trains {script.base}",
            f"use {script.module}, or the script for {module.rpartition('_')[2]}",
        )
        return {}
    given = _pairs(arguments, found)
    result = _settings(module, given, found)
    if module in DIMS:
        result = _of_transformer(module, result, found)
    result = _with_defaults(module, result, dim, alpha, found)
    return _without_convolutions(result, found) if script.module in DIMS else result


def _pairs(arguments: Iterable[str], found: Findings) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in arguments:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            found.expect("network_args", item, "key=value", f"for instance {key.strip() or 'conv_dim'}=4")
        elif key.strip() in pairs:
            found.expect("network_args", item, f"{key.strip()} once", f"{key.strip()} once")
        else:
            pairs[key.strip()] = value.strip()
    return pairs


def _settings(module: str, given: Mapping[str, str], found: Findings) -> dict[str, Any]:
    known = KEYS[module]
    result: dict[str, Any] = {}
    for name, text in given.items():
        if name == "verbose":
            found.notes.append("network_args verbose: it prints modules; the run's log says what is trained.")
            continue
        if name in UNREAD.get(module, ()):
            if SWITCHES.get(text.casefold(), True):
                found.notes.append(f"network_args {name}: {module} does not read it.")
            continue
        if name in TUCKER and name != next(other for other in TUCKER if other in given):
            continue
        if name in REFUSED and name not in known:
            harmless, why, fix = REFUSED[name]
            if text.casefold() not in harmless:
                found.refuse(f"network_args {name}={one_line(text, 40)}", why, fix)
            continue
        if name not in known:
            _unknown(module, name, found)
            continue
        key = known[name]
        value = _read(key.kind, text)
        if value is None:
            found.expect(f"network_args {name}", text, key.kind, f"for instance {name}={EXAMPLES[key.kind]}")
        elif key.setting != "use_tucker" or value:
            result[key.setting] = value
    return result


def _unknown(module: str, name: str, found: Findings) -> None:
    """Record a key that the module ignores: one of another module is refused by name."""
    others = [other for other in MODULES if name in KEYS[other]]
    if others:
        found.refuse(
            f"network_args {name}",
            f"{module} ignores it; {' and '.join(others)} {'reads' if len(others) == 1 else 'read'} it",
            _remedy(module, others[0], name),
        )
    else:
        found.not_known(name, KEYS[module])


def _remedy(module: str, other: str, name: str) -> str:
    """Say what to do about another module's key; the module of a base of its own cannot be exchanged."""
    if module not in (FLUX, SD3):
        return f"set network_module to {other}, or remove {name}"
    by_pattern = name in BLOCKS and "network_reg_lrs" in KEYS[module]
    return "remove it" + (" (network_reg_lrs gives rates of blocks by pattern)" if by_pattern else "")


def _of_transformer(module: str, result: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Return the settings with the keys that choose layers as patterns."""
    keys = {*DIMS[module], *INDICES[module], "train_blocks"}
    chosen = block_settings(module, {k: v for k, v in result.items() if k in keys}, found)
    rest = {k: v for k, v in result.items() if k not in keys}
    if "network_reg_dims" in rest and "train_modules" in chosen:
        found.refuse(
            "network_args network_reg_dims together with chosen blocks",
            "kohya's trainer trains what a pattern fits in blocks that are left out, too",
            "leave blocks out by patterns of rank 0",
        )
    ranks = [*rest.get("network_reg_dims", []), *chosen.get("network_reg_dims", [])]
    return {**rest, **chosen, **({"network_reg_dims": ranks} if ranks else {})}


def _without_convolutions(result: dict[str, Any], found: Findings) -> dict[str, Any]:
    """Return the settings for a base without convolutions, where conv_dim does nothing."""
    kept = _without(CONV, result, "there are no convolutions to train", found)
    if (preset := kept.get("preset")) in LINEAR_LAYERS:
        kept["preset"] = LINEAR_LAYERS[preset]
    if kept.get("algo") == "locon":
        kept["algo"] = "lora"
    return kept


def _without(names: Iterable[str], result: dict[str, Any], why: str, found: Findings) -> dict[str, Any]:
    """Return the settings without these, and say so where one was given."""
    dropped = [name for name in names if result.get(name)]
    if dropped:
        found.notes.append(f"network_args {' and '.join(dropped)}: {why}.")
    return {name: value for name, value in result.items() if name not in names}


def _with_defaults(
    module: str, result: dict[str, Any], dim: int, alpha: float, found: Findings
) -> dict[str, Any]:
    """Return the settings with what the module takes where network_args say nothing."""
    if module in ("networks.lora", FLUX, SD3):
        if "conv_dim" in result:
            result.setdefault("conv_alpha", 1.0)
        for name in PATTERNS if module == "networks.lora" else ():
            if name in result:
                found.notes.append(f"network_args {name}: networks.lora ignores it; here it counts.")
        return result
    if module == "networks.dylora":
        return {"algo": "dylora", **result}
    if module == "locon.locon_kohya":
        return {"algo": "locon", "conv_dim": dim, "conv_alpha": alpha, **result}
    return _lycoris(result, dim, found)


def _lycoris(result: dict[str, Any], dim: int, found: Findings) -> dict[str, Any]:
    algo = str(result.get("algo", "lora")).casefold()
    result = {**result, "algo": ALGO_NAMES.get(algo, algo)}
    preset = result.setdefault("preset", "full")
    if preset in PRESETS and not PRESETS[preset].convolutions:
        result = _without(CONV, result, f"preset {preset} has no convolutions", found)
        if result["algo"] == "locon":
            result["algo"] = "lora"  # LyCORIS calls both by either name
    unit = result.pop("unit", None)
    if algo == "dylora":
        result["unit"] = unit or LYCORIS_UNIT
    elif unit is not None:
        found.notes.append(f"network_args block_size: only algo=dylora has blocks, not {algo}.")
    if result.get("dora_wd") and "wd_on_output" not in result:
        result["wd_on_output"] = True
        found.notes.append("network_args dora_wd: LyCORIS measures DoRA over outputs; wd_on_output is on.")
    if algo == "lokr" and max(dim, result.get("conv_dim", 0)) > MAX_DIM:
        result["full_matrix"] = True
        found.notes.append(
            f"network_dim {dim}: lokr of such a rank decomposes neither matrix; full_matrix is on."
        )
        if result.get("conv_dim", 0) > MAX_DIM:
            result["conv_dim"] = MAX_DIM
            result["conv_alpha"] = float(MAX_DIM)
        if dim > MAX_DIM:
            result |= {"network_dim": MAX_DIM, "network_alpha": float(MAX_DIM)}
    if algo == "lokr" and "decompose_both" in result:
        result = _both_decomposed(result, found)
    for name in ("conv_dim", "conv_alpha"):
        if result.get(name) == 0:  # LyCORIS then takes those of the linear layers, as an empty setting does
            del result[name]
    return result


def _both_decomposed(result: dict[str, Any], found: Findings) -> dict[str, Any]:
    """Return lokr's settings with the decompose_both that LyCORIS makes of any text, False included."""
    if result.get("full_matrix"):
        return {name: value for name, value in result.items() if name != "decompose_both"}
    if not result["decompose_both"]:
        found.notes.append("network_args decompose_both: LyCORIS takes any text for true, so it is on.")
    return {**result, "decompose_both": True}


def _read(kind: str, text: str) -> Any:
    """Return a value of this kind, or None where the text is none."""
    if kind == PLAIN:
        return text
    if kind == SWITCH:
        return SWITCHES.get(text.casefold())
    if kind == WORDS:
        return [part.strip() for part in re.split(r",(?=[^,]*=)", text) if part.strip()] or None
    try:
        number = float(text)
    except ValueError:
        return None
    if kind == NUMBER:
        return number
    return int(number) if number.is_integer() else None
