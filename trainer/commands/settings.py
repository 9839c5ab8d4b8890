"""Settings of the command line: flags made from the config tables, and the TOML file they win over."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from .. import api
from ..config import DatasetConfig, TrainConfig, info_of
from ..data.toml_text import toml_lines
from ..errors import LoraGraftError
from ..literals import literal
from ..paths import of_other_system
from ..settings.flow import FlowSettings
from ..settings.learning import LearningSettings
from ..settings.loss import LossSettings
from ..settings.network import NetworkSettings
from ..settings.running import RunningSettings
from ..settings.saving import SavingSettings
from ..settings.text import TextSettings
from .help_text import default_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

# Settings of the command line that are no training settings, with kohya's names where it has them.
PLACES = {"pretrained_model_name_or_path": "base model", "train_data_dir": "image folder"}
# Files of parts beside the base's, with kohya's names for them; which part one is, its content tells.
VAE_NAMES = ("vae", "ae")
TEXT_NAMES = ("text_encoder", "clip_l", "clip_g", "t5xxl", "gemma2", "qwen3")
# The dataclasses that settings stand in, and what their flags have in common.
GROUPS: tuple[tuple[type, str], ...] = (
    (DatasetConfig, "images and captions"),
    (NetworkSettings, "network"),
    (LearningSettings, "learning rates, optimizer, schedule"),
    (LossSettings, "loss and noise"),
    (FlowSettings, "models that learn a flow"),
    (TextSettings, "text encoders and embeddings"),
    (RunningSettings, "steps, memory, precision"),
    (SavingSettings, "saving, samples, validation"),
)
SWEEP = "sweep"  # the table of a config file that holds values to try instead of settings


def read_settings(arguments: argparse.Namespace, *places: str) -> tuple[dict[str, Any], list[str]]:
    """Merge what the run starts from, the config file (tables flattened, as kohya does) and the flags.

    The later wins. Returns the training settings and what was given for ``places`` (keys of PLACES), all
    of which are needed. Raises LG-CLI-001 and LG-CLI-002.
    """
    settings: dict[str, Any] = dict(getattr(arguments, "start", {}))
    for key, value in read_config_file(arguments).items():
        if key != SWEEP:
            settings.update(value if isinstance(value, dict) else {key: value})
    flags = config_flags()
    settings.update({k: v for k, v in vars(arguments).items() if k in flags and v is not None})
    given = {key: getattr(arguments, key, None) or settings.get(key) for key in PLACES}
    for key in PLACES:
        settings.pop(key, None)
    take_files(settings, arguments)
    for key in places:
        if given[key] is None:
            raise LoraGraftError(
                "LG-CLI-002",
                f"No {PLACES[key]} was named.",
                where=f"--{key}",
                why="there is nothing to train on.",
                fix=f"add --{key} PATH, or 'demo' for the embedded one",
            )
    return settings, [str(given[key]) for key in places]


def take_files(settings: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Move the files of a VAE and of text encoders from a config to the flags, which win over it.

    Raises LG-BASE-012 for two VAEs.
    """
    vaes = [settings.pop(name) for name in VAE_NAMES if name in settings]
    texts = [settings.pop(name) for name in TEXT_NAMES if name in settings]
    if len(vaes) > 1:
        raise _needless("The config names two VAEs.", " and ".join(VAE_NAMES), "keep one of them")
    if vaes and not getattr(arguments, "vae", None):
        arguments.vae = str(vaes[0])
    if texts and not getattr(arguments, "text_encoder", None):
        arguments.text_encoder = [
            str(file) for given in texts for file in (given if isinstance(given, list) else [given])
        ]


def _needless(what: str, where: str, fix: str) -> LoraGraftError:
    why = "what is not used would be ignored in silence."
    return LoraGraftError("LG-BASE-012", what, where=where, why=why, fix=fix)


def read_config_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is in the file that --config names, as it is there; {} without one. Raises LG-CLI-001."""
    if not arguments.config:
        return {}
    try:
        return tomllib.loads(Path(arguments.config).read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoraGraftError(
            "LG-CLI-001",
            "The config file cannot be read.",
            where=str(arguments.config),
            why=f"{error}{of_other_system(arguments.config) if isinstance(error, FileNotFoundError) else ''}",
            fix="check the path and the TOML at the named line; the file must be UTF-8",
        ) from None


def config_flags() -> dict[str, tuple[type, Any]]:
    """Return every setting's dataclass and type by its name."""
    flags: dict[str, tuple[type, Any]] = {}
    for cls in (DatasetConfig, TrainConfig):
        hints = typing.get_type_hints(cls)
        flags.update({f.name: (cls, hints[f.name]) for f in dataclasses.fields(cls)})
    return flags


def settings_text(*configs: DatasetConfig | TrainConfig) -> str:
    """Return configs as the text of a file for --config: what differs from the defaults."""
    lines: list[str] = []
    for config in configs:
        defaults = api.as_dict(type(config)())
        changed = {name: value for name, value in api.as_dict(config).items() if value != defaults[name]}
        lines += toml_lines({name: value for name, value in changed.items() if value is not None})
    return "\n".join(lines)


def add_config_flags(command: argparse.ArgumentParser, *classes: type) -> None:
    """Give a command one flag for each setting of these dataclasses, by groups; a switch needs no value."""
    flags = config_flags()
    for cls, title in GROUPS:
        names = [name for name in cls.__annotations__ if name in flags and flags[name][0] in classes]
        group = command.add_argument_group(title) if names else command
        for name in names:
            owner, hint = flags[name]
            info = info_of(owner, name)
            plural = typing.get_origin(hint) is tuple
            text = info.help + (f" One of: {', '.join(filter(None, info.choices))}." if info.choices else "")
            text += default_text(getattr(owner(), name))
            how: dict[str, Any] = {"nargs": "+"} if plural else {}
            if hint is bool:
                how = {"nargs": "?", "const": True, "metavar": "true|false"}
            kind = str if plural or hint is str else literal
            group.add_argument(f"--{name}", type=kind, help=text.replace("%", "%%"), **how)


def add_base_flags(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Give a command the flags that name a base model and a device."""
    command.add_argument(
        "--pretrained_model_name_or_path",
        required=required,
        help="base model: a checkpoint, a denoiser's file (.safetensors, .gguf), a folder, or 'demo'",
    )
    command.add_argument(
        *(f"--{name}" for name in VAE_NAMES),
        dest="vae",
        metavar="FILE",
        help="the VAE's file, where the base has none or another",
    )
    command.add_argument(
        *(f"--{name}" for name in TEXT_NAMES),
        dest="text_encoder",
        action="append",
        metavar="FILE",
        help="a text encoder's file, where the base has none or another; may be given several times, and "
        "which one it is, its content tells",
    )
    command.add_argument(
        "--tokenizer",
        action="append",
        metavar="FOLDER",
        help="folder of a text encoder's tokenizer; may be given several times",
    )
    command.add_argument(
        "--allow_download", action="store_true", help="let tokenizers be fetched from the hub"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")


def open_base(path: str, arguments: argparse.Namespace) -> api.Base:
    """Open the base model that a command names; 'demo' is the embedded one."""
    if path == "demo":
        if arguments.vae or arguments.text_encoder:
            flags = "--vae, --text_encoder"
            raise _needless("The embedded base takes no further files.", flags, "leave these flags out")
        return api.open_demo_base()
    return api.open_base(
        path,
        tokenizer=arguments.tokenizer,
        allow_download=arguments.allow_download,
        vae=arguments.vae,
        text_encoders=arguments.text_encoder or (),
    )
