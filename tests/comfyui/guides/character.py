"""A character with pruned tags and regularisation, as three kinds of network, after lora-scripts-windows."""

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
from loragraft_tests.comfyui.sheet import BYPASSED, Info, Sheet, Workflow

INTRO = """## A character, as LoRA, LoCon and LoHa

After the guide of **lora-scripts-windows**. Press **Run**: three LoRAs of the sample creature are \
trained on the tiny base, and one grid compares them.

Your own: a folder below `input` with subfolders `Repeats_Concept`, such as `6_miku 1girl`. Write the \
name of the folder **around** them into **Load Image Folder**, and put **Load Checkpoint** in the place \
of **Load Demo Base**. Epochs × repeats of 50 to 100 are usual.
"""
TAGGING = """### Tagger, 關於刪Tag

**WD14 Tag** is bypassed, because the samples have captions. Get the guide's wd14-swinv2-v2 with \
**Download Tagger**, then switch it on (Ctrl+B).

**Edit Captions** prunes hair, eyes and body: they are learned into the trigger word. For the guide's \
other ways (打全標, a white list, 不打標) choose another `preset`.
"""
REGULARISATION = """### reg_data_dir

The guide's way without cutting anything out: the cropped subject is trained, the whole picture is its \
regularisation image, named by its class alone (`reg_caption`). `prior_loss_weight` is 0.3.

With few pictures the guide trains without: unlink `regularisation`.
"""
LYCORIS = """### 關於LyCoris

The guide's table: `network_dim` 32 with `conv_dim` 4, for LoHa their square roots. LoCon and LoHa learn \
with 8e-5 and 5e-5 where LoRA takes 1e-4, and need 1.44 and 2 times as long. The rates here suit the \
tiny base: for SD1.x write those of the guide, or take a preset on **Train LoRA**.

To train one of them alone, unlink **Sweep**, and link **Network** to `settings`.
"""
JUDGE = """### 出圖測試

A good LoRA works at weight 1, and leaves prompts without its trigger word alone. Overfitting shows on \
hands first, then on the body, then on the background.
"""


def character_workflow(info: Info) -> Workflow:
    """Return the workflow of a character with pruned tags and regularisation, and three kinds of network."""
    sheet = Sheet(info, "1c9d4a58-37e2-4f16-a0cb-8f25d06b7e11")
    columns = Columns(sheet)
    columns.begin()
    columns.note(INTRO, 290)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("1  Images")

    columns.begin()
    columns.note(TAGGING, 230)
    tag = columns.add(
        "LoraGraftWD14Tag", 400, {"tagger": "wd-v1-4-swinv2-tagger-v2", "trigger": TRIGGER}, mode=BYPASSED
    )
    edit = columns.add(
        "LoraGraftEditCaptions",
        310,
        {"preset": "prune features", "trigger": TRIGGER, "operations": "deduplicate"},
    )
    edits = columns.add("PreviewAny", 300, title="What the edits did")
    columns.frame("2  Tags")

    columns.begin()
    columns.note(REGULARISATION, 200)
    crop = columns.add("LoraGraftCrop", 560, {"mode": "square", "reg_caption": "creature"})
    build = columns.add("LoraGraftBuildDataset", 760, {**TAGS, "prior_loss_weight": 0.3, "kind": "character"})
    columns.frame("3  Regularisation")

    columns.begin(460)
    columns.note(LYCORIS, 220)
    sweep = columns.add(
        "LoraGraftSweep",
        200,
        {
            "sweep": "algo: lora, locon, loha / network_dim: 32, 32, 6 / network_alpha: 16, 16, 3 / "
            "conv_dim: none, 4, 2 / conv_alpha: none, 2, 1 / learning_rate: 3e-3, 2.4e-3, 1.5e-3 / "
            "text_encoder_lr: 1e-3, 8e-4, 5e-4"
        },
    )
    columns.add("LoraGraftNetwork", 600, {"algo": "locon", "algo.conv_dim": 4, "algo.conv_alpha": 2.0})
    columns.frame("4  Network")

    columns.begin(460)
    base = columns.add("LoraGraftLoadDemoBase", 100)
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
    columns.frame("5  Base and training")

    columns.begin(620)
    columns.note(JUDGE, 110)
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
    columns.frame("6  Test")

    for source, target in ((images, tag), (tag, edit), (edit, crop), (crop, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(images, "report", found, "source")
    sheet.link(edit, "report", edits, "source")
    sheet.link(crop, "originals", build, "regularisation")
    link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(sweep, 0, train, "sweep")
    sheet.link(train, "lora_name", grid, "lora_name")
    return sheet.workflow()
