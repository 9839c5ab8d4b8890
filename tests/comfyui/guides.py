"""The example workflows that do what well-known guides describe, one a guide, on the embedded samples.

Learning rates and sizes are those of the tiny base; the notes give the guides' own numbers for SD1.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loragraft.trainer.demo import run as demo_run
from loragraft.trainer.demo.creatures import HERO_SEED, creature
from loragraft_tests.comfyui.sheet import BYPASSED, MUTED, Info, Sheet, Workflow

TRIGGER = creature(HERO_SEED).name
PROMPT = f"{TRIGGER}, large, blue background"
DATASET = {key: value for key, value in demo_run.DATASET.items() if key not in ("shuffle_caption", "keep_tokens")}
TAGS = {**DATASET, "shuffle_caption": True, "keep_tokens": 1}
TRAINING = {**demo_run.TRAINING, "lr_warmup_steps": 0.05}
DRAWING = {
    "steps": demo_run.DRAWING.steps,
    "cfg": demo_run.DRAWING.cfg,
    "width": demo_run.DRAWING.size[1],
    "height": demo_run.DRAWING.size[0],
}
TOP, WIDE, SPACE = 40, 380, 80  # where columns begin, how wide they are, and what lies between them

PHOTOS_NAME = "LoraGraft Photos and Videos"
CHARACTER_NAME = "LoraGraft Character with LyCORIS"
DREAMBOOTH_NAME = "LoraGraft DreamBooth"
STYLE_NAME = "LoraGraft Style with LoHa"
KOHYA_NAME = "LoraGraft Kohya Settings"


class _Columns:
    """Columns of nodes from left to right, each in a frame."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.left, self.width, self.ids = 40, 0, list[int]()

    def begin(self, width: int = WIDE) -> None:
        """Begin the next column."""
        self.left += self.width + SPACE if self.width else 0
        self.width, self.ids = width, []

    def _top(self) -> int:
        return self.sheet.below(self.ids[-1]) if self.ids else TOP

    def note(self, text: str, height: int) -> None:
        """Add a note below the column's last node."""
        self.ids.append(self.sheet.note(text, (self.left, self._top()), (self.width, height)))

    def add(
        self, kind: str, height: int, values: Mapping[str, Any] | None = None, *, title: str = "", mode: int = 0
    ) -> int:
        """Add a node below the column's last one; return its id."""
        pos, size = (self.left, self._top()), (self.width, height)
        self.ids.append(self.sheet.add(kind, pos, size, values, title=title, mode=mode))
        return self.ids[-1]

    def frame(self, title: str) -> None:
        """Frame the column."""
        self.sheet.frame(title, self.ids)


# ---- sd-scripts on photos and videos ----

PHOTOS_NOTE = """## Photos and videos to a dataset for kohya's trainer

After the walkthrough of **sd-scripts with Flux** (爬取数据, 洗数据, dataset.toml). Press **Run**: it works on the \
sample images. Originals are never changed; what is written lies in `output/loragraft`.

Put your downloads into a folder below ComfyUI's `input` and write its name into **Load Image Folder**.

**Videos (1.2.2)**: put them into a folder below `input`, switch **Frame Extract** on (Ctrl+M), write the folder's \
name into `path`, and link its `dataset` to **Convert Images** instead. It takes every 30th frame, without blurred \
and equal ones.
"""
CLEAN_NOTE = """### 1.2 洗数据: clean

**Convert Images** is `1_rename.py` and `2_conver_format.py`: numbered names, all JPEG, from any format, AVIF and \
HEIC too. **Crop** is `5_crop.py`: cut, never stretched; look at what is hatched. With buckets it is not needed: \
set `mode` to `keep`.
"""
TOML_NOTE = """### 2 dataset.toml

`class_tokens` of the guide is the trigger word: without captions of their own, all pictures get it. `resolution` is \
the area of the buckets, 512 for SD1.x and Flux; `num_repeats` stays 1.

**Export Dataset** writes pictures, captions and `dataset.toml`, for `--dataset_config` of the guide's script. To \
train here, link `train_set` to **Train LoRA** as well.
"""


