"""Make the demo base from nothing: `python -m loragraft.trainer.demo.make_base --out DIR --work DIR`.

Every stage keeps its state in the work folder; run the same command again after any interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from .export import BASE_NAME, export_base
from .latents import build_pool, normalised_vae
from .models import count_parameters
from .quality import measure_base, measure_checkers
from .tokenizer import write_tokenizer
from .train_decoder import train_decoder
from .train_unet import train_unet
from .train_vae import train_vae

VAE_STEPS = 3400
DECODER_STEPS = 1100
UNET_STEPS = 4200


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_base", description="Train the demo base model from scratch.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for states; reuse it to continue")
    parser.add_argument("--seed", type=int, default=1, help="seed of drawings, weights and noise")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    stages = ("all", "vae", "decoder", "denoiser")
    parser.add_argument(
        "--stage", choices=stages, default="all", help="one stage alone, e.g. on a core of its own"
    )
    return parser.parse_args()


def main() -> None:
    """Run all stages: VAE, pool of latents, denoiser with text encoder, decoder, export, quality."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device, start = torch.device(args.device), time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - start:6.0f} s  {text}\n")
        sys.stdout.flush()

    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args.work, args.vae_steps, args.seed, device, say)
    vae = normalised_vae(vae.train(False), args.work, args.seed, device)
    if args.stage == "vae":
        return
    if args.stage == "decoder":
        train_decoder(vae, args.work, args.decoder_steps, args.seed, device, say)
        return
    pool = build_pool(vae, args.work, args.seed, device, say)
    tokenizer = write_tokenizer(args.out / "tokenizer")
    model = train_unet(pool, tokenizer, args.work, args.unet_steps, args.seed, device, say)
    if args.stage == "denoiser":
        return
    vae = train_decoder(vae, args.work, args.decoder_steps, args.seed, device, say)
    sha256 = export_base(model, vae, args.out, args.seed)
    # Measured on the rounded weights that were written, not on those in training.
    for module in (vae, model.unet, model.text_encoder):
        module.half().float()
    facts = {
        "file": BASE_NAME,
        "sha256": sha256,
        "bytes": (args.out / BASE_NAME).stat().st_size,
        "seed": args.seed,
        "steps_trained": {"vae": args.vae_steps, "decoder": args.decoder_steps, "unet": args.unet_steps},
        "parameters": {
            "unet": count_parameters(model.unet),
            "text_encoder": count_parameters(model.text_encoder),
            "vae": count_parameters(vae),
        },
        "held_out": measure_base(model, vae, args.seed, sheet=args.work / "held_out.png"),
        **measure_checkers(vae, args.seed),
    }
    (args.out / "quality.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    say(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
