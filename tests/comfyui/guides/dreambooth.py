"""DreamBooth with class images, a template and rates of layers, after HCP-Diffusion's guide."""

from __future__ import annotations

from loragraft_tests.comfyui.guides.columns import (
    DATASET,
    DRAWING,
    PROMPT,
    TRAINING,
    TRIGGER,
    Columns,
    link_base,
)
from loragraft_tests.comfyui.sheet import BYPASSED, Info, Sheet, Workflow

INTRO = """## DreamBooth, as HCP-Diffusion does it

After its **guide to fine-tuning** (模型微调训练指南). Press **Run**: the base draws its own class \
images, and a LoRA with rates layer by layer is trained beside them.

Your own: a folder of pictures below `input`, with `1.txt` beside `1.png`, or with one JSON file of \
captions, whose name goes into `caption_json` of **Load Image Folder**. **Load Checkpoint** replaces \
**Load Demo Base**; **Convert Checkpoint** makes a checkpoint of a folder in the diffusers layout.
"""
CLASS = """### dataset_class

Pictures of the class in general, drawn by the base itself and captioned without the trigger word, so \
that the class is not forgotten. For a dog: prompt and `class_tokens` *dog*. Their `loss_weight` is \
`prior_loss_weight` of **Build Dataset**.
"""
WORDS = """### word_names, RatioBucket

The template of HCP: `{pt1}` is the trigger word, `{caption}` the picture's text, `{class}` the folder's \
words. `num_bucket` sorts into so many ratios, as RatioBucket does; `resolution` squared is its \
`target_area`.
"""
LAYERS = """### 分层训练

**Blocks** has a rate for each pattern of layers, as `lora_unet` of the guide; what fits no line has the \
node's own rate. The rates here suit the tiny base: for a LoRA of SD1.x begin with 1e-4.

**Network** with `algo` *full* trains whole layers, as `layers: ['']` does; the guide's rate for that is \
1e-6.

**Text and Embeddings** is bypassed. Switched on (Ctrl+B), it trains the word's own embedding too, into \
`models/embeddings`: in prompts write `embedding:` and the name that the log gives.
"""
GENERATE = """### 生成图像, 模型格式转换

HCP writes `{word:1.2}`, ComfyUI `(word:1.2)`; the sampler is the guide's DPM++ with karras. The LoRA \
has kohya's names, for ComfyUI and sd-webui. **Convert LoRA** writes one with the names of diffusers, \
**Merge into Checkpoint** puts a LoRA into a checkpoint of yours for good.
"""


def dreambooth_workflow(info: Info) -> Workflow:
    """Return the workflow of DreamBooth with class images, a template, and rates of layers."""
    sheet = Sheet(info, "2f70b8e3-5d19-4a6c-93f4-c2be1d708f22")
    columns = Columns(sheet)
    columns.begin()
    columns.note(INTRO, 300)
    base = columns.add("LoraGraftLoadDemoBase", 100)
    images = columns.add("LoraGraftLoadImageFolder", 290, {"path": "[demo]"})
    found = columns.add("PreviewAny", 240, title="What was found")
    columns.frame("1  Base and images")

    columns.begin()
    columns.note(CLASS, 160)
    positive = columns.add("CLIPTextEncode", 120, {"text": "large red circle"}, title="Class prompt")
    negative = columns.add("CLIPTextEncode", 100, {"text": ""}, title="Negative prompt")
    latent = columns.add("EmptyLatentImage", 120, {"width": 64, "height": 64, "batch_size": 16})
    sampler = columns.add("KSampler", 270, {"seed": 1, "steps": 20, "cfg": 4.0})
    decode = columns.add("VAEDecode", 60)
    classes = columns.add(
        "LoraGraftImagesToDataset", 220, {"name": "class_images", "class_tokens": "large red circle"}
    )
    columns.frame("2  Class images")

    columns.begin()
    columns.note(WORDS, 160)
    words = columns.add(
        "LoraGraftEditCaptions",
        330,
        {"operations": f"remove trigger: {TRIGGER}\nword: pt1 = {TRIGGER}\ntemplate: {{pt1}}, {{caption}}"},
    )
    build = columns.add("LoraGraftBuildDataset", 760, {**DATASET, "num_bucket": 5, "prior_loss_weight": 1.0})
    columns.frame("3  Words and buckets")

    columns.begin()
    columns.note(LAYERS, 290)
    network = columns.add(
        "LoraGraftNetwork", 600, {"algo": "locon", "algo.conv_dim": 8, "algo.conv_alpha": 8.0}
    )
    blocks = columns.add(
        "LoraGraftBlocks",
        660,
        {"network_reg_lrs": "re:.*\\.to_k$=3e-3\nre:.*\\.to_v$=3e-3\nre:.*\\.ff\\.=3e-3\nre:.*resnets=1e-3"},
    )
    text = columns.add("LoraGraftText", 350, {"train_embeddings": f"{TRIGGER}=circle*2"}, mode=BYPASSED)
    columns.frame("4  Layers")

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
    columns.frame("5  Train")

    columns.begin(620)
    columns.note(GENERATE, 140)
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
    columns.frame("6  Generate and convert")

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
    link_base(sheet, base, train, grid)
    sheet.link(build, "train_set", train, "train_set")
    sheet.link(train, "lora_name", grid, "lora_name")
    sheet.link(train, "lora_name", convert, "lora_name")
    return sheet.workflow()
