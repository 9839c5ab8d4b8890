"""Write the example workflows from what they are about; those that follow a guide are in ``guides``.

UI-format workflows keep widget values by position. So they are not written by hand: after a change,
``LORAGRAFT_WRITE_WORKFLOWS=1 pytest tests/comfyui/test_workflows.py -k up_to_date`` writes them anew.
"""

from __future__ import annotations

from typing import Any

from loragraft.trainer.demo import run as demo_run
from loragraft.trainer.demo.creatures import HERO_SEED, creature
from loragraft_tests.comfyui.sheet import BYPASSED, Info, Sheet, Workflow

DEMO_NAME = "LoraGraft Demo"
SD15_NAME = "LoraGraft SD1.5"
DATASET_NAME = "LoraGraft Dataset"
SWEEP_NAME = "LoraGraft Sweep"

DEMO_NOTE = """## From images to a LoRA in one graph

Press **Run**. The tiny base model and {images} come with LoraGraft: nothing is downloaded.

1. **Load Image Folder** reads the images and their captions. Put your own folder into ComfyUI's \
`input` folder and write its name instead of `[demo]`.
2. **Build Dataset** sorts them into buckets. Its report shows what is cropped before anything is \
trained.
3. **Train LoRA** trains and shows the loss. **Cancel keeps the work**; run again to continue. A \
finished run is returned at once.
4. **Preview with LoRA** draws the same prompts and seeds without the LoRA and with it.

The trigger word is `{trigger}`. The file goes to `models/loras`, everything else to \
`output/loragraft`.
"""
SD15_NOTE = """## Train a LoRA for Stable Diffusion 1.x

1. Choose an SD1.x checkpoint in **Load Checkpoint** (fp16, bf16 or fp32).
2. Put 15 to 50 images with caption files (`name.txt` beside `name.png`) into a folder below \
ComfyUI's `input` folder, named like `10_mycat`: 10 repeats, concept *mycat*. Write the folder's \
name into **Load Image Folder**.
3. Change `output_name` and the prompts, and press **Run**.

Cancel keeps the work, and running again continues. In **Preview with LoRA** look for the strength \
and step at which the subject is right and a prompt without the trigger word is still free of it.
"""


SWEEP_NOTE = """## Which settings? Try several at once

Press **Run**: four LoRAs are trained side by side on one base model, and one grid compares them.

1. **Sweep** lists the values to try, one setting of Train LoRA per line. Each is tried with every value \
of the other lines; settings joined by `/` change together.
2. **Train LoRA** draws a line for each run. **Cancel keeps the work** of all; run again to continue.
3. **Preview with LoRA** gets the names of all four files, and draws a row for each.

Unlink **Sweep** to train one LoRA with the settings of the node.
"""


DATASET_NOTE = """## From raw files to a training set

Press **Run**: it works on the sample images. Nothing is written but a preview; your files are never changed.

1. **Load Image Folder**: write your own folder below ComfyUI's `input` instead of `[demo]`. For a video put \
**Frame Extract** in its place.
2. **Find Duplicates** lists what is there twice; set `action` to `skip` to leave it out.
3. **Crop** shows what would be cut off, hatched. `keep` leaves it to the buckets.
4. **WD14 Tag** is bypassed here. Get a model with **Download Tagger**, then switch it on (Ctrl+B).
5. **Edit Captions** changes captions line by line; its report tells what each line did.
6. **Build Dataset** reports everything before a step is trained. Connect `train_set` to **Train LoRA**.
"""


def dataset_workflow(info: Info) -> Workflow:
    """Return the workflow of the dataset steps, on the embedded images."""
    sheet = _sheet(info, "8d7b0b52-41f5-4d8c-8d2e-3c1b5a6e9f04", DATASET_NOTE)
    images = sheet.add("LoraGraftLoadImageFolder", (40, 560), (300, 300), {"path": "[demo]"})
    found = sheet.add("PreviewAny", (40, 930), (300, 230))
    twins = sheet.add("LoraGraftFindDuplicates", (400, 40), (340, 400))
    crop = sheet.add("LoraGraftCrop", (400, 520), (340, 640), {"mode": "square", "width": 64, "height": 64})
    tag = sheet.add("LoraGraftWD14Tag", (800, 40), (340, 400), mode=BYPASSED)
    edit = sheet.add(
        "LoraGraftEditCaptions", (800, 510), (340, 310), {"operations": "trigger: zogi\ndeduplicate"}
    )
    edits = sheet.add("PreviewAny", (800, 890), (340, 270))
    build = sheet.add(
        "LoraGraftBuildDataset",
        (1200, 40),
        (460, 620),
        {**demo_run.DATASET, "kind": "character"},
    )
    report = sheet.add("PreviewAny", (1200, 720), (460, 440))
    for source, target in ((images, twins), (twins, crop), (crop, tag), (tag, edit), (edit, build)):
        sheet.link(source, 0, target, "dataset")
    sheet.link(images, 1, found, "source")
    sheet.link(edit, 3, edits, "source")
    sheet.link(build, 1, report, "source")
    sheet.group("1  Read and tidy", (20, -30, 740, 1210))
    sheet.group("2  Captions", (780, -30, 380, 1210))
    sheet.group("3  Training set", (1180, -30, 500, 1210))
    return sheet.workflow()