def photos_workflow(info: Info) -> Workflow:
    """Return the workflow from a folder of photos and videos to kohya's dataset.toml."""
    sheet = Sheet(info, "0e6b2f7d-9a41-4c35-8b0e-51d7c3a4f600")
    columns = _Columns(sheet)
    columns.begin()
    columns.note(PHOTOS_NOTE, 470)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    columns.add(
        "LoraGraftFrameExtract",
        600,
        {"path": "videos", "mode": "every_n_frames", "every_n_frames": 30, "image_format": "jpg"},
        mode=MUTED,
    )
    columns.frame("1.1  Collect")

    columns.begin()
    columns.note(CLEAN_NOTE, 240)
    convert = columns.add(
        "LoraGraftConvertImages", 250, {"format": "jpeg", "names": "number", "prefix": "photo_"}
    )
    twins = columns.add("LoraGraftFindDuplicates", 380, {"action": "skip"})
    crop = columns.add("LoraGraftCrop", 600, {"mode": "fixed", "width": 64, "height": 64})
    columns.frame("1.2  Clean")

    columns.begin()
    columns.note(TOML_NOTE, 320)
    words = columns.add("LoraGraftEditCaptions", 300, {"preset": "trigger only", "trigger": TRIGGER})
    build = columns.add("LoraGraftBuildDataset", 820, DATASET)
    columns.frame("2  Captions and buckets")

    columns.begin(460)
    report = columns.add("PreviewAny", 560, title="Report")
    export = columns.add("LoraGraftExportDataset", 230, {"name": "my_photos", "format": "jpeg"})
    written = columns.add("PreviewAny", 300, title="What was written")
    columns.frame("2  dataset.toml")

    for source, target in ((images, convert), (convert, twins), (twins, crop), (crop, words), (words, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(build, "report", report, "source")
    sheet.link(build, "train_set", export, "train_set")
    sheet.link(export, "report", written, "source")
    return sheet.workflow()


# ---- lora-scripts ----

CHARACTER_NOTE = """## A character, as LoRA, LoCon and LoHa

After the guide of **lora-scripts-windows**. Press **Run**: three LoRAs of the sample creature are trained on the tiny \
base, and one grid compares them.

Your own: a folder below `input` with subfolders `Repeats_Concept`, such as `6_miku 1girl`. Write the name of the \
folder **around** them into **Load Image Folder**, and put **Load Checkpoint** in the place of **Load Demo Base**. \
Epochs × repeats of 50 to 100 are usual.
"""
TAGS_NOTE = """### Tagger, 關於刪Tag

**WD14 Tag** is bypassed, because the samples have captions. Get the guide's wd14-swinv2-v2 with **Download Tagger**, \
then switch it on (Ctrl+B).

**Edit Captions** prunes hair, eyes and body: they are learned into the trigger word. For the guide's other ways \
(打全標, white list, 不打標) choose another `preset`.
"""
REG_NOTE = """### reg_data_dir

The guide's way without cutting anything out: the cropped subject is trained, the whole picture is its regularisation \
image, named by its class alone (`reg_caption`). `prior_loss_weight` 0.3 as the guide proposes.

Below 30 pictures the guide trains without: unlink `regularisation`.
"""
LYCORIS_NOTE = """### network_module, LyCoris

The guide's table: `network_dim` 32 with `conv_dim` 4, for LoHa their square roots; LoCon and LoHa learn slower (8e-5 \
and 5e-5 instead of 1e-4) and take 1.44 and 2 times as long. The rates here suit the tiny base. For SD1.x choose a \
preset on **Train LoRA**, and write 1e-4, 8e-5, 5e-5.

To train one of them alone, unlink **Sweep** and link **Network**.
"""
JUDGE_NOTE = """### 出圖測試

A good LoRA works at weight 1. Without the trigger word (last columns) the base should draw as before. Overfitting \
shows on hands first, then on the body, then on the background.
"""


def character_workflow(info: Info) -> Workflow:
    """Return the workflow of a character with pruned tags and regularisation, and three kinds of network."""
    sheet = Sheet(info, "1c9d4a58-37e2-4f16-a0cb-8f25d06b7e11")
    columns = _Columns(sheet)
    columns.begin()
    columns.note(CHARACTER_NOTE, 400)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("train_data_dir")

    columns.begin()
    columns.note(TAGS_NOTE, 330)
    tag = columns.add(
        "LoraGraftWD14Tag", 400, {"tagger": "wd-v1-4-swinv2-tagger-v2", "trigger": TRIGGER}, mode=BYPASSED
    )
    edit = columns.add(
        "LoraGraftEditCaptions",
        310,
        {"preset": "prune features", "trigger": TRIGGER, "operations": "deduplicate"},
    )
    edits = columns.add("PreviewAny", 300, title="What the edits did")
    columns.frame("Tagger and tags")

    columns.begin()
    columns.note(REG_NOTE, 300)
    crop = columns.add("LoraGraftCrop", 560, {"mode": "square", "reg_caption": "creature"})
    build = columns.add("LoraGraftBuildDataset", 760, {**TAGS, "prior_loss_weight": 0.3, "kind": "character"})
    columns.frame("Regularisation")

    columns.begin(460)
    columns.note(LYCORIS_NOTE, 330)
    sweep = columns.add(
        "LoraGraftSweep",
        200,
        {
            "sweep": "algo: lora, locon, loha / network_dim: 32, 32, 6 / network_alpha: 16, 16, 3 / "
            "conv_dim: none, 4, 2 / conv_alpha: none, 2, 1 / learning_rate: 5e-3, 4e-3, 2.5e-3 / "
            "text_encoder_lr: 2.5e-3, 2e-3, 1.25e-3"
        },
    )
    network = columns.add(
        "LoraGraftNetwork", 520, {"algo": "locon", "algo.conv_dim": 4, "algo.conv_alpha": 2.0}
    )
    columns.frame("Network")

    columns.begin(460)
    train = columns.add(
        "LoraGraftTrainLoRA",
        1500,
        {
            **TRAINING,
            "output_name": f"character_{TRIGGER}",
            "max_train_steps": 150,
            "save_every_n_steps": 0,
            "engine": "eager",
            "sample_prompts": PROMPT,
            "preview_image": False,
        },
    )
    columns.frame("Train")

    columns.begin(620)
    columns.note(JUDGE_NOTE, 140)
    grid = columns.add(
        "LoraGraftPreviewWithLoRA",
        1290,
        {
            "prompts": f"{PROMPT}\n{TRIGGER}, large, yellow background\nlarge red circle, white background",
            "seeds": "11",
            "strengths": "0, 1",
            **DRAWING,
        },
    )
    columns.frame("Test")

    for source, target in ((images, tag), (tag, edit), (edit, crop), (crop, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(images, "report", found, "source")
    sheet.link(edit, "report", edits, "source")
    sheet.link(crop, "originals", build, "regularisation")
    _link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(sweep, 0, train, "sweep")
    sheet.link(train, "lora_name", grid, "lora_name")
    assert network  # beside the sweep, to be linked by whoever wants one network alone
    return sheet.workflow()


# ---- HCP-Diffusion ----

DREAMBOOTH_NOTE = """## DreamBooth, as HCP-Diffusion does it

After its **fine-tuning guide**. Press **Run**: the base draws its own class images, and a LoRA with rates layer by \
layer is trained beside them.

Your own: a folder of pictures below `input`, with `1.txt` beside `1.png`, or with one JSON file of captions, which \
goes into `caption_json` of **Load Image Folder**. **Load Checkpoint** replaces **Load Demo Base**; a folder in the \
diffusers layout becomes a checkpoint with **Convert Checkpoint**.
"""
CLASS_NOTE = """### dataset_class

Pictures of the class in general, drawn by the base itself and captioned without the trigger word, so that it is not \
forgotten. For a dog: prompt and `class_tokens` *dog*. Their `loss_weight` is `prior_loss_weight` of **Build \
Dataset**.
"""
WORDS_NOTE = """### word_names, RatioBucket

The template of HCP: `{pt1}` is the trigger word, `{caption}` the picture's text, `{class}` the folder's words. \
`num_bucket` sorts by ratio into so many buckets, as RatioBucket does; `resolution` squared is its `target_area`.
"""
LAYERS_NOTE = """### 分层训练

**Blocks** has a rate for each pattern of layers, as `lora_unet` of the guide: what no line fits has the node's own \
rate. For SD1.x the guide's rates are 1e-6 and 1e-5 for fine-tuning; ten to a hundred times that for a LoRA. **Network** \
with `algo` *full* trains whole layers, as `layers: ['']` does.

**Text and Embeddings** is bypassed. Switched on (Ctrl+B), it trains the word's own embedding too. Its file lies beside \
the LoRA: move it to `models/embeddings`, and write `embedding:` and its name into prompts.
"""
OUT_NOTE = """### 生成图像, 格式转换

HCP writes `{word:1.2}`, ComfyUI `(word:1.2)`. The LoRA has kohya's names, for ComfyUI and sd-webui; **Convert LoRA** \
writes those of diffusers beside it. **Merge into Checkpoint** makes a checkpoint of a base in `models/checkpoints` \
and the LoRA.
"""


def dreambooth_workflow(info: Info) -> Workflow:
    """Return the workflow of DreamBooth with class images, a template, and rates of layers."""
    sheet = Sheet(info, "2f70b8e3-5d19-4a6c-93f4-c2be1d708f22")
    columns = _Columns(sheet)
    columns.begin()
    columns.note(DREAMBOOTH_NOTE, 400)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("data_source1")

    columns.begin()
    columns.note(CLASS_NOTE, 230)
    positive = columns.add("CLIPTextEncode", 120, {"text": "large red circle"}, title="Class prompt")
    negative = columns.add("CLIPTextEncode", 100, {"text": ""}, title="Negative prompt")
    latent = columns.add("EmptyLatentImage", 120, {"width": 64, "height": 64, "batch_size": 16})
    sampler = columns.add("KSampler", 270, {"seed": 1, "steps": 20, "cfg": 4.0})
    decode = columns.add("VAEDecode", 60)
    classes = columns.add(
        "LoraGraftImagesToDataset", 220, {"name": "class_images", "class_tokens": "large red circle"}
    )
    columns.frame("dataset_class")

    columns.begin()
    columns.note(WORDS_NOTE, 230)
    words = columns.add(
        "LoraGraftEditCaptions",
        330,
        {"operations": f"remove trigger: {TRIGGER}\nword: pt1 = {TRIGGER}\ntemplate: {{pt1}}, {{caption}}"},
    )
    build = columns.add("LoraGraftBuildDataset", 760, {**DATASET, "num_bucket": 5, "prior_loss_weight": 1.0})
    columns.frame("word_names and bucket")

    columns.begin()
    columns.note(LAYERS_NOTE, 400)
    network = columns.add(
        "LoraGraftNetwork", 520, {"algo": "locon", "algo.conv_dim": 8, "algo.conv_alpha": 8.0}
    )
    blocks = columns.add(
        "LoraGraftBlocks",
        660,
        {"network_reg_lrs": "re:.*\\.to_k$=3e-3\nre:.*\\.to_v$=3e-3\nre:.*\\.ff\\.=3e-3\nre:.*resnets=1e-3"},
    )
    text = columns.add(
        "LoraGraftText", 270, {"train_embeddings": f"{TRIGGER}=circle*2"}, mode=BYPASSED
    )
    columns.frame("lora_unet")

    columns.begin(460)
    train = columns.add(
        "LoraGraftTrainLoRA",
        1500,
        {
            **TRAINING,
            "output_name": f"dreambooth_{TRIGGER}",
            "unet_lr": 2e-3,
            "save_every_n_steps": 0,
            "sample_prompts": PROMPT,
            "seed": 114514,
        },
    )
    columns.frame("train")

    columns.begin(620)
    columns.note(OUT_NOTE, 190)
    grid = columns.add(
        "LoraGraftPreviewWithLoRA",
        1100,
        {
            "prompts": f"({TRIGGER}:1.2), large, blue background\n{TRIGGER}, small, green background\n"
            "large red circle, white background",
            "seeds": "11, 12",
            "strengths": "0, 0.5, 1",
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            **DRAWING,
        },
    )
    convert = columns.add(
        "LoraGraftConvertLoRA",
        240,
        {"naming": "diffusers", "output_name": f"dreambooth_{TRIGGER}_diffusers", "overwrite": True},
    )
    columns.frame("Generate and convert")

    sheet.link(images, "dataset", words, "dataset")
    sheet.link(images, "report", found, "source")
    sheet.link(words, "dataset", build, "dataset")
    sheet.link(base, 0, sampler, "model")
    for prompt, name in ((positive, "positive"), (negative, "negative")):
        sheet.link(base, 1, prompt, "clip")
        sheet.link(prompt, 0, sampler, name)
    sheet.link(latent, 0, sampler, "latent_image")
    sheet.link(sampler, 0, decode, "samples")
    sheet.link(base, 2, decode, "vae")
    sheet.link(decode, 0, classes, "images")
    sheet.link(classes, "dataset", build, "regularisation")
    for source, target in ((network, blocks), (blocks, text), (text, train)):
        sheet.link(source, "settings", target, "settings")
    _link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(train, "lora_name", grid, "lora_name")
    sheet.link(train, "lora_name", convert, "lora_name")
    return sheet.workflow()


# ---- dataset craft and training notes ----

STYLE_NOTE = """## A style or several concepts, from the dataset on

After the **LoRA 训练笔记**. Press **Run**: it works on the sample images and the tiny base.

The dataset decides: at least 50 pictures of a character, 100 of a style, 50 of a concept. Your own: a folder below \
`input` with a subfolder for each concept, such as `1_forest` and `1_city`; its name goes into **Load Image Folder**.
"""
CHOICE_NOTE = """### 数据集, 分辨率和长宽比

**Find Duplicates** lists what is there twice. **Crop** cuts what is longer than 2 : 1. For small pictures switch \
**Load Upscale Model** on (Ctrl+M) with a Real-ESRGAN or Real-CUGAN model: they are enlarged, at most twice.
"""
MERGE_NOTE = """### 自动打标, 标签删除, 标签合并

**WD14 Tag** is bypassed. Switched on, several taggers at a low threshold miss little, and equal tags are joined; \
delete what is wrong below.

**Edit Captions**: what shall belong to the trigger word is deleted, and similar tags become one phrase, which keeps \
colours apart. A line that finds nothing says so in the report.
"""
BALANCE_NOTE = """### 平衡训练集, 避免Token冲突

`balance_concepts` raises the repeats of small concepts until all are shown equally often. With CLIP linked, the report \
names trigger words that the base knows already.
"""
STEPS_NOTE = """### 网络结构, 学习率调整策略

LoHa for styles, LoRA or LoCon for characters. The cosine falls in up to four cycles; its warm-up is 5 to 10 % of all \
steps. The curve shows it before a step is trained.

For SD1.x choose *Style* and *LoHa* in the presets on **Train LoRA**: U-Net 1e-4, text encoder half of it, at least \
2500 steps (character 1000, concept 3000). Twice the batch size allows twice the U-Net's rate.
"""


def style_workflow(info: Info) -> Workflow:
    """Return the workflow of balanced concepts, merged tags, and a LoHa on a cosine with restarts."""
    sheet = Sheet(info, "3a15e6c4-8f02-4d7b-b6d9-07e4a92c5f33")
    columns = _Columns(sheet)
    columns.begin()
    columns.note(STYLE_NOTE, 320)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("Images and base")

    columns.begin()
    columns.note(CHOICE_NOTE, 220)
    upscaler = columns.add("UpscaleModelLoader", 70, {"model_name": "RealESRGAN_x2plus.pth"}, mode=MUTED)
    twins = columns.add("LoraGraftFindDuplicates", 380)
    crop = columns.add("LoraGraftCrop", 580, {"mode": "beyond_aspect", "max_aspect": 2.0, "upscale_to": 512})
    columns.frame("Choice and shape")

    columns.begin()
    columns.note(MERGE_NOTE, 300)
    tag = columns.add(
        "LoraGraftWD14Tag",
        400,
        {
            "tagger": "wd-swinv2-tagger-v3",
            "more_taggers": "wd-v1-4-moat-tagger-v2",
            "general_threshold": 0.25,
            "trigger": TRIGGER,
        },
        mode=BYPASSED,
    )
    edit = columns.add(
        "LoraGraftEditCaptions",
        360,
        {
            "operations": f"trigger: {TRIGGER}\ndelete: [hair], [eyes]\nmerge: shirt, skirt, hat\ndrop subtags\n"
            "deduplicate"
        },
    )
    edits = columns.add("PreviewAny", 320, title="What the edits did")
    columns.frame("Captions")

    columns.begin()
    columns.note(BALANCE_NOTE, 190)
    build = columns.add("LoraGraftBuildDataset", 800, {**TAGS, "balance_concepts": True, "kind": "style"})
    report = columns.add("PreviewAny", 460, title="Report")
    columns.frame("Balance")

    columns.begin()
    columns.note(STEPS_NOTE, 370)
    network = columns.add(
        "LoraGraftNetwork", 550, {"algo": "loha", "algo.conv_dim": 4, "algo.conv_alpha": 4.0}
    )
    schedule = columns.add(
        "LoraGraftSchedule",
        480,
        {
            "lr_scheduler": "cosine_with_restarts",
            "lr_scheduler.lr_scheduler_num_cycles": 3,
            "lr_warmup_steps": 0.05,
        },
    )
    columns.frame("Network and schedule")

    columns.begin(460)
    train = columns.add(
        "LoraGraftTrainLoRA",
        1500,
        {
            **TRAINING,
            "output_name": f"style_{TRIGGER}",
            "network_dim": 8,
            "network_alpha": 8.0,
            "sample_prompts": PROMPT,
        },
    )
    columns.frame("Train")

    columns.begin(620)
    grid = columns.add(
        "LoraGraftPreviewWithLoRA",
        1500,
        {
            "prompts": f"{PROMPT}\n{TRIGGER}, small, green background\nlarge red circle, white background",
            "seeds": "11, 12",
            "strengths": "0, 0.5, 1",
            "max_checkpoints": 3,
            **DRAWING,
        },
    )
    columns.frame("Test")

    for source, target in ((images, twins), (twins, crop), (crop, tag), (tag, edit), (edit, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(upscaler, 0, crop, "upscale_model")
    sheet.link(images, "report", found, "source")
    sheet.link(edit, "report", edits, "source")
    sheet.link(base, 1, build, "clip")
    sheet.link(build, "report", report, "source")
    for source, target in ((network, schedule), (schedule, train)):
        sheet.link(source, "settings", target, "settings")
    _link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(train, "lora_name", grid, "lora_name")
    sheet.link(train, "checkpoints", grid, "checkpoints")
    return sheet.workflow()


# ---- the anonymous guide ----

KOHYA_NOTE = """## Train with a command line of kohya's trainer, test, shrink

After the **Гайд по LoRA** of October 2023. Press **Run**: its settings train the sample creature on the tiny base.

Your own: folders such as `1_nekochan` and `6_maid` in one folder below `input`, whose name goes into **Load Image \
Folder**; **Load Checkpoint** in the place of **Load Demo Base**. Images × repeats of 300 to 500 an epoch for a character, \
400 to 600 for a style.

`clip_skip` 2 for anime models: **CLIP Set Last Layer** at -2. For photos remove it, and take 1.
"""
CONFIG_NOTE = """### Параметры тренировки

**Kohya Config** takes a command line of `train_network.py` as it is, or a `config_file`. The notes below say what means \
nothing here, and what stands on another node; what cannot be honoured is refused.

Rates, `--resolution` and `T_0` suit the tiny base. For SD1.x the guide has 1e-4 and 5e-5 (text encoder), 512 to 768, \
and `T_0` as all steps divided by the number of restarts. It advises against `--noise_offset`. On a card of the 30 \
series or later add `--mixed_precision=bf16`.
"""
GRID_NOTE = """### 5 Тест: XYZ grid

Above: saved epochs and weights from 0.7 to 1.5. The best epoch works at 1, and does not break at 1.5.

Below: the last epoch with many seeds and a background that each seed picks, so that one lucky seed decides nothing.
"""
SHRINK_NOTE = """### 6 resize_lora, check_lora_weights

**Resize LoRA** is the guide's command: rank 32, `sv_fro` 0.9, bf16. **Check LoRA** finds zeros: at clip_skip 2 the six \
modules of the text encoder's last layer are untouched, as the guide says. The guide names no number of its own for the \
tiny base, whose layers are fewer.
"""
COMMAND = """accelerate launch --num_cpu_threads_per_process=8 train_network.py
  --pretrained_model_name_or_path="C:/ai/nai.safetensors" --train_data_dir="C:/ai/my-dataset"
  --output_dir="C:/ai/my-lora-dir" --output_name="my_best_lora"
  --logging_dir="C:/ai/my-lora-logs" --log_prefix="my_best_lora_" --caption_extension=.txt
  --network_module=networks.lora --network_dim=64 --network_alpha=32
  --network_args "conv_dim=32" "conv_alpha=16"
  --learning_rate=3e-3 --unet_lr=3e-3 --text_encoder_lr=1e-3
  --optimizer_type=AdamW --optimizer_args "weight_decay=0.01" "betas=0.9,0.999"
  --lr_scheduler_type=cosine_annealing_warmup.CosineAnnealingWarmupRestarts
  --lr_scheduler_args "T_0=80" "gamma_min_lr=0.99915" "decay=1" "down_factor=0.5" "warmup_steps=10"
    "cycle_warmup=5" "init_lr_ground=True"
  --min_snr_gamma=5 --scale_weight_norms=1.0
  --resolution=64 --enable_bucket --min_bucket_reso=32 --max_bucket_reso=128
  --train_batch_size=8 --gradient_accumulation_steps=1
  --max_token_length=225 --shuffle_caption --keep_tokens=1 --clip_skip=2 --seed=42
  --max_train_epochs=24 --save_every_n_epochs=6 --save_last_n_epochs=999
  --save_precision=bf16 --save_model_as=safetensors
  --cache_latents --xformers --persistent_data_loader_workers --max_data_loader_n_workers=2
"""
NAME = "my_best_lora"


def kohya_workflow(info: Info) -> Workflow:
    """Return the workflow of a pasted command line, two grids, a smaller file and its check."""
    sheet = Sheet(info, "4b82c1f9-6e3d-4058-a7f1-d90c5e2b8a44")
    columns = _Columns(sheet)
    columns.begin()
    columns.note(KOHYA_NOTE, 430)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    clip = columns.add("CLIPSetLastLayer", 70, {"stop_at_clip_layer": -2})
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    build = columns.add("LoraGraftBuildDataset", 800, {**TAGS, "kind": "character"})
    columns.frame("Подготовка датасета")

    columns.begin(560)
    columns.note(CONFIG_NOTE, 330)
    config = columns.add("LoraGraftKohyaConfig", 620, {"config": COMMAND})
    notes = columns.add("PreviewAny", 460, title="What the config says to other nodes")
    columns.frame("Параметры тренировки")

    columns.begin(460)
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
    columns.frame("Тренировка")

    columns.begin(620)
    columns.note(GRID_NOTE, 170)
    weights = columns.add(
        "LoraGraftPreviewWithLoRA",
        1000,
        {"prompts": PROMPT, "seeds": "11", "strengths": "0.7-1.5 [5]", **DRAWING},
        title="Epochs and weights",
    )
    columns.frame("5  Epochs and weights")

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
    columns.frame("5  Seeds and backgrounds")

    columns.begin()
    columns.note(SHRINK_NOTE, 280)
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
    columns.frame("6  Shrink and check")

    sheet.link(images, "dataset", build, "dataset")
    sheet.link(base, 1, clip, "clip")
    sheet.link(config, "notes", notes, "source")
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


def _link_base(sheet: Sheet, base: int, *targets: int) -> None:
    for target in targets:
        for slot, name in enumerate(("model", "clip", "vae")):
            sheet.link(base, slot, target, name)


GUIDES = {
    PHOTOS_NAME: photos_workflow,
    CHARACTER_NAME: character_workflow,
    DREAMBOOTH_NAME: dreambooth_workflow,
    STYLE_NAME: style_workflow,
    KOHYA_NAME: kohya_workflow,
}
