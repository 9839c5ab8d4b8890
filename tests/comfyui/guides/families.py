"""One workflow a family that people train: how its model is loaded, and settings that are sensible for it.

Nothing of it is embedded: the model and the images are the reader's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loragraft_tests.comfyui.guides.columns import Columns
from loragraft_tests.comfyui.sheet import Info, Sheet, Workflow

HUGGING_FACE = "https://huggingface.co/"
Slots = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # node and output of MODEL, CLIP and VAE


@dataclass(frozen=True)
class Loader:
    """A loader node: its widgets, and where its files come from, (name, address, folder below models)."""

    kind: str
    values: Mapping[str, str]
    files: Sequence[tuple[str, str, str]] = ()
    height: int = 110


@dataclass(frozen=True)
class Example:
    """What a family's workflow is made of; ``slots`` say which loader's output is MODEL, CLIP and VAE."""

    uuid: str
    about: str
    settings: str
    test: str
    loaders: Sequence[Loader]
    slots: Slots
    folder: Mapping[str, Any]
    build: Mapping[str, Any]
    train: Mapping[str, Any]
    preview: Mapping[str, Any]
    nodes: Sequence[tuple[str, int, Mapping[str, Any]]] = field(default=())  # settings, linked in a row
    guide: bool = False  # whether the notes follow one


def checkpoint(name: str, address: str = "") -> Loader:
    """Return Load Checkpoint; without an address it is up to the reader to find the file."""
    files = [(name, address, "checkpoints")] if address else []
    return Loader("CheckpointLoaderSimple", {"ckpt_name": name}, files)


def workflow(example: Example, info: Info) -> Workflow:
    """Return an example as a workflow: base, dataset, training, test."""
    sheet = Sheet(info, example.uuid)
    columns = Columns(sheet)
    columns.begin(420)
    columns.note(example.about, 340)
    loaders = []
    for loader in example.loaders:
        loaders.append(columns.add(loader.kind, loader.height, loader.values))
        models = [
            {"name": n, "url": HUGGING_FACE + url, "directory": where} for n, url, where in loader.files
        ]
        if models:
            sheet.nodes[-1]["properties"]["models"] = models
    columns.frame("1  Base")

    columns.begin()
    images = columns.add("LoraGraftLoadImageFolder", 300, example.folder)
    build = columns.add("LoraGraftBuildDataset", 800, example.build)
    report = columns.add("PreviewAny", 260)
    columns.frame("2  Dataset")

    columns.begin(480)
    columns.note(example.settings, 330, "From the guide" if example.guide else "Settings")
    settings = [columns.add(kind, height, values) for kind, height, values in example.nodes]
    columns.frame("3  Settings")

    columns.begin(460)
    train = columns.add("LoraGraftTrainLoRA", 1500, example.train)
    columns.frame("4  Train")

    columns.begin(620)
    columns.note(example.test, 150, "From the guide" if example.guide else "Test")
    grid = columns.add("LoraGraftPreviewWithLoRA", 1180, example.preview)
    columns.frame("5  Test")

    sheet.link(images, "dataset", build, "dataset")
    sheet.link(build, 1, report, "source")
    sheet.link(build, "train_set", train, "train_set")
    for target in (train, grid):
        for name, (loader, slot) in zip(("model", "clip", "vae"), example.slots, strict=True):
            sheet.link(loaders[loader], slot, target, name)
    for before, after in zip(settings, [*settings[1:], train], strict=False):
        sheet.link(before, 0, after, "settings")
    sheet.link(train, "lora_name", grid, "lora_name")
    sheet.link(train, "checkpoints", grid, "checkpoints")
    return sheet.workflow()


IMAGES = """Put 15 to 50 images with captions (`name.txt` beside `name.png`) into a folder below ComfyUI's \
`input`, named like `10_mycat`: 10 repeats, concept *mycat*. Write its name into **Load Image Folder**."""
SUBJECT = {"path": "mycat"}
TAGS = {"shuffle_caption": True, "keep_tokens": 1}
PROMPTS = "photo of mycat on a sofa\nphoto of mycat in the snow\nphoto of a dog on a sofa"
ONE_CHECKPOINT: Slots = ((0, 0), (0, 1), (0, 2))

