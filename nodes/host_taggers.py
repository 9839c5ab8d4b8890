"""Where ComfyUI and other packs keep taggers, and room for one on the GPU.

Other packs' folders are only read. The key wd14_tagger is never registered here: that would move the
folder of the pack that owns it.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import folder_paths

from ..trainer.data.tagger_models import TaggerFiles, find_taggers

KEY = "wd14_tagger"
PACK = "wd14-tagger"  # ComfyUI-WD14-Tagger, whichever way its folder is written
OWN = "loragraft_taggers"
GPU_BYTES = 2 * 2**30


def downloads_folder() -> Path:
    """Return the folder that downloads go to."""
    return Path(folder_paths.models_dir) / OWN


def tagger_folders() -> list[Path]:
    """Return all folders in which taggers may lie, ours last, so that nothing is fetched twice."""
    folders = [Path(f) for f in folder_paths.get_folder_paths(KEY)] if _has_key() else []
    for root in folder_paths.get_folder_paths("custom_nodes"):
        packs = sorted(Path(root).iterdir()) if Path(root).is_dir() else []
        folders += [pack / "models" for pack in packs if pack.name.casefold().endswith(PACK)]
    folders += [Path(folder_paths.models_dir) / KEY, downloads_folder()]
    return list(dict.fromkeys(folders))


def find() -> dict[str, TaggerFiles]:
    """Return the taggers that are there, by name."""
    return find_taggers(tagger_folders())


def searched() -> list[str]:
    """Say in words where `find` looks, folders that exist first."""
    folders = sorted(tagger_folders(), key=lambda folder: not folder.is_dir())
    return [*map(str, folders), "Hugging Face's cache"]


def make_room() -> None:
    """Let ComfyUI put enough of its models aside that a tagger fits on the GPU."""
    device = management.get_torch_device()
    if not management.is_device_cpu(device):
        management.free_memory(GPU_BYTES, device)


def _has_key() -> bool:
    return KEY in folder_paths.folder_names_and_paths