def demo_workflow(info: Info) -> Workflow:
    """Return the demo workflow: embedded base, embedded images, the settings of the headless demo."""
    name = creature(HERO_SEED).name
    train = {
        **demo_run.TRAINING,
        "output_name": f"demo_{name}",
        "sample_prompts": f"{name}, large, blue background",
    }
    preview = {
        "prompts": f"{name}, large, blue background\n{name}, large, yellow background\n"
        "large red circle, white background",
        "seeds": "11, 12",
        "strengths": "0, 0.75, 1",
        "steps": demo_run.DRAWING.steps,
        "cfg": demo_run.DRAWING.cfg,
        "width": demo_run.DRAWING.size[1],
        "height": demo_run.DRAWING.size[0],
    }
    note = DEMO_NOTE.format(images="the sample images", trigger=name)
    sheet = _sheet(info, "5f3a7c1e-0d2b-4c57-9e61-7a1f0c2d9b10", note)
    base = sheet.add("LoraGraftLoadDemoBase", (40, 500), (300, 90))
    _rest(sheet, base, {"path": "[demo]"}, demo_run.DATASET, train, preview)
    return sheet.workflow()


def sweep_workflow(info: Info) -> Workflow:
    """Return the workflow of a sweep: the demo's base and images, four short runs, one grid."""
    name = creature(HERO_SEED).name
    train = {
        **demo_run.TRAINING,
        "output_name": f"sweep_{name}",
        "max_train_steps": 100,
        "save_every_n_steps": 0,
        "sample_prompts": f"{name}, large, blue background",
        "preview_image": False,
    }
    preview = {
        "prompts": f"{name}, large, blue background\n{name}, large, yellow background\n"
        "large red circle, white background",
        "seeds": "11",
        "strengths": "0, 1",
        "steps": demo_run.DRAWING.steps,
        "cfg": demo_run.DRAWING.cfg,
        "width": demo_run.DRAWING.size[1],
        "height": demo_run.DRAWING.size[0],
    }
    sheet = _sheet(info, "b1f3d1f0-7a39-4c0e-9c55-64b7f2a9e4d3", SWEEP_NOTE)
    base = sheet.add("LoraGraftLoadDemoBase", (40, 500), (300, 90))
    values = {"sweep": "learning_rate: 3e-4, 3e-3\nnetwork_dim: 4, 32 / network_alpha: 4, 32"}
    sweep = sheet.add("LoraGraftSweep", (400, 1690), (440, 130), values)
    training = _rest(sheet, base, {"path": "[demo]"}, demo_run.DATASET, train, preview, checkpoints=False)
    sheet.link(sweep, 0, training, "sweep")
    return sheet.workflow()


def sd15_workflow(info: Info) -> Workflow:
    """Return the workflow for any SD1.x checkpoint, with settings that suit a character."""
    train = {
        "output_name": "mycat",
        "network_dim": 32,
        "network_alpha": 16.0,
        "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.05,
        "max_train_steps": 1600,
        "min_snr_gamma": 5.0,
        "save_every_n_steps": 400,
        "sample_prompts": "photo of mycat on a sofa",
    }
    preview = {
        "prompts": "photo of mycat on a sofa\nphoto of mycat in the snow\nphoto of a dog on a sofa",
        "negative": "lowres, blurry",
        "seeds": "1, 2",
        "strengths": "0, 0.6-1 [3]",
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
    }
    sheet = _sheet(info, "c0b1d6f2-6a34-49b8-8b7f-2d94e1a70f55", SD15_NOTE)
    base = sheet.add(
        "CheckpointLoaderSimple", (40, 500), (300, 110), {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"}
    )
    sheet.nodes[-1]["properties"]["models"] = [
        {
            "name": "v1-5-pruned-emaonly-fp16.safetensors",
            "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
            "directory": "checkpoints",
        }
    ]
    _rest(sheet, base, {"path": "mycat"}, {"shuffle_caption": True, "keep_tokens": 1}, train, preview)
    return sheet.workflow()


def _sheet(info: Info, uuid: str, note: str) -> Sheet:
    """Return a sheet with a note in its upper left corner."""
    sheet = Sheet(info, uuid)
    sheet.note(note, (40, 40), (300, 320))
    return sheet


def _rest(
    sheet: Sheet,
    base: int,
    folder: dict[str, Any],
    build: dict[str, Any],
    train: dict[str, Any],
    preview: dict[str, Any],
    *,
    checkpoints: bool = True,
) -> int:
    """Add all behind the base, down to the grid; return Train LoRA."""
    images = sheet.add("LoraGraftLoadImageFolder", (40, 680), (300, 300), folder)
    dataset = sheet.add("LoraGraftBuildDataset", (40, 1040), (300, 540), build)
    report = sheet.add("PreviewAny", (40, 1640), (300, 180))
    training = sheet.add("LoraGraftTrainLoRA", (400, 40), (440, 1580), train)
    grid = sheet.add("LoraGraftPreviewWithLoRA", (900, 40), (560, 1160), preview)
    sheet.link(images, 0, dataset, "dataset")
    sheet.link(dataset, 1, report, "source")
    for slot, name in enumerate(("model", "clip", "vae")):
        sheet.link(base, slot, training, name)
        sheet.link(base, slot, grid, name)
    sheet.link(dataset, 0, training, "train_set")
    sheet.link(training, 4, grid, "lora_name")
    if checkpoints:
        sheet.link(training, 6, grid, "checkpoints")
    sheet.group("1  Base and images", (20, 440, 340, 1400))
    sheet.group("2  Train", (380, -30, 480, 1870))
    sheet.group("3  Test", (880, -30, 600, 1870))
    return training
