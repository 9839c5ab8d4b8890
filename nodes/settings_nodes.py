"""The settings nodes: each adds its settings to what the node before it gives, for Train LoRA."""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io

from . import settings_groups as groups
from .sockets import Settings


class _Node(io.ComfyNode):
    """What the settings nodes share: all but which settings they have."""

    GROUP: ClassVar[groups.Group]

    @classmethod
    def define_schema(cls) -> io.Schema:
        group = cls.GROUP
        return io.Schema(
            node_id=group.node_id,
            display_name=group.title,
            category="LoraGraft/settings",
            description=group.description,
            search_aliases=list(group.aliases),
            inputs=[
                *groups.inputs_of(io, group),
                Settings.Input(
                    "settings", optional=True, tooltip="From another settings node; both then count."
                ),
            ],
            outputs=[
                Settings.Output(
                    "settings",
                    display_name="settings",
                    tooltip="For Train LoRA's input settings, or for another settings node.",
                )
            ],
        )

    @classmethod
    def execute(cls, settings: Any = None, **given: Any) -> io.NodeOutput:
        own = groups.Linked(groups.values_of(cls.GROUP, given))
        return io.NodeOutput(groups.joined(settings, own, cls.GROUP.title))


class Network(_Node):
    """The kind of network."""

    GROUP = groups.NETWORK


class Blocks(_Node):
    """Learning rates and ranks of blocks."""

    GROUP = groups.BLOCKS


class Optimizer(_Node):
    """The optimizer and LoRA+."""

    GROUP = groups.OPTIMIZER


class Schedule(_Node):
    """The learning rate over the run."""

    GROUP = groups.SCHEDULE


class Loss(_Node):
    """Loss and noise."""

    GROUP = groups.LOSS


class Text(_Node):
    """Captions and embeddings."""

    GROUP = groups.TEXT


class Saving(_Node):
    """Saving, validation, resuming."""

    GROUP = groups.SAVING
