"""Nodes for the full-size test: what ComfyUI adds to each weight for a LoRA, and how much memory it holds."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import json
import re
import sys
from pathlib import Path

import comfy.lora
import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file


class ProbeDelta:
    """Compare every weight change as ComfyUI computes it with alpha/rank * up @ down of a LoRA file."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        text = ("STRING", {"default": ""})
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "lora": text, "names": text}}

    def look(self, model, clip, lora, names):
        wanted = json.loads(Path(names).read_text("utf-8"))  # ComfyUI's weight -> the LoRA file's module
        file = load_file(lora)
        patches = {**model.patches, **clip.patcher.patches}
        weights = {**model.model.state_dict(), **clip.patcher.model.state_dict()}
        worst, largest = ("", 0.0), 0.0
        for key, module in wanted.items():
            if key not in patches:
                continue
            zero = torch.zeros(weights[key].shape)
            theirs = comfy.lora.calculate_weight(patches[key], zero, key).double()
            up, down = (file[f"{module}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
            ours = (file[f"{module}.alpha"].double() / down.shape[0] * (up @ down)).reshape(theirs.shape)
            error = float((theirs - ours).norm() / ours.norm())
            largest = max(largest, float(ours.abs().max()))
            worst = max(worst, (key, error), key=lambda pair: pair[1])
        report = {
            "patched": len(patches),
            "missing": sorted(set(wanted) - set(patches)),
            "unknown": sorted(set(patches) - set(wanted)),
            "worst": worst,
            "largest": largest,
        }
        return {"ui": {"text": [json.dumps(report)]}}


class ProbeResident:
    """Report memory in MiB after a collection: ``kept`` by the process, ``now`` once the C library has
    returned what it only keeps, and the live tensors' (Linux; else 0)."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tag": ("STRING", {"default": ""})}, "optional": {"after": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def look(self, tag, after=None):
        gc.collect()
        kept = resident()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        report = {
            "kept": kept["VmRSS"],
            "now": resident()["VmRSS"],
            "peak": kept["VmHWM"],
            "tensors": live_tensors(),
        }
        return {"ui": {"text": [json.dumps(report)]}}


class ProbeGrowth:
    """Open the base as Train LoRA does, build its modules, and report by how many MiB the process grew with
    them in place; built once before, so that imports and tokenizers do not count."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    def look(self, model, clip, vae):
        name = next(n for n in sys.modules if n.endswith("ComfyUI-LoraGraft"))
        with importlib.import_module(f"{name}.nodes.host").training_mode():
            base = importlib.import_module(f"{name}.nodes.host_bases").open_base(model, clip, vae)
            base.load()
            gc.collect()
            before = resident()["VmRSS"]
            parts = base.load()
            grown = resident()["VmRSS"] - before
            dtypes = sorted({str(weight.dtype) for weight in parts.denoiser.state_dict().values()})
        return {"ui": {"text": [json.dumps({"grown": grown, "dtypes": dtypes})]}}


T5_PLACES = {"flux": 256}  # to which ComfyUI fills captions up


class ProbeNear:
    """Compare what the host's and the trainer's modules make of a caption and of noise."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()
    NEEDED = ("nodes.host", "nodes.host_bases", "trainer.families.base", "trainer.families.drawing")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "text": ("STRING", {})}}

    def look(self, model, clip, vae, text):
        name = next(n for n in sys.modules if n.endswith("ComfyUI-LoraGraft"))
        pack = {m: importlib.import_module(f"{name}.{m}") for m in self.NEEDED}
        sigma = 0.7
        with pack["nodes.host"].training_mode(), torch.no_grad():
            base = pack["nodes.host_bases"].open_base(model, clip, vae)
            parts, family = base.load(), base.family
            parts = dataclasses.replace(parts, dtype=torch.bfloat16)
            noise = torch.randn(
                (1, *family.latent_shape(parts, 128, 192)), generator=torch.Generator().manual_seed(5)
            )
            reading = pack["trainer.families.base"].Reading(t5_length=T5_PLACES.get(family.name))
            cond = family.encode_text(parts, family.tokenize(parts, [text], reading), reading)
            guided = pack["trainer.families.drawing"].Guided("", 1.0, guidance=3.5)
            denoise = pack["trainer.families.drawing"].denoiser(
                family, parts, [text], (128, 192), guided, reading
            )
            ours = denoise(family.objective.start(noise, torch.tensor(sigma)), torch.tensor(sigma))
        conditions = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        video = model.model.latent_format.latent_dimensions == 3
        theirs = comfy.sample.sample_custom(
            model,
            noise.unsqueeze(2) if video else noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]),
            conditions,
            conditions,
            torch.zeros_like(noise.unsqueeze(2) if video else noise),
        )
        host = conditions[0][0]
        places = min(host.shape[1], cond[0].shape[1])
        report = {
            "text": apart(cond[0][:, :places], host[:, :places]),
            "denoised": apart(ours, model.model.process_latent_in(theirs).reshape(ours.shape)),
        }
        return {"ui": {"text": [json.dumps(report)]}}


def apart(ours, theirs) -> float:
    """Return the distance of two tensors relative to the second."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def resident() -> dict[str, float]:
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = {k: int(v) / 1024 for k, v in re.findall(r"(VmRSS|VmHWM):\s+(\d+)", text)}
    return {"VmRSS": 0.0, "VmHWM": 0.0, **found}


def live_tensors() -> float:
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type == "cpu"
    }
    return sum(storages.values()) / 2**20


NODE_CLASS_MAPPINGS = {
    "ProbeDelta": ProbeDelta,
    "ProbeResident": ProbeResident,
    "ProbeGrowth": ProbeGrowth,
    "ProbeNear": ProbeNear,
}
