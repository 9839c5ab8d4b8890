"""A custom node pack for tests only: it looks at the host from inside, and makes odd models.

Its nodes answer with one JSON text in their ui output.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import sys
import threading
import warnings
from pathlib import Path

import comfy.model_management
import comfy.ops
import numpy
import torch

from . import any_models, equal, gguf_like, tiny_models, tiny_more

FILES = Path("/proc/self/fd")
audited: list[str] = []
WATCHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
)


def watch(event, args):
    if event in WATCHED or (
        event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove")
        and "canary" in str(args)
    ):
        audited.append(f"{event} {args!r}"[:300])


sys.addaudithook(watch)


def pack(module: str):
    """Import a module of the LoraGraft pack as ComfyUI loaded it."""
    name = next(n for n in sys.modules if n.endswith("ComfyUI-LoraGraft"))
    return importlib.import_module(f"{name}.{module}")


def modules_of(model, clip, vae):
    return {"model": model.model, "clip": clip.cond_stage_model, "vae": vae.first_stage_model}


def digest(*parts) -> str:
    value = hashlib.sha256()
    for part in parts:
        value.update(part if isinstance(part, bytes) else repr(part).encode())
    return value.hexdigest()[:16]


def weights_hash(module) -> str:
    return digest(
        *(
            (k, w.dtype, w.device, w.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            if w.numel() and w.dim()
            else (k, w.dtype, w.device, w.detach().cpu().float().numpy().tobytes())
            for k, w in module.state_dict().items()
        )
    )


def state_of(module) -> str:
    return digest(
        [
            (
                n,
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                "forward" in vars(m),
            )
            for n, m in module.named_modules()
        ],
        [(n, p.requires_grad, p.data_ptr(), p.grad is None) for n, p in module.named_parameters()],
    )


class ProbeHost:
    """Report everything about the process that training must leave as it was."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "tag": ("STRING", {"default": ""}),
            },
            "optional": {"after": ("*",)},
        }

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def look(self, model, clip, vae, tag, after=None):
        parts = modules_of(model, clip, vae)
        report = {
            "inference_mode": torch.is_inference_mode_enabled(),
            "grad": torch.is_grad_enabled(),
            "default_dtype": str(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cudnn": [
                torch.backends.cudnn.enabled,
                torch.backends.cudnn.benchmark,
                torch.backends.cudnn.deterministic,
            ],
            "matmul": torch.get_float32_matmul_precision(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "in_training": getattr(comfy.model_management, "in_training", None),
            "torch_rng": digest(torch.get_rng_state().numpy().tobytes()),
            "python_rng": digest(random.getstate()),
            "numpy_rng": digest(numpy.random.get_state()[1].tobytes()),
            "cwd": str(Path.cwd()),
            "environment": digest(sorted(os.environ.items())),
            "sys_path": list(sys.path),
            "umask_free_modules": "nodes" in sys.modules and not hasattr(sys.modules["nodes"], "TrainLoRA"),
            "log_handlers": [type(h).__name__ for h in logging.getLogger().handlers],
            "log_level": logging.getLogger().level,
            "warning_filters": digest(
                [(f[0], str(f[1]), f[2].__name__, str(f[3])) for f in warnings.filters]
            ),
            "threads_alive": sorted(t.name.split("-")[0] for t in threading.enumerate()),
            "weights": {k: weights_hash(m) for k, m in parts.items()},
            "modules": {k: state_of(m) for k, m in parts.items()},
            "patches": [len(model.patches), len(clip.patcher.patches)],
        }
        return {"ui": {"text": [json.dumps(report)]}}


class ProbeMemory:
    """Count live tensors and open files after a collection."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tag": ("STRING", {"default": ""})}, "optional": {"after": ("*",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def look(self, tag, after=None):
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.device.type != "meta"
        }
        report = {
            "tensor_bytes": sum(storages.values()),
            "needing_grad": sum(t.requires_grad for t in tensors),
            "files": len(list(FILES.iterdir())) if FILES.is_dir() else 0,
        }
        return {"ui": {"text": [json.dumps(report)]}}


class ProbeShare:
    """Open the base as Train LoRA does and compare addresses with the host's weights."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "tag": ("STRING", {"default": ""}),
            }
        }

    def look(self, model, clip, vae, tag):
        with pack("nodes.host").training_mode():
            base = pack("nodes.host_bases").open_base(model, clip, vae)
            parts = base.load()
            host = {
                w.untyped_storage().data_ptr()
                for m in modules_of(model, clip, vae).values()
                for w in m.state_dict().values()
            }
            modules = {"denoiser": parts.denoiser, "vae": parts.vae, **dict(parts.text_encoders.items())}
            loaded = {
                f"{part}.{k}": w
                for part, module in modules.items()
                for k, held in module.state_dict().items()
                for w in held_in(held)
                if not k.endswith("position_ids") and w.dim()
            }
            report = {
                "count": len(loaded),
                "copied": [k for k, w in loaded.items() if w.untyped_storage().data_ptr() not in host],
                "copied_matrices": [
                    k for k, w in loaded.items() if w.dim() > 1 and w.untyped_storage().data_ptr() not in host
                ],
                "inference": [k for k, w in loaded.items() if w.is_inference()],
                "host_inference": any(w.is_inference() for w in model.model.state_dict().values()),
                "hash": base.weights_hash,
                "name": base.name,
                "family": base.family.name,
                "velocity": base.velocity,
                "zero_terminal": base.zero_terminal,
                "tokenizers": {kind: str(folder) for kind, folder in base.tokenizer_folders.items()},
            }
        return {"ui": {"text": [json.dumps(report)]}}


