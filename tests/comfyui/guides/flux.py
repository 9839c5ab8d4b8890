"""A LoRA for Flux.1, with the settings of the guide that trains the character yuiri with kohya's trainer."""

from __future__ import annotations

from loragraft_tests.comfyui.guides.families import Example, Loader, built

TEXT_ENCODERS = "comfyanonymous/flux_text_encoders/resolve/main/"
RATES = "double_blocks=8e-4\nsingle_blocks_[0-9]_=3.2e-3\nsingle_blocks=2.4e-3"
FLUX = Example(
    uuid="e1b7c4a9-2d58-4f06-9c3b-8a60f5d7e244",
    guide=True,
    about="""## Train a LoRA for Flux.1

After the guide that trains *yuiri* with `_run_fluxd.sh`; its part about images is **LoraGraft Photos and \
Videos**.

1. Flux.1 comes in parts: the model in **Load Diffusion Model**, CLIP-L and T5 in **DualCLIPLoader**, the \
autoencoder in **Load VAE**. fp8 and GGUF files are read too.
2. Put the images into a folder below ComfyUI's `input`, and write its name into **Load Image Folder**. \
Images without a caption get `class_tokens`, the word that prompts need later.
3. Press **Run**. Cancel keeps the work, and running again continues.

The guide has 20 to 30 images of a face, 100 to 200 of a character.
""",
    settings="""### 3.训练脚本, 7.关于学习率

- `learning_rate` 1.6e-3 with rank 16 and alpha 1: alpha / rank is a sixteenth, so 1e-4 is what counts. Rank \
16 does for a character; more is slower, and the file larger.
- `conv_dim` and `conv_alphas` are left out: Flux has no convolutions. So are `down_lr_weight`, \
`mid_lr_weight` and `up_lr_weight`: it has no such blocks, but 19 *double* and 38 *single* ones. All of them \
are refused here, where kohya's trainer takes no notice of them.
- What the guide wants of them is in **Blocks**, as rates of Flux's blocks: the first blocks learn slowly, \
the middle ones twice as fast, those behind them between the two.
- Noise levels need no setting: *auto* is `shift` with 3.1582 for Flux, and `guidance_scale` 1. **Loss and \
Noise** has others.
- T5 is not trained, and its text is kept, so its memory is free while the model trains.
- `resolution` 512 as in the guide; 768 or 1024 for details. Batch 8 is for a card of 40 GB: take 1 for one \
of 24 GB, and `blocks_to_swap` for less.
""",
    test="""### 6.使用lora

cfg 1: Flux.1 dev is told its guidance, 3.5 where no FluxGuidance node says otherwise. 100 epochs of 200 \
images are 2500 steps; about 1000 show a clear effect.
""",
    loaders=[
        Loader(
            "UNETLoader",
            {"unet_name": "flux1-dev.safetensors"},
            [
                (
                    "flux1-dev.safetensors",
                    "black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors",
                    "diffusion_models",
                )
            ],
            90,
        ),
        Loader(
            "DualCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "t5xxl_fp16.safetensors",
                "type": "flux",
            },
            [
                (name, TEXT_ENCODERS + name, "text_encoders")
                for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")
            ],
            150,
        ),
        Loader(
            "VAELoader",
            {"vae_name": "ae.safetensors"},
            [("ae.safetensors", "black-forest-labs/FLUX.1-schnell/resolve/main/ae.safetensors", "vae")],
            70,
        ),
    ],
    slots=((0, 0), (1, 0), (2, 0)),
    folder={"path": "yuiri", "class_tokens": "yuiri", "default_repeats": 1},
    build={"resolution": 512, "max_bucket_reso": 1024},
    train={
        "output_name": "yuiri_flux",
        "network_dim": 16,
        "network_alpha": 1.0,
        "learning_rate": 1.6e-3,
        "lr_scheduler": "constant",
        "max_train_epochs": 100,
        "train_batch_size": 8,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "save_every_n_epochs": 20,
        "sample_prompts": "yuiri sitting in a cafe",
    },
    nodes=[
        ("LoraGraftBlocks", 680, {"network_reg_lrs": RATES}),
    ],
    preview={
        "prompts": "yuiri sitting in a cafe\nyuiri in the snow\na woman sitting in a cafe",
        "seeds": "1, 2",
        "strengths": "0, 0.7-1.1 [3]",
        "sampler_name": "euler",
        "scheduler": "simple",
        "steps": 20,
        "cfg": 1.0,
        "width": 768,
        "height": 1024,
    },
)

flux_workflow = built(FLUX)