SD2 = Example(
    uuid="7f0c36f4-5e3e-4f3a-9d0a-2b1c8e4a6d11",
    about=f"""## Train a LoRA for Stable Diffusion 2.x

1. Choose an SD2.0 or SD2.1 checkpoint in **Load Checkpoint**.
2. {IMAGES}
3. Change `output_name` and the prompts, and press **Run**.

Cancel keeps the work, and running again continues. In **Preview with LoRA** look for the strength and step \
at which the subject is right and a prompt without the trigger word is still free of it.
""",
    settings="""### Settings for SD2.x

- Checkpoints for **768** pixels predict velocity: `v_parameterization` is on here, in **Loss and Noise**. \
Those for 512 (*base*) predict noise: switch it off, and set `resolution` to 512. If it does not fit the \
model, Train LoRA says so before anything is trained.
- `clip_skip` stays at 1: captions are read at the last layer but one, as SD2.x learnt it.
- Rates are those of SD1.x. Rank 16 is enough for a subject.
""",
    test="""### Test

The native nodes draw the same: Load LoRA between the checkpoint and the sampler, without other changes.
""",
    loaders=[checkpoint("v2-1_768-ema-pruned.safetensors")],
    slots=ONE_CHECKPOINT,
    folder=SUBJECT,
    build={**TAGS, "resolution": 768},
    train={
        "output_name": "mycat_sd2",
        "network_dim": 16,
        "network_alpha": 8.0,
        "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.05,
        "max_train_steps": 1600,
        "mixed_precision": "fp16",
        "save_every_n_steps": 400,
        "sample_prompts": "photo of mycat on a sofa",
    },
    nodes=[("LoraGraftLoss", 920, {"v_parameterization": True})],
    preview={
        "prompts": PROMPTS,
        "negative": "lowres, blurry",
        "seeds": "1, 2",
        "strengths": "0, 0.6-1 [3]",
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "width": 768,
        "height": 768,
    },
)
SDXL = Example(
    uuid="2c9f5b0e-93a7-4a41-8a57-0f6d4e1b7c22",
    about=f"""## Train a LoRA for SDXL, Pony, Illustrious

1. Choose an SDXL checkpoint in **Load Checkpoint**: the base, or a finetune such as Pony or Illustrious.
2. {IMAGES}
3. Change `output_name` and the prompts, and press **Run**.

Cancel keeps the work, and running again continues. In **Preview with LoRA** look for the strength and step \
at which the subject is right and a prompt without the trigger word is still free of it.
""",
    settings="""### Settings for SDXL

- `resolution` 1024. Original size, crop and target of each image go into the model as it learnt them.
- Only the denoiser is trained: `text_encoder_lr` 0. For a new word give the text encoders a third of the \
rate.
- `gradient_checkpointing` fits a card of 12 GB; without it training is faster.
- Models that predict velocity (NoobAI v-pred): add **Loss and Noise** with `v_parameterization`, and \
`zero_terminal_snr` where the model has it. Train LoRA names what does not fit.
- `clip_skip` has no effect: both encoders are read at the last layer but one.
""",
    test="""### Test

1024 pixels or one of SDXL's other shapes, cfg 5 to 7. For Pony add its quality words to prompt and captions.
""",
    loaders=[
        checkpoint(
            "sd_xl_base_1.0.safetensors",
            "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
        )
    ],
    slots=ONE_CHECKPOINT,
    folder=SUBJECT,
    build={**TAGS, "resolution": 1024, "min_bucket_reso": 512, "max_bucket_reso": 2048},
    train={
        "output_name": "mycat_sdxl",
        "network_dim": 32,
        "network_alpha": 16.0,
        "unet_lr": 1e-4,
        "text_encoder_lr": 0.0,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.05,
        "max_train_steps": 2000,
        "min_snr_gamma": 5.0,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "save_every_n_steps": 500,
        "sample_prompts": "photo of mycat on a sofa",
    },
    preview={
        "prompts": PROMPTS,
        "negative": "lowres, blurry",
        "seeds": "1, 2",
        "strengths": "0, 0.6-1 [3]",
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "steps": 25,
        "cfg": 6.0,
        "width": 1024,
        "height": 1024,
    },
)
SD35_FILES = "Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders/"
SD35 = Example(
    uuid="9a4e1d7c-6b0f-4c8e-b3a5-71f2d9c05e33",
    about=f"""## Train a LoRA for Stable Diffusion 3.5

1. Choose SD3.5 medium or large in **Load Checkpoint**, and its three text encoders in **TripleCLIPLoader**. \
Without T5 take DualCLIPLoader, type `sd3`.
2. {IMAGES} Whole sentences suit this model.
3. Change `output_name` and the prompts, and press **Run**.

Cancel keeps the work, and running again continues. In **Preview with LoRA** look for the strength and step \
at which the subject is right and a prompt without the trigger word is still free of it.
""",
    settings="""### Settings for SD3.5

- SD3.5 is a flow: it predicts the way from noise to image. How noise levels are drawn is set in **Loss and \
Noise**: `logit_normal`, the middle most, is what its authors trained it with.
- Only the denoiser is trained: `text_encoder_lr` 0. T5's text is computed once and kept.
- Its modules learn more slowly than SDXL's: 1e-4 to 2e-4 with rank 16 to 32.
- `gradient_checkpointing` and bf16 fit medium on a card of 12 GB; fp8 files are read too.
""",
    test="""### Test

cfg 4 to 5, 28 to 40 steps, scheduler `sgm_uniform`. A ModelSamplingSD3 node may stand before the sampler: \
it only moves the steps.
""",
    loaders=[
        checkpoint(
            "sd3.5_medium.safetensors",
            "stabilityai/stable-diffusion-3.5-medium/resolve/main/sd3.5_medium.safetensors",
        ),
        Loader(
            "TripleCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "clip_g.safetensors",
                "clip_name3": "t5xxl_fp16.safetensors",
            },
            [
                (name, SD35_FILES + name, "text_encoders")
                for name in ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
            ],
            150,
        ),
    ],
    slots=((0, 0), (1, 0), (0, 2)),
    folder=SUBJECT,
    build={"resolution": 1024, "min_bucket_reso": 512, "max_bucket_reso": 1536},
    train={
        "output_name": "mycat_sd35",
        "network_dim": 16,
        "network_alpha": 16.0,
        "unet_lr": 1e-4,
        "text_encoder_lr": 0.0,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 0.05,
        "max_train_steps": 2000,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "save_every_n_steps": 500,
        "sample_prompts": "photo of mycat on a sofa",
    },
    nodes=[("LoraGraftLoss", 920, {"timestep_sampling": "logit_normal"})],
    preview={
        "prompts": PROMPTS,
        "negative": "lowres, blurry",
        "seeds": "1, 2",
        "strengths": "0, 0.6-1 [3]",
        "sampler_name": "euler",
        "scheduler": "sgm_uniform",
        "steps": 30,
        "cfg": 4.5,
        "width": 1024,
        "height": 1024,
    },
)


def built(example: Example) -> Callable[[Info], Workflow]:
    """Return the function that makes an example's workflow."""
    return lambda info: workflow(example, info)


sd2_workflow = built(SD2)
sdxl_workflow = built(SDXL)
sd35_workflow = built(SD35)
