"""Balanced concepts, merged tags, and a LoHa on a cosine with restarts, after the training notes."""

from __future__ import annotations

from loragraft_tests.comfyui.guides.columns import (
    DRAWING,
    PROMPT,
    TAGS,
    TRAINING,
    TRIGGER,
    Columns,
    link_base,
)
from loragraft_tests.comfyui.sheet import BYPASSED, MUTED, Info, Sheet, Workflow

INTRO = """## A style or several concepts, from the dataset on

After the training notes **Lora 训练笔记**. Press **Run**: it works on the sample images and the tiny \
base.

The dataset decides: at least 50 pictures of a character, 100 of a style, 50 of a concept. Your own: a \
folder below `input` with a subfolder for each concept, such as `1_forest` and `1_city`; its name goes \
into **Load Image Folder**.
"""
SHAPE = """### 数据集, 分辨率和长宽比

**Find Duplicates** lists what is there twice. **Crop** cuts what is longer than 2 : 1. For small \
pictures switch **Load Upscale Model** on (Ctrl+M) with a Real-ESRGAN or Real-CUGAN model: they are \
enlarged, at most twice.
"""
MERGE = """### 自动打标, 标签删除, 标签合并

**WD14 Tag** is bypassed. Switched on (Ctrl+B), several taggers at a low threshold miss little, and \
equal tags are joined; what is wrong is deleted below.

**Edit Captions**: what shall belong to the trigger word is deleted, and similar tags become one phrase, \
which keeps colours apart. A line that finds nothing says so in the report.
"""
BALANCE = """### 平衡训练集, 避免Token冲突

`balance_concepts` raises the repeats of small concepts until all are shown equally often. With CLIP \
linked, the report names trigger words that the base knows already.
"""
STEPS = """### 网络结构, 学习率调整策略

LoHa for styles, LoRA or LoCon for characters. The cosine falls at most four times; its warm-up is 5 to \
10 % of all steps. The curve shows it before a step is trained.

For SD1.x choose *Style* and *LoHa* in the presets on **Train LoRA**, and take as rank, rates and steps \
what they fill in: 1e-4 for a plain LoRA's U-Net, half of it for the text encoder, at least 2500 steps \
(character 1000, concept 3000). Twice the batch size allows twice the U-Net's rate.
"""


def style_workflow(info: Info) -> Workflow:
    """Return the workflow of balanced concepts, merged tags, and a LoHa on a cosine with restarts."""
    sheet = Sheet(info, "3a15e6c4-8f02-4d7b-b6d9-07e4a92c5f33")
    columns = Columns(sheet)
    columns.begin()
    columns.note(INTRO, 230)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("1  Images")

    columns.begin()
    columns.note(SHAPE, 160)
    upscaler = columns.add("UpscaleModelLoader", 70, {"model_name": "RealESRGAN_x2plus.pth"}, mode=MUTED)
    twins = columns.add("LoraGraftFindDuplicates", 380)
    crop = columns.add("LoraGraftCrop", 580, {"mode": "beyond_aspect", "max_aspect": 2.0, "upscale_to": 512})
    columns.frame("2  Choice and shape")

    columns.begin()
    columns.note(MERGE, 220)
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
            "operations": f"trigger: {TRIGGER}\ndelete: [hair], [eyes]\nmerge: shirt, skirt, hat\n"
            "drop subtags\ndeduplicate"
        },
    )
    edits = columns.add("PreviewAny", 320, title="What the edits did")
    columns.frame("3  Captions")

    columns.begin()
    columns.note(BALANCE, 140)
    build = columns.add("LoraGraftBuildDataset", 800, {**TAGS, "balance_concepts": True, "kind": "style"})
    report = columns.add("PreviewAny", 460, title="Report")
    columns.frame("4  Balance")

    columns.begin()
    columns.note(STEPS, 270)
    network = columns.add(
        "LoraGraftNetwork", 620, {"algo": "loha", "algo.conv_dim": 4, "algo.conv_alpha": 4.0}
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
    columns.frame("5  Network and schedule")

    columns.begin(460)
    base = columns.add("LoraGraftLoadDemoBase", 100)
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
    columns.frame("6  Base and training")

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
    columns.frame("7  Test")

    for source, target in ((images, twins), (twins, crop), (crop, tag), (tag, edit), (edit, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(upscaler, 0, crop, "upscale_model")
    sheet.link(images, "report", found, "source")
    sheet.link(edit, "report", edits, "source")
    sheet.link(base, 1, build, "clip")
    sheet.link(build, "report", report, "source")
    for source, target in ((network, schedule), (schedule, train)):
        sheet.link(source, "settings", target, "settings")
    link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(train, "lora_name", grid, "lora_name")
    sheet.link(train, "checkpoints", grid, "checkpoints")
    return sheet.workflow()