def held_in(weight):
    """List the tensors that a packed weight is made of, or the weight itself."""
    packed = getattr(weight, "packed", None)
    return [weight] if packed is None else list(packed.buffers())


class ProbeForward:
    """Compare what the host's and the trainer's modules make of the same inputs, on the same weights."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "text": ("STRING", {})}}

    def look(self, model, clip, vae, text):
        base = pack("nodes.host_bases").open_base(model, clip, vae)
        parts = base.load()
        draw = torch.Generator().manual_seed(1)
        width = parts.text_encoder.config.hidden_size
        x, cond = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, width, generator=draw)
        t = torch.tensor([7, 801])
        host = model.model.diffusion_model(x, t, context=cond)
        ours = parts.denoiser(x, t, encoder_hidden_states=cond).sample
        pixels = vae.decode(x[:1])
        decoded = (parts.vae.float().decode(x[:1]).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        reading = pack("trainer.families.base").Reading()
        ids = base.family.tokenize(parts, [text], reading)
        tokens = [t[0] for t in clip.tokenize(text)["l"][0]]
        words = base.family.encode_text(parts_in_float(parts), ids, reading)[0]
        encoded = clip.encode_from_tokens(clip.tokenize(text))
        report = {
            "denoiser": float((host - ours).abs().max() / ours.abs().max()),
            "vae": float((pixels - decoded).abs().max()),
            "text": float((encoded - words).abs().max() / words.abs().max()),
            "tokens": tokens == ids[0][0, 0].tolist(),
        }
        return {"ui": {"text": [json.dumps(report)]}}


def parts_in_float(parts):
    parts.text_encoder.float()
    return parts


class ProbeOddModel:
    """Return a copy of MODEL, CLIP and VAE that Train LoRA must refuse."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("MODEL", "CLIP", "VAE")
    KINDS = (
        "no_tokenizer",
        "packed",
        "meta",
        "inpaint",
        "no_clip",
        "no_vae",
        "bypass",
        "clip_layer",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "kind": (list(cls.KINDS),)}
        }

    def make(self, model, clip, vae, kind):
        if kind == "no_clip":
            return model, None, vae
        if kind == "no_vae":
            return model, clip, None
        if kind == "no_tokenizer":
            clip = clip.clone()
            clip.tokenizer = copy.copy(clip.tokenizer)
            clip.tokenizer.clip_l = object()
            return model, clip, vae
        if kind == "clip_layer":
            clip = clip.clone()
            clip.clip_layer(-2)
            return model, clip, vae
        if kind == "bypass":
            model = model.clone()
            model.set_injections("bypass_lora", [object()])
            return model, clip, vae
        model = model.clone(force_deepcopy=True)
        inner = model.model
        weight = inner.diffusion_model.input_blocks[1][0].in_layers[2].weight
        if kind == "packed":

            class GGMLTensor(torch.Tensor):
                pass

            packed = torch.zeros(weight.shape).as_subclass(GGMLTensor)
            inner.diffusion_model.input_blocks[1][0].in_layers[2].weight = torch.nn.Parameter(
                packed, requires_grad=False
            )
        elif kind == "meta":
            inner.diffusion_model.to("meta")
        elif kind == "inpaint":
            inner.model_config.unet_config = {**inner.model_config.unet_config, "in_channels": 9}
        return model, clip, vae


class ProbeAudit:
    """Return what the audit hook noted since it was last asked."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"plant": ("STRING", {"default": ""})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def look(self, plant):
        if plant:  # a planted hole, so that a test sees that the hook works
            with Path(plant).open("rb") as file:
                file.read(1)
        found, audited[:] = list(audited), []
        return {"ui": {"text": [json.dumps({"found": found})]}}


class ProbeChoice:
    """Return any text as a choice, which the host then does not check against the list."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("COMBO",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def make(self, text):
        return (text,)


class ProbeLoadCheckpoint:
    """Load a checkpoint of the demo base's widths, which the native loader does not know."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        import folder_paths

        path = Path(folder_paths.get_folder_paths("checkpoints")[0]) / name
        return pack("nodes.host_demo").load(path, pack("trainer.api").demo_tokenizer())


assert "z_image" in tiny_models.FAMILIES, tiny_more  # which adds to them
NODE_CLASS_MAPPINGS = {
    "ProbeLoadCheckpoint": ProbeLoadCheckpoint,
    "ProbeChoice": ProbeChoice,
    "ProbeAudit": ProbeAudit,
    "ProbeForward": ProbeForward,
    "ProbeHost": ProbeHost,
    "ProbeMemory": ProbeMemory,
    "ProbeShare": ProbeShare,
    "ProbeOddModel": ProbeOddModel,
    **any_models.NODES,
    **equal.NODES,
    **gguf_like.NODES,
    **tiny_models.NODES,
}
