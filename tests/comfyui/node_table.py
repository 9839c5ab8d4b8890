"""Every node with its title, category, inputs and outputs, in their order."""

from __future__ import annotations

from loragraft.nodes import settings_groups, widgets

# For ever: saved workflows name these ids and sockets, and store widget values in this order.
NODES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "LoraGraftLoadDemoBase": ("Load Demo Base", "LoraGraft/train", [], ["MODEL", "CLIP", "VAE"]),
    "LoraGraftLoadImageFolder": (
        "Load Image Folder",
        "LoraGraft/dataset",
        [
            *("path", "recursive", "class_tokens", "default_repeats", "on_bad", "captions", "caption_lines"),
            *("caption_json", "masks", "mask_folder", "background", "is_reg", "reg_folder", "animated"),
            "max_megapixels",
        ],
        ["LORAGRAFT_DATASET", "STRING"],
    ),
    "LoraGraftBuildDataset": (
        "Build Dataset",
        "LoraGraft/dataset",
        [
            *("dataset", *widgets.DATASET_COMMON, *widgets.DATASET_ADVANCED),
            *("kind", "regularisation", "clip"),
        ],
        ["LORAGRAFT_TRAIN_SET", "STRING", "STRING", "IMAGE"],
    ),
    "LoraGraftLoadDatasetConfig": (
        "Load Dataset Config",
        "LoraGraft/dataset",
        ["file", "resolution", "on_bad", "missing_captions", "kind", "clip"],
        ["LORAGRAFT_TRAIN_SET", "STRING", "STRING", "IMAGE"],
    ),
    "LoraGraftExportDataset": (
        "Export Dataset",
        "LoraGraft/dataset",
        ["train_set", "name", "format", "quality", "relative"],
        ["STRING", "STRING"],
    ),
    "LoraGraftSweep": ("Sweep", "LoraGraft/train", ["sweep"], ["LORAGRAFT_SWEEP"]),
    "LoraGraftTrainLoRA": (
        "Train LoRA",
        "LoraGraft/train",
        [
            *("model", "clip", "vae", "train_set", *widgets.TRAIN_COMMON),
            *(n for n in widgets.TRAIN_ADVANCED if n not in widgets.TRAIN_LATER),
            *("existing_run", "attention", "base_storage", "memory", "blocks_to_swap", "sweep", "settings"),
        ],
        ["LORA_MODEL", "MODEL", "CLIP", "LOSS_MAP", "STRING", "STRING", "LORAGRAFT_CHECKPOINTS"],
    ),
    "LoraGraftPreviewWithLoRA": (
        "Preview with LoRA",
        "LoraGraft/test",
        [
            *(
                "model",
                "clip",
                "vae",
                "lora_name",
                "prompts",
                "negative",
                "seeds",
                "strengths",
                "clip_strengths",
            ),
            *("sampler_name", "scheduler", "steps", "cfg", "width", "height", "batch_size", "save_grid"),
            *("checkpoints", "max_checkpoints", "wildcards", "trigger_words"),
        ],
        ["IMAGE", "IMAGE"],
    ),
    "LoraGraftConvertImages": (
        "Convert Images",
        "LoraGraft/dataset",
        ["dataset", "format", "quality", "names", "prefix", "name"],
        ["LORAGRAFT_DATASET", "STRING"],
    ),
    "LoraGraftFindDuplicates": (
        "Find Duplicates",
        "LoraGraft/dataset",
        ["dataset", "action", "near", "distance"],
        ["LORAGRAFT_DATASET", "LORAGRAFT_DATASET", "IMAGE", "STRING"],
    ),
    "LoraGraftWD14Tag": (
        "WD14 Tag",
        "LoraGraft/dataset",
        [
            *("dataset", "tagger", "general_threshold", "character_threshold", "trigger", "exclude"),
            *("existing", "replace_underscore", "more_taggers", "combine", "always_first", "rating"),
            *("character_first", "general_mcut", "character_mcut", "batch_size", "device"),
        ],
        ["LORAGRAFT_DATASET", "STRING", "STRING"],
    ),
    "LoraGraftDownloadTagger": ("Download Tagger", "LoraGraft/dataset", ["tagger", "download"], ["STRING"]),
    "LoraGraftEditCaptions": (
        "Edit Captions",
        "LoraGraft/dataset",
        ["dataset", "preset", "trigger", "operations", "separator"],
        ["LORAGRAFT_DATASET", "STRING", "STRING", "STRING"],
    ),
    "LoraGraftSetCaptions": (
        "Set Captions",
        "LoraGraft/dataset",
        ["dataset", "captions", "template", "trigger"],
        ["LORAGRAFT_DATASET", "STRING"],
    ),
    "LoraGraftFrameExtract": (
        "Frame Extract",
        "LoraGraft/dataset",
        [
            *("path", "name", "mode", "every_n_frames", "every_n_seconds", "start", "end", "max_frames"),
            *("skip_blurred", "skip_similar", "image_format", "recursive", "class_tokens"),
            *("default_repeats", "on_bad", "scene_threshold", "min_sharpness", "max_distance"),
        ],
        ["LORAGRAFT_DATASET", "STRING", "STRING"],
    ),
    "LoraGraftCrop": (
        "Crop",
        "LoraGraft/dataset",
        [
            *("dataset", "mode", "align", "width", "height", "bboxes", "masks", "upscale_model"),
            *("max_aspect", "margin", "subject_shape", "min_side", "several", "boxes_longest_side"),
            *("upscale_to", "name", "reg_caption"),
        ],
        ["LORAGRAFT_DATASET", "LORAGRAFT_DATASET", "IMAGE", "STRING"],
    ),
    "LoraGraftDatasetToImages": (
        "Dataset to Images",
        "LoraGraft/dataset",
        ["dataset", "first", "count", "longest_side"],
        ["IMAGE", "MASK", "STRING", "STRING", "LORAGRAFT_DATASET"],
    ),
    "LoraGraftImagesToDataset": (
        "Images to Dataset",
        "LoraGraft/dataset",
        ["images", "name", "image_format", "dataset", "captions", "masks", "class_tokens"],
        ["LORAGRAFT_DATASET", "STRING"],
    ),
    **{
        group.node_id: (
            group.title,
            "LoraGraft/settings",
            [*([group.choice] if group.choice else []), *group.always, "settings"],
            ["LORAGRAFT_SETTINGS"],
        )
        for group in settings_groups.GROUPS.values()
    },
    "LoraGraftKohyaConfig": (
        "Kohya Config",
        "LoraGraft/settings",
        ["config", "settings"],
        ["LORAGRAFT_SETTINGS", "STRING"],
    ),
    "LoraGraftResizeLoRA": (
        "Resize LoRA",
        "LoraGraft/tools",
        [
            *("lora_name", "output_name", "rank", "method", "parameter"),
            *("conv_rank", "save_precision", "overwrite"),
        ],
        ["STRING", "STRING"],
    ),
    "LoraGraftMergeLoRAs": (
        "Merge LoRAs",
        "LoraGraft/tools",
        ["loras", "output_name", "method", "rank", "conv_rank", "save_precision", "overwrite"],
        ["STRING", "STRING"],
    ),
    "LoraGraftMergeIntoCheckpoint": (
        "Merge into Checkpoint",
        "LoraGraft/tools",
        ["checkpoint", "loras", "output_name", "save_precision", "overwrite"],
        ["STRING", "STRING"],
    ),
    "LoraGraftExtractLoRA": (
        "Extract LoRA",
        "LoraGraft/tools",
        [
            *("original", "tuned", "output_name", "rank", "conv_rank", "clamp_quantile", "min_diff"),
            *("save_precision", "overwrite"),
        ],
        ["STRING", "STRING"],
    ),
    "LoraGraftCheckLoRA": (
        "Check LoRA",
        "LoraGraft/tools",
        ["lora_name", "clip_skip"],
        ["BOOLEAN", "STRING"],
    ),
    "LoraGraftLoRAMetadata": (
        "LoRA Metadata",
        "LoraGraft/tools",
        ["lora_name", "changes", "output_name", "thumbnail", "overwrite"],
        ["STRING", "STRING"],
    ),
    "LoraGraftConvertLoRA": (
        "Convert LoRA",
        "LoraGraft/tools",
        ["lora_name", "naming", "output_name", "save_precision", "overwrite"],
        ["STRING", "STRING"],
    ),
    "LoraGraftConvertCheckpoint": (
        "Convert Checkpoint",
        "LoraGraft/tools",
        ["model", "output_name", "vae", "overwrite"],
        ["STRING"],
    ),
}
