"""Run by ComfyUI's interpreter: its own tokenizers, language model and video autoencoder on given weights.

    python comfy_qwen_child.py COMFYUI WORK

WORK/job.json holds captions, two shapes of language models and one of an autoencoder. Their weights lie in
WORK/weights.safetensors below "qwen2.", "qwen3." and "vae.", beside the inputs "ids", "pixels" and "latents".
Written are WORK/results.safetensors and the captions' tokens in WORK/tokens.json.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT, WORK = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent.parent / "comfyui")]


def main() -> None:
    """Compute everything."""
    importlib.import_module("launch").cure_imports()
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch
    from safetensors.torch import load_file, save_file

    job = json.loads((WORK / "job.json").read_text(encoding="utf-8"))
    tensors = load_file(WORK / "weights.safetensors")
    tokens = {}
    for file, name in (("qwen_image", "QwenImageTokenizer"), ("z_image", "ZImageTokenizer")):
        tokenizer = getattr(importlib.import_module(f"comfy.text_encoders.{file}"), name)()
        rows = [next(iter(tokenizer.tokenize_with_weights(c).values())) for c in job["captions"]]
        tokens[file] = [[token for token, *_ in row[0]] for row in rows]
    (WORK / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    with torch.no_grad():
        llama = importlib.import_module("comfy.text_encoders.llama")
        results = {
            "qwen2": language(llama.Qwen25_7BVLI_Config, job["qwen2"], tensors, "qwen2.")[0],
            "qwen3": language(llama.Qwen3_4BConfig, job["qwen3"], tensors, "qwen3.")[1],
        }
        vae = importlib.import_module("comfy.ldm.wan.vae").WanVAE(**job["vae"])
        vae.load_state_dict(below(tensors, "vae."), strict=True)
        format = importlib.import_module("comfy.latent_formats").Wan21()
        results["encoded"] = format.process_in(vae.encode(tensors["pixels"][:, :, None]))[:, :, 0]
        results["decoded"] = vae.decode(format.process_out(tensors["latents"][:, :, None]))[:, :, 0]
    save_file({k: v.contiguous() for k, v in results.items()}, WORK / "results.safetensors")


def language(config: Any, shape: dict[str, Any], tensors: dict[str, Any], prefix: str) -> Any:
    """Return a language model's last states, and those of the layer before the last, for "ids"."""
    import torch

    llama = importlib.import_module("comfy.text_encoders.llama")
    head = shape.pop("head_dim")
    made = config(**shape)
    made.head_dim = head
    model = llama.Llama2_(
        made, device="cpu", dtype=torch.float32, ops=importlib.import_module("comfy.ops").disable_weight_init
    )
    model.load_state_dict(below(tensors, prefix), strict=True)
    return model(
        tensors["ids"], intermediate_output=-2, final_layer_norm_intermediate=False, dtype=torch.float32
    )


def below(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the tensors below a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


main()
