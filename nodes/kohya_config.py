"""Kohya Config: the settings of kohya's trainer, pasted as TOML, JSON or a command line, for Train LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from . import settings_groups as groups
from . import widgets
from .sockets import Settings

TITLE = "Kohya Config"
PROMPTS = "sample_prompts"
EXAMPLE = "--network_module=networks.lora --network_dim=32 --network_alpha=16 --learning_rate=1e-4"

# What a config leaves out and Train LoRA has a value for that is the user's own.
OF_THE_GRAPH = ("output_name", "seed", "training_comment", "metadata_title")

log = logging.getLogger("loragraft")


class KohyaConfig(io.ComfyNode):
    """Read a config of kohya's trainer; what has another place in a graph is named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftKohyaConfig",
            display_name=TITLE,
            category="LoraGraft/settings",
            description="Settings of kohya's sd-scripts, lora-scripts or kohya_ss' GUI, pasted as TOML, JSON "
            "or a command line. What they leave out has kohya's default. Settings that cannot be honoured "
            "are refused before anything runs.",
            search_aliases=[
                "sd-scripts",
                "lora-scripts",
                "kohya_ss",
                "bmaltais",
                "import settings",
                "train_network.py",
                "flux_train_network.py",
            ],
            inputs=[
                io.String.Input(
                    "config",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="The text of a config_file (TOML), of a file that kohya_ss' GUI has saved "
                    "(JSON), or a whole command line of train_network.py or of kohya's scripts for SDXL, SD3 "
                    "and Flux.",
                ),
                Settings.Input(
                    "settings", optional=True, tooltip="From another settings node; both then count."
                ),
            ],
            outputs=[
                Settings.Output(
                    "settings", display_name="settings", tooltip="For Train LoRA's input settings."
                ),
                io.String.Output(
                    "notes",
                    display_name="notes",
                    tooltip="What was filled in, what means nothing here, and what other nodes have to be "
                    "told: folders, models, and the settings of the dataset.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, config: str | None = None) -> bool | str:
        """Refuse what cannot be read or honoured before anything runs."""
        from ..trainer.errors import LoraGraftError

        try:
            if config is not None:
                _read(config)
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, config: str, settings: Any = None) -> io.NodeOutput:
        own, notes = _read(config)
        for note in notes:
            log.info("%s: %s", TITLE, note)
        return io.NodeOutput(groups.joined(settings, own, TITLE), "\n".join(notes))


def _defaults() -> dict[str, Any]:
    """Return what kohya's arguments are where none is given, for those that are widgets of Train LoRA too.

    Without them a widget would count for what the config leaves out.
    """
    from ..trainer import api
    from ..trainer.imports.kohya_table import PLACES, all_arguments

    arguments = {*all_arguments(), *groups.CONV}.difference(PLACES)
    names = [n for n in (*widgets.TRAIN_COMMON, *widgets.TRAIN_ADVANCED) if n in arguments]
    return {name: getattr(api.TrainConfig(), name) for name in names}


def _read(text: str) -> tuple[groups.Linked, list[str]]:
    """Return the settings of a run, and the notes on all else."""
    from ..trainer import api

    found = api.read_kohya(text, where=TITLE)
    # A file of prompts is not opened: Train LoRA has the prompts, and checks all of it again.
    prompts = {"sample_prompts": ["prompt"]} if PROMPTS in found.places else {}
    api.make_both({**found.settings, **prompts}, where=TITLE)
    known = api.TrainConfig.__dataclass_fields__
    own = {name: value for name, value in found.settings.items() if name in known}
    filled = {name: value for name, value in own.items() if name in found.filled}
    given = groups.Linked(
        {name: value for name, value in own.items() if name not in filled},
        {n: v for n, v in {**_defaults(), **filled}.items() if n not in OF_THE_GRAPH},
    )
    places = [name for name in found.places if name != PROMPTS]
    notes = [*found.notes, *_elsewhere(places, "the loader nodes")]
    if prompts:
        notes.append(f"{PROMPTS}: write the file's lines into {PROMPTS} on Train LoRA.")
    data = (name for name in found.settings if name not in own)
    return given, notes + _elsewhere(data, "Build Dataset")


def _elsewhere(names: Iterable[str], where: str) -> list[str]:
    """Say where settings stand in a graph; values may be paths, which no saved workflow should hold."""
    return [f"{name}: in a graph this stands on {where}, set it there." for name in names]
