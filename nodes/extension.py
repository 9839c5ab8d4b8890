"""The list of nodes that ComfyUI asks for; a failure while it is made is logged in full."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

log = logging.getLogger("loragraft")


class LoraGraftExtension(ComfyExtension):
    """All of LoraGraft's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes; ComfyUI itself would reduce a failure to one line."""
        try:
            from .build_dataset import BuildDataset
            from .demo_base import LoadDemoBase
            from .load_folder import LoadImageFolder
            from .preview import PreviewWithLoRA
            from .train import TrainLoRA
        except Exception:
            log.exception("LoraGraft cannot load its nodes")
            raise
        return [LoadDemoBase, LoadImageFolder, BuildDataset, TrainLoRA, PreviewWithLoRA]


def create_extension() -> ComfyExtension:
    """Return the extension."""
    return LoraGraftExtension()
