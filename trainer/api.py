"""The one door: what nodes, the command line and scripts call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .adapters.files import read_metadata as lora_metadata
from .adapters.files import read_tensors as lora_tensors
from .checks import make, make_both
from .config import DatasetConfig, TrainConfig, as_dict, info_of
from .data.bridge import check_memory, chosen_records, from_pictures, to_picture
from .data.caption_lists import read_caption_list, set_captions
from .data.caption_ops import PRESETS as CAPTION_PRESETS
from .data.caption_ops import Edited, edit_captions, escape_brackets
from .data.caption_steps import OPERATIONS as CAPTION_OPERATIONS
from .data.config_files import read_blocks
from .data.convert import convert
from .data.crop import Cropped, CropSettings, crop_dataset
from .data.crop_preview import crop_preview
from .data.duplicate_sheet import duplicate_sheet
from .data.duplicates import duplicate_lines, find_duplicates, without_duplicates
from .data.extract import extract_frames, plan_frames
from .data.frame_store import hand_edits
from .data.frames import FrameSettings
from .data.known_words import known_word
from .data.kohya_export import Export, export_kohya
from .data.options import bad_option
from .data.orphans import find_orphans, remove_orphans
from .data.records import Dataset, Record, merged
from .data.records_file import load_dataset, save_dataset
from .data.report_data import Viewpoint, report_data
from .data.report_html import report_html
from .data.report_images import report_pictures
from .data.report_text import report_lines
from .data.scan import complete, scan_folder
from .data.scan_options import ScanOptions, parse_captions
from .data.subjects import SEVERAL, own_subjects, subject_from_mask, subjects_from_boxes, subjects_from_file
from .data.tag_counts import count_tags, frequency_lines
from .data.tagger import TagSettings, tag_dataset
from .data.tagger_download import download_lines, download_tagger
from .data.tagger_models import AUTO as AUTO_TAGGER
from .data.tagger_models import KNOWN_NAMES as KNOWN_TAGGERS
from .data.tagger_models import TaggerFiles, choose_taggers, find_taggers
from .data.train_set import Block, TrainSet, add_regularisation, build_train_set, freeze_blocks
from .data.upscale import Upscaler, open_upscaler, upscale_small, weights_key
from .data.video_files import find_videos
from .data.working_copy import Encoding
from .draw import Drawn, draw
from .draw import Settings as DrawSettings
from .errors import LoraGraftError
from .events import Cached, Event, Failed, Finished, Note, Planned, Sampled, Saved, Step, Validated
from .families import FAMILIES, opening
from .families.base import Look, untold
from .families.opening import Base, hash_parts, hash_weights
from .families.text.tokenizers import find_tokenizer, load_tokenizer
from .imports.files import read_foreign
from .imports.imported import Imported
from .imports.kohya import read_kohya
from .loop import Places
from .objective import Flow, NoiseSchedule
from .optim.curve import block_bars
from .optim.curve import curve as learning_rate_curve
from .optim.find import available as available_optimizers
from .parts import Parts, Target
from .paths import of_other_system, resolve, safe_name
from .plan import plan_run
from .presets import Preset, preset, presets
from .preview import chart, grid, parse_range
from .progress import validation_line
from .sample_prompts import read_prompts
from .together import train, train_together
from .tools.check import LoraCheck, check_lora
from .tools.edit_metadata import FIELDS as METADATA_FIELDS
from .tools.edit_metadata import edit_metadata, metadata_lines
from .tools.extract import ExtractSettings
from .tools.jobs import (
    PRECISIONS,
    Output,
    Written,
    convert_lora,
    extract_lora_file,
    merge_checkpoint,
    merge_lora,
    resize_lora,
)
from .tools.layout import convert_checkpoint
from .tools.look import SampleSettings
from .tools.merge import MergeSettings
from .tools.naming import NAMINGS
from .tools.resize import ResizeSettings
from .tools.sample import Drawing, draw_images
from .tools.samplers import SAMPLERS
from .tools.sigmas import SCHEDULES
from .tools.wildcards import expand_wildcards, pick_wildcards, without_words

__all__ = [
    "AUTO_TAGGER",
    "Base",
    "Block",
    "CAPTION_OPERATIONS",
    "CAPTION_PRESETS",
    "Cached",
    "CropSettings",
    "Cropped",
    "Dataset",
    "DatasetConfig",
    "DrawSettings",
    "Drawing",
    "Drawn",
    "Edited",
    "Encoding",
    "Event",
    "Export",
    "ExtractSettings",
    "Failed",
    "Finished",
    "FAMILIES",
    "Flow",
    "FrameSettings",
    "Imported",
    "KNOWN_TAGGERS",
    "Look",
    "LoraCheck",
    "LoraGraftError",
    "METADATA_FIELDS",
    "MergeSettings",
    "NAMINGS",
    "NoiseSchedule",
    "Note",
    "Output",
    "PRECISIONS",
    "Parts",
    "Places",
    "Planned",
    "Preset",
    "Record",
    "ResizeSettings",
    "SAMPLERS",
    "SCHEDULES",
    "SEVERAL",
    "SampleSettings",
    "Sampled",
    "Saved",
    "ScanOptions",
    "Step",
    "TagSettings",
    "TaggerFiles",
    "Target",
    "TrainConfig",
    "TrainSet",
    "Upscaler",
    "Validated",
    "Viewpoint",
    "Written",
    "add_regularisation",
    "as_dict",
    "available_optimizers",
    "bad_option",
    "block_bars",
    "build_train_set",
    "chart",
    "check_lora",
    "check_memory",
    "choose_taggers",
    "chosen_records",
    "complete",
    "convert",
    "convert_checkpoint",
    "convert_lora",
    "count_tags",
    "crop_dataset",
    "crop_preview",
    "demo_base_file",
    "demo_dataset",
    "demo_tokenizer",
    "download_lines",
    "download_tagger",
    "draw",
    "draw_images",
    "duplicate_lines",
    "duplicate_sheet",
    "edit_captions",
    "edit_metadata",
    "escape_brackets",
    "expand_wildcards",
    "export_kohya",
    "extract_frames",
    "extract_lora_file",
    "find_duplicates",
    "find_orphans",
    "find_taggers",
    "find_tokenizer",
    "find_videos",
    "freeze_blocks",
    "frequency_lines",
    "from_pictures",
    "grid",
    "hand_edits",
    "hash_parts",
    "hash_weights",
    "info_of",
    "known_word",
    "learning_rate_curve",
    "load_dataset",
    "lora_metadata",
    "lora_tensors",
    "make",
    "make_both",
    "merge_checkpoint",
    "merge_lora",
    "merged",
    "metadata_lines",
    "of_other_system",
    "open_base",
    "open_base_from_weights",
    "open_demo_base",
    "open_upscaler",
    "own_subjects",
    "parse_captions",
    "parse_range",
    "pick_wildcards",
    "plan_frames",
    "plan_run",
    "preset",
    "presets",
    "read_blocks",
    "read_caption_list",
    "read_foreign",
    "read_kohya",
    "read_prompts",
    "remove_orphans",
    "report_data",
    "report_html",
    "report_lines",
    "report_pictures",
    "resize_lora",
    "resolve",
    "safe_name",
    "save_dataset",
    "scan_folder",
    "set_captions",
    "subject_from_mask",
    "subjects_from_boxes",
    "subjects_from_file",
    "tag_dataset",
    "to_picture",
    "token_counter",
    "train",
    "train_together",
    "untold",
    "upscale_small",
    "validation_line",
    "weights_key",
    "without_duplicates",
    "without_words",
]

DEMO = Path(__file__).parent / "demo"


def open_base(
    path: Path | str,
    *,
    tokenizer: Path | str | Sequence[Path | str] | None = None,
    name: str | None = None,
    allow_download: bool = False,
    vae: Path | str | None = None,
    text_encoders: Sequence[Path | str] = (),
) -> Base:
    """Open a base model from a .safetensors or .gguf file or a diffusers folder.

    ``vae`` and ``text_encoders`` are files beside a denoiser's, or in place of a checkpoint's own; which
    text encoder one is, its content tells. ``tokenizer`` are the folders of one or several tokenizers, known
    by their files; others are looked for in a ComfyUI and in the Hugging Face cache, and on the hub only if
    ``allow_download``. Raises LG-BASE errors.
    """
    given = [tokenizer] if isinstance(tokenizer, str | Path) else tokenizer or ()
    path, folder = Path(path), [Path(each) for each in given if str(each)]
    if not path.is_dir():
        own_vae, texts = Path(vae) if vae else None, [Path(text) for text in text_encoders]
        return opening.open_file(
            path,
            tokenizer=folder,
            name=name,
            allow_download=allow_download,
            vae=own_vae,
            text_encoders=texts,
        )
    if vae or text_encoders:
        raise LoraGraftError(
            "LG-BASE-012",
            "A diffusers folder takes no further files.",
            where=path.name,
            why="it has a VAE and text encoders of its own.",
            fix="leave the further files out, or name the denoiser's single file as the base",
        )
    return opening.open_folder(path, tokenizer=folder, name=name, allow_download=allow_download)


def open_base_from_weights(
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    tokenizers: Mapping[str, Path | str],
    weights_hash: str | None = None,
    velocity: bool | None = None,
    zero_terminal: bool | None = None,
) -> Base:
    """Open a base model from tensors under single-file names: shared, never written to.

    ``tokenizers`` are folders by kind, such as "clip" and "t5". ``weights_hash`` is ``hash_weights(weights)``
    if the caller remembers it. ``velocity`` says whether the base predicts velocity, ``zero_terminal``
    whether its last timestep is noise alone, None where that is not known. Raises LG-BASE errors.
    """
    folders = {kind: find_tokenizer(Path(folder), kind=kind) for kind, folder in tokenizers.items()}
    return opening.open_weights(
        weights,
        name=name,
        tokenizers=folders,
        known_hash=weights_hash,
        velocity=velocity,
        zero_terminal=zero_terminal,
    )


def token_counter(tokenizer: Path | str | None = None) -> Callable[[str], int]:
    """Return a function that counts a caption's tokens as CLIP does, without its start and end marks.

    ``tokenizer`` is a folder, looked for as `open_base` does where it is None. Raises LG-BASE-007, -008.
    """
    loaded = load_tokenizer(find_tokenizer(Path(tokenizer) if tokenizer else None))
    return lambda text: max(0, len(loaded(text)["input_ids"]) - 2)


def demo_base_file() -> Path:
    """Return the embedded tiny base model."""
    return DEMO / "base" / "demo_base.safetensors"


def demo_tokenizer() -> Path:
    """Return the embedded base model's tokenizer folder."""
    return DEMO / "base" / "tokenizer"


def demo_dataset() -> Path:
    """Return the embedded sample dataset's folder."""
    return DEMO / "dataset"


def open_demo_base() -> Base:
    """Open the embedded tiny base model."""
    return open_base(demo_base_file(), tokenizer=demo_tokenizer())
