"""The list of nodes that ComfyUI asks for; a failure while it is made is logged in full."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import ComfyExtension, io

log = logging.getLogger("loragraft")


class LoraGraftExtension(ComfyExtension):
    """All of LoraGraft's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes; ComfyUI itself would reduce a failure to one line."""
        try:
            from . import host_routes
            from .bridges import DatasetToImages, ImagesToDataset
            from .build_dataset import BuildDataset
            from .captions import EditCaptions, SetCaptions
            from .crop import Crop
            from .dataset_files import ExportDataset, LoadDatasetConfig
            from .demo_base import LoadDemoBase
            from .frames import FrameExtract
            from .kohya_config import KohyaConfig
            from .load_folder import LoadImageFolder
            from .preview import PreviewWithLoRA
            from .settings_nodes import Blocks, Loss, Network, Optimizer, Saving, Schedule, Text
            from .sweep import Sweep
            from .tagging import DownloadTagger, WD14Tag
            from .tidy import ConvertImages, FindDuplicates
            from .tools_check import CheckLoRA
            from .tools_checkpoint import ConvertCheckpoint, ExtractLoRA, MergeIntoCheckpoint
            from .tools_lora import ConvertLoRA, MergeLoRAs, ResizeLoRA
            from .tools_metadata import LoRAMetadata
            from .train import TrainLoRA

            host_routes.register(_answer)
        except Exception:
            log.exception("LoraGraft cannot load its nodes")
            raise
        return [
            LoadDemoBase,
            LoadImageFolder,
            ConvertImages,
            FindDuplicates,
            WD14Tag,
            DownloadTagger,
            EditCaptions,
            SetCaptions,
            BuildDataset,
            LoadDatasetConfig,
            ExportDataset,
            TrainLoRA,
            PreviewWithLoRA,
            FrameExtract,
            Crop,
            DatasetToImages,
            ImagesToDataset,
            Sweep,
            Network,
            Blocks,
            Optimizer,
            Schedule,
            Loss,
            Text,
            Saving,
            KohyaConfig,
            ResizeLoRA,
            MergeLoRAs,
            MergeIntoCheckpoint,
            ExtractLoRA,
            CheckLoRA,
            LoRAMetadata,
            ConvertLoRA,
            ConvertCheckpoint,
        ]


def _answer(question: str) -> dict[str, Any]:
    from .ahead import answer  # it needs the whole trainer, which ComfyUI's start must not wait for

    return answer(question)


def create_extension() -> ComfyExtension:
    """Return the extension."""
    return LoraGraftExtension()
