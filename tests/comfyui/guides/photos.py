"""From photos and videos to kohya's dataset.toml, after a walkthrough of sd-scripts with Flux."""

from __future__ import annotations

from loragraft_tests.comfyui.guides.columns import DATASET, TRIGGER, Columns
from loragraft_tests.comfyui.sheet import MUTED, Info, Sheet, Workflow

INTRO = """## Photos and videos to a dataset for kohya's trainer

After the walkthrough of **sd-scripts with Flux** (爬取数据, 洗数据, dataset.toml). Press **Run**: it \
works on the sample images. Originals are never changed; what is written lies in `output/loragraft`.

Put your downloads into a folder below ComfyUI's `input` and write its name into **Load Image Folder**.

**Videos**: put them into a folder below `input`, switch **Frame Extract** on (Ctrl+M), write the \
folder's name into `path`, and link its `dataset` to **Convert Images** instead. It takes every 30th \
frame, without blurred and equal ones.
"""
CLEAN = """### 1.2 洗数据

**Convert Images** is `1_rename.py` and `2_conver_format.py`: numbered names, all JPEG, from any format, \
AVIF and HEIC too.

**Crop** is `5_crop.py`: cut to one shape, never stretched. Look at what is hatched. With buckets it is \
not needed: set `mode` to `keep`.
"""
TOML = """### 2 准备dataset.toml文件

`class_tokens` of the guide is the trigger word, here that of the samples: every picture gets it and \
nothing else. `resolution` squared is the area of the buckets, 512 for SD1.x and Flux; `num_repeats` \
stays 1.

**Export Dataset** writes pictures, captions and `dataset.toml`, for `--dataset_config` of the guide's \
script. To train an SD1.x LoRA here, link `train_set` to **Train LoRA** as well.
"""


def photos_workflow(info: Info) -> Workflow:
    """Return the workflow from a folder of photos and videos to kohya's dataset.toml."""
    sheet = Sheet(info, "0e6b2f7d-9a41-4c35-8b0e-51d7c3a4f600")
    columns = Columns(sheet)
    columns.begin()
    columns.note(INTRO, 330)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    columns.add(
        "LoraGraftFrameExtract",
        600,
        {"path": "videos", "mode": "every_n_frames", "every_n_frames": 30, "image_format": "jpg"},
        mode=MUTED,
    )
    columns.frame("1  Collect")

    columns.begin()
    columns.note(CLEAN, 190)
    convert = columns.add(
        "LoraGraftConvertImages", 250, {"format": "jpeg", "names": "number", "prefix": "photo_"}
    )
    twins = columns.add("LoraGraftFindDuplicates", 380, {"action": "skip"})
    crop = columns.add("LoraGraftCrop", 600, {"mode": "fixed", "width": 64, "height": 64})
    columns.frame("2  Clean")

    columns.begin()
    columns.note(TOML, 220)
    words = columns.add("LoraGraftEditCaptions", 300, {"preset": "trigger only", "trigger": TRIGGER})
    build = columns.add("LoraGraftBuildDataset", 820, DATASET)
    columns.frame("3  Captions and buckets")

    columns.begin(460)
    report = columns.add("PreviewAny", 560, title="Report")
    export = columns.add("LoraGraftExportDataset", 230, {"name": "my_photos", "format": "jpeg"})
    written = columns.add("PreviewAny", 300, title="What was written")
    columns.frame("4  dataset.toml")

    for source, target in ((images, convert), (convert, twins), (twins, crop), (crop, words), (words, build)):
        sheet.link(source, "dataset", target, "dataset")
    sheet.link(build, "report", report, "source")
    sheet.link(build, "train_set", export, "train_set")
    sheet.link(export, "report", written, "source")
    return sheet.workflow()
