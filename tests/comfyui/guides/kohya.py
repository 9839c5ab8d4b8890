"""A pasted command line, two grids, a smaller file and its check, after the anonymous guide to LoRA."""

from __future__ import annotations

from loragraft_tests.comfyui.guides.columns import DRAWING, PROMPT, TAGS, TRAINING, TRIGGER, Columns
from loragraft_tests.comfyui.sheet import Info, Sheet, Workflow

INTRO = """## Train with a command line of kohya's trainer, test, shrink

After the **Гайд по LoRA** of October 2023. Press **Run**: its settings train the sample creature on the \
tiny base.

Your own: folders such as `1_nekochan` and `6_maid` in one folder below `input`, whose name goes into \
**Load Image Folder**; **Load Checkpoint** in the place of **Load Demo Base**. Images × repeats of 300 \
to 500 an epoch for a character, 400 to 600 for a style.

`clip_skip` 2 is for anime models: **CLIP Set Last Layer** at -2. For photos take 1, and remove that \
node.
"""
CONFIG = """### Параметры тренировки

**Kohya Config** takes a command line of `train_network.py` as it is, or the text of a `config_file`. \
Below stands what means nothing here, and what to set on another node. What cannot be honoured is \
refused.

Rates, `--resolution` and `T_0` suit the tiny base. For SD1.x the guide has 1e-4 and 5e-5 (text \
encoder), 512 to 768, and as `T_0` all steps divided by the number of restarts. It advises against \
`--noise_offset`. On a card of the 30 series or later add `--mixed_precision=bf16`.
"""
GRIDS = """### Протестировать новые лоры

First grid: saved epochs and weights from 0.7 to 1.5. The best epoch works at 1, and does not break at \
1.5.

Second grid: the last epoch with eight seeds, each with a background that it picks, so that one lucky \
seed decides nothing.
"""
SHRINK = """### Снизить ранг, check_lora_weights

**Resize LoRA** is the guide's command: rank 32 at most, `sv_fro` 0.9, bf16.

**Check LoRA** finds zeros: at clip_skip 2 there must be just six, those of the text encoder's last \
layer.
"""
COMMAND = """accelerate launch --num_cpu_threads_per_process=8 train_network.py
  --pretrained_model_name_or_path="C:/ai/nai.safetensors" --train_data_dir="C:/ai/my-dataset"
  --output_dir="C:/ai/my-lora-dir" --output_name="my_best_lora"
  --logging_dir="C:/ai/my-lora-logs" --log_prefix="my_best_lora_" --caption_extension=.txt
  --network_module=networks.lora --network_dim=64 --network_alpha=32
  --network_args "conv_dim=32" "conv_alpha=16"
  --learning_rate=2e-3 --unet_lr=2e-3 --text_encoder_lr=1e-3
  --optimizer_type=AdamW --optimizer_args "weight_decay=0.01" "betas=0.9,0.999"
  --lr_scheduler_type=cosine_annealing_warmup.CosineAnnealingWarmupRestarts
  --lr_scheduler_args "T_0=40" "gamma_min_lr=0.99915" "decay=1" "down_factor=0.5" "warmup_steps=10"
    "cycle_warmup=5" "init_lr_ground=True"
  --min_snr_gamma=5 --scale_weight_norms=1.0
  --resolution=64 --enable_bucket --min_bucket_reso=32 --max_bucket_reso=128
  --train_batch_size=8 --gradient_accumulation_steps=1
  --max_token_length=225 --shuffle_caption --keep_tokens=1 --clip_skip=2 --seed=42
  --max_train_epochs=16 --save_every_n_epochs=4 --save_last_n_epochs=999
  --save_precision=bf16 --save_model_as=safetensors
  --cache_latents --xformers --persistent_data_loader_workers --max_data_loader_n_workers=2
"""
NAME = "my_best_lora"


def kohya_workflow(info: Info) -> Workflow:
    """Return the workflow of a pasted command line, two grids, a smaller file and its check."""
    sheet = Sheet(info, "4b82c1f9-6e3d-4058-a7f1-d90c5e2b8a44")
    columns = Columns(sheet)
    columns.begin()
    columns.note(INTRO, 320)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    build = columns.add("LoraGraftBuildDataset", 800, {**TAGS, "kind": "character"})
    columns.frame("1  Dataset")

    columns.begin(560)
    columns.note(CONFIG, 210)
    config = columns.add("LoraGraftKohyaConfig", 620, {"config": COMMAND})
    said = columns.add("PreviewAny", 460, title="What the config says to other nodes")
    columns.frame("2  Settings")

    columns.begin(460)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    clip = columns.add("CLIPSetLastLayer", 70, {"stop_at_clip_layer": -2})
    train = columns.add(
        "LoraGraftTrainLoRA",
        1500,
        {
            **TRAINING,
            "output_name": NAME,
            "clip_skip": 2,
            "save_every_n_steps": 0,
            "sample_prompts": PROMPT,
        },
    )
    columns.frame("3  Base and training")

    columns.begin(620)
    columns.note(GRIDS, 130)
    weights = columns.add(
        "LoraGraftPreviewWithLoRA",
        1000,
        {"prompts": PROMPT, "seeds": "11", "strengths": "0.7-1.5 [5]", **DRAWING},
        title="Epochs and weights",
    )
    columns.frame("4  Test: epochs and weights")

    columns.begin(620)
    seeds = columns.add(
        "LoraGraftPreviewWithLoRA",
        1000,
        {
            "prompts": f"{TRIGGER}, large, {{blue|yellow|green|white}} background",
            "seeds": "1-8",
            "strengths": "0, 1",
            "wildcards": "by seed",
            **DRAWING,
        },
        title="Seeds and backgrounds",
    )
    columns.frame("4  Test: seeds and backgrounds")

    columns.begin()
    columns.note(SHRINK, 160)
    resize = columns.add(
        "LoraGraftResizeLoRA",
        290,
        {
            "output_name": f"{NAME}_32rank",
            "rank": 32,
            "method": "sv_fro",
            "parameter": 0.9,
            "save_precision": "bf16",
            "overwrite": True,
        },
    )
    smaller = columns.add("PreviewAny", 260, title="The new ranks")
    check = columns.add("LoraGraftCheckLoRA", 170)
    verdict = columns.add("PreviewAny", 260, title="The check")
    columns.frame("5  Shrink and check")

    sheet.link(images, "dataset", build, "dataset")
    sheet.link(base, 1, clip, "clip")
    sheet.link(config, "notes", said, "source")
    sheet.link(config, "settings", train, "settings")
    for target in (train, weights, seeds):
        sheet.link(base, 0, target, "model")
        sheet.link(clip, 0, target, "clip")
        sheet.link(base, 2, target, "vae")
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(train, "checkpoints", weights, "checkpoints")
    for target in (weights, seeds, resize, check):
        sheet.link(train, "lora_name", target, "lora_name")
    sheet.link(resize, "report", smaller, "source")
    sheet.link(check, "report", verdict, "source")
    return sheet.workflow()
