"""Draw one image twice, by ComfyUI's sampler and by the trainer's own modules, and compare."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch

from . import pipelines

# To which ComfyUI fills captions up.
T5_LENGTHS = {
    "sd3": 77,
    "sd35_medium": 77,
    "flux": 256,
    "flux_schnell": 256,
}

# Families whose texts ComfyUI encodes otherwise than they learnt: Chroma saw one place of padding, which
# ComfyUI does not add, and Lumina 2's Gemma caps the logits of its attention, which ComfyUI does not.
OWN_CONDITION = ("chroma", "lumina2")


def pack(module: str) -> Any:
    """Import a module of the LoraGraft pack as ComfyUI loaded it."""
    name = next(n for n in sys.modules if n.endswith("ComfyUI-LoraGraft"))
    return importlib.import_module(f"{name}.{module}")


def encoded(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


class ProbeEqual:
    """Give the same noise and sigmas to both, with a LoRA on both, all in float32."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {name: ("STRING", {"default": ""}) for name in ("text", "negative", "lora_name")}
        return {
            "required": {
                **{name: (name.upper(),) for name in ("model", "clip", "vae")},
                **texts,
                "cfg": ("FLOAT", {"default": 4.0}),
                "steps": ("INT", {"default": 6}),
            }
        }

    def look(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        text: str,
        negative: str,
        lora_name: str,
        cfg: float,
        steps: int,
    ) -> dict[str, Any]:
        file = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        with pack("nodes.host").training_mode(), torch.no_grad():
            base = pack("nodes.host_bases").open_base(model, clip, vae)
            height, width = 64, 96
            parts = base.load()
            noise = torch.randn(
                (1, *base.family.latent_shape(parts, height, width)),
                generator=torch.Generator().manual_seed(5),
            )
            sigmas = base.family.objective.sigmas_for(steps, (height, width))
            if base.zero_terminal:
                sigmas = (
                    pack("trainer.families.drawing")
                    .objective_of(base.family, self.guided(base, negative, cfg))
                    .sigmas_for(steps, (height, width))
                )
                # ComfyUI ends its table at a small signal, so that it stays finite: both begin there
                sigmas[0] = model.get_model_object("model_sampling").sigma_max
            plain = self.ours(base, parts, text, negative, cfg, noise, sigmas)
            self.merge(base, parts, file)
            ours = self.ours(base, parts, text, negative, cfg, noise, sigmas)
        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
        conditions = [encoded(clip, words) for words in (text, negative)]
        if base.family.name in OWN_CONDITION:
            conditions = [self.own_condition(base, parts, words) for words in (text, negative)]
        flat = noise
        if model.model.latent_format.latent_dimensions == 3:  # a video of one picture
            noise = noise.unsqueeze(2)
        latents = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            *conditions,
            torch.zeros_like(noise),
        )
        theirs = vae.decode(latents).reshape(ours.shape)
        report = {
            "family": base.family.name,
            "apart": float((ours - theirs).abs().max()),
            "lora_moves": float((ours - plain).abs().max()),
            "deviation": float(theirs.std()),
        }
        if base.family.name in pipelines.PIPES and importlib.util.find_spec("peft"):
            with pack("nodes.host").training_mode(), torch.no_grad():
                fresh = self.in_float(base.load())
                own = self.for_diffusers(base, file)
                drawn = pipelines.draw(base, fresh, own, text, negative, cfg, flat, sigmas, pack)
            report["diffusers_apart"] = float((drawn - theirs).abs().max())
        return {"ui": {"text": [json.dumps(report)]}}

    @staticmethod
    def in_float(parts: Any) -> Any:
        for module in (parts.denoiser, parts.vae, parts.text_encoders):
            module.float()
        return parts

    @staticmethod
    def for_diffusers(base: Any, file: Path) -> Path:
        """Return the file under names that diffusers' loader of this family reads."""
        if base.family.name in ("sd2", "sdxl"):
            return file
        output = file.with_name(f"{file.stem}_diffusers.safetensors")
        api = pack("trainer.api")
        api.convert_lora(file, api.Output(output, overwrite=True), "diffusers")
        return output

    @staticmethod
    def own_condition(base: Any, parts: Any, text: str) -> Any:
        """Return the trainer's conditioning as ComfyUI's, without the places that are hidden."""
        reading = pack("trainer.families.base").Reading()
        with torch.inference_mode(False), torch.no_grad():
            tokens = base.family.tokenize(parts, [text], reading)
            states, mask = base.family.encode_text(parts, tokens, reading)
        return [[states[:, : int(mask.sum())], {}]]

    @staticmethod
    def merge(base: Any, parts: Any, file: Path) -> None:
        """Add a LoRA to the trainer's modules, in new tensors, by the names of what was trained."""
        targets = {t.key: t for t in base.family.targets(parts, convolutions=False)}
        common = pack("trainer.tools.convert").to_common(pack("trainer.tools.lora_file").read_lora(file))
        for name, module in common.modules.items():
            layer = parts.part(targets[name].part).get_submodule(targets[name].path)
            weight = layer.weight.float()
            layer.weight = torch.nn.Parameter(
                weight + pack("trainer.tools.deltas").delta(module, weight), requires_grad=False
            )

    @staticmethod
    def guided(base: Any, negative: str, cfg: float) -> Any:
        return pack("trainer.families.drawing").Guided(
            negative,
            cfg,
            guidance=3.5,
            velocity=bool(base.velocity),
            zero_terminal_snr=bool(base.zero_terminal),
        )

    def ours(
        self,
        base: Any,
        parts: Any,
        text: str,
        negative: str,
        cfg: float,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
    ) -> torch.Tensor:
        """Draw as the command line draws; return pixels (1, H, W, 3) in [0, 1]."""
        drawing = pack("trainer.families.drawing")
        reading = pack("trainer.families.base").Reading(t5_length=T5_LENGTHS.get(base.family.name))
        self.in_float(parts)
        guided = self.guided(base, negative, cfg)
        denoise = drawing.denoiser(base.family, parts, [text], (64, 96), guided, reading)
        x = drawing.objective_of(base.family, guided).start(noise, sigmas[0])
        for sigma, following in pairwise(sigmas):
            x = x + (x - denoise(x, sigma)) / sigma * (following - sigma)
        pixels = base.family.decode(parts, x)
        return (pixels / 2 + 0.5).clamp(0, 1).movedim(1, -1)


NODES = {"ProbeEqual": ProbeEqual}
