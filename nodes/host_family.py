"""Any MODEL that ComfyUI has loaded, trained through ComfyUI's own way of calling it.

The trainer's own families do not need a host; this one is for all the others. The denoiser is a copy on the
same weights, called by the MODEL's apply_model; captions and pictures are encoded by the CLIP and the VAE.
What is trained are the linear layers of attention and feed-forward in the repeated blocks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import comfy.model_sampling
import torch
from torch import nn

from ..trainer import api
from ..trainer.errors import LoraGraftError
from .host_shadow import shadow

NO_TEXT = "captions are encoded by ComfyUI, whose text encoder stays as it is"
OWN_SAMPLING = "what is predicted, and the schedule, are the MODEL's own, as ComfyUI knows them"
NO_BLOCKS = "this model has no down, middle and up blocks"
IGNORED: Mapping[str, str] = {
    "train_embeddings": NO_TEXT,
    **dict.fromkeys(("clip_skip", "max_token_length", "tokenizer_repeats", "weighted_captions"), NO_TEXT),
    **dict.fromkeys(("t5xxl_max_token_length", "apply_t5_attn_mask"), NO_TEXT),
    **dict.fromkeys(("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_dims"), NO_BLOCKS),
    **dict.fromkeys(("v_parameterization", "zero_terminal_snr"), OWN_SAMPLING),
    **dict.fromkeys(("conv_dim", "train_norm"), "linear layers alone are trained"),
    "attention": "ComfyUI's code computes it, with torch's own attention",
    "preset": "the sets of modules are those of Stable Diffusion's U-Nets",
    "save_as": "only the LoRA can be written: the checkpoint's layout is not known to the trainer",
}
BLOCK = re.compile(r"(?:^|\.)\d+\.")  # a repeated block has a number in its path
# What attention and feed-forward layers are called, and what lies beside them and is not trained.
TRAINED = re.compile(
    r"attn|attention|(?:^|[._])(?:qkv|q|k|v|o|to_[qkv])(?:$|[._])|mlp|ff|feed_forward|linear", re.IGNORECASE
)
OTHERS = re.compile(r"(?:^|[._])mod(?:$|[._]|ul)|norm|adaln|embed", re.IGNORECASE)
LONGEST = 4096  # bytes of a caption
OTHER_NOISE = (comfy.model_sampling.EDM, comfy.model_sampling.X0)  # derived from EPS, but sampled otherwise
SMALLEST_SIGMA = 1e-4  # below, dividing by it would leave rounding errors alone


class HostFamily:
    """The family of one MODEL with its CLIP and VAE."""

    blocks = None
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {}
    velocity_of = zero_terminal_of = staticmethod(api.untold)
    trains_text = False
    uses_sizes = False
    ignored: Mapping[str, str] = IGNORED
    defaults: Mapping[str, Any] = {}

    def __init__(self, model: Any, clip: Any, vae: Any) -> None:
        self.inner, self.clip, self.vae = model.model, clip, vae
        self.sampling = model.get_model_object("model_sampling")  # a node may have changed it
        kind = type(self.inner).__name__
        self.name = f"comfyui-{kind}"
        self.objective = objective_of(self.sampling, kind)
        self.is_flow = isinstance(self.objective, api.Flow)
        self.look = api.Look(20, 4.0)
        self.compression = int(vae.spacial_compression_encode())
        self.latent_multiple = 2 * self.compression  # most models take patches of 2x2 latents
        self.metadata = {
            "ss_base_model_version": kind,
            "modelspec.architecture": f"{kind}/lora",
            "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        }
        if self.is_flow:
            self.defaults = {"timestep_sampling": "shift", "discrete_flow_shift": self.objective.shift}
        encoded = self._encode("")
        self._keys = tuple(key for key, value in encoded.items() if isinstance(value, torch.Tensor))
        self._fixed = {key: value for key, value in encoded.items() if key not in self._keys}
        self._shapes = [tuple(encoded[key].shape[1:]) for key in self._keys]
        empty = torch.zeros(1, *self.latent_shape(None, 2 * self.latent_multiple, 2 * self.latent_multiple))
        if "guidance" not in self._extra(self.inner, self._deep(empty), encoded):
            self.ignored = {**IGNORED, "guidance_scale": "this model is not told a guidance scale"}

    # ---- what only families with files of their own have ----

    def detect(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """See `Family`: it is never told by weights."""
        return False

    # ---- the parts ----

    def load(
        self, state_dicts: Mapping[str, Mapping[str, torch.Tensor]], tokenizers: Mapping[str, Any]
    ) -> Any:
        """Return the parts: the copied denoiser; ComfyUI keeps the VAE and the text encoders."""
        denoiser = shadow(self.inner.diffusion_model, state_dicts["denoiser"])
        return api.Parts(denoiser, nn.Identity(), nn.ModuleDict(), {})

    def latent_shape(self, parts: Any, height: int, width: int) -> tuple[int, ...]:
        """Return (C, h, w)."""
        channels: int = self.inner.latent_format.latent_channels
        return (channels, height // self.compression, width // self.compression)

    @torch.no_grad()
    def encode_images(self, parts: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into latents as the MODEL takes them, float32."""
        latents = self.vae.encode((pixels.movedim(1, -1) + 1) / 2)
        return {"mean": self._flat(self.inner.process_latent_in(latents.float())).to(pixels.device)}

    def latents(self, moments: Mapping[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        """Return the latents: ComfyUI's VAE draws nothing."""
        return moments["mean"]

    @torch.no_grad()
    def decode(self, parts: Any, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32."""
        images = self.vae.decode(self.inner.process_latent_out(self._deep(latents)))
        images = images[:, 0] if images.ndim == 5 else images  # of a video the first frame
        pixels: torch.Tensor = images.movedim(-1, 1).float() * 2 - 1
        return pixels

    # ---- captions ----

    def tokenize(self, parts: Any, captions: Sequence[str], reading: Any) -> tuple[torch.Tensor, ...]:
        """Return the captions' bytes (B, LONGEST), 0 behind their end; raises LG-NODE-018 for a long one."""
        rows = []
        for caption in captions:
            read = caption.encode()
            if len(read) > LONGEST:
                raise LoraGraftError(
                    "LG-NODE-018",
                    f"A caption has {len(read)} bytes; {LONGEST} can be read here.",
                    where=f"{caption[:60]}...",
                    why="longer ones would be cut in silence.",
                    fix="shorten the caption",
                )
            rows.append(torch.tensor([*read, *[0] * (LONGEST - len(read))]))
        return (torch.stack(rows),)

    def reading_for(self, parts: Any, captions: Sequence[str], reading: Any) -> Any:
        """Return the reading: ComfyUI decides how long captions are."""
        return reading

    def room(self, parts: Any, captions: Sequence[str], reading: Any) -> None:
        """See `Family`: ComfyUI cuts no caption."""

    def encode_text(
        self, parts: Any, tokens: tuple[torch.Tensor, ...], reading: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return the tensors of ComfyUI's conditioning, each (B, ...)."""
        device = tokens[0].device
        texts = [bytes(row[row > 0].tolist()).decode() for row in tokens[0].cpu()]
        rows = [self._encode(text) for text in texts]
        return tuple(torch.cat([row[key] for row in rows]).to(device) for key in self._keys)

    def cond_shapes(self, parts: Any, reading: Any) -> list[tuple[int, ...]]:
        """Return the shapes that an empty caption has; longer ones may have longer ones."""
        return self._shapes

    # ---- a step ----

    def predict(
        self,
        parts: Any,
        noisy: torch.Tensor,
        t: torch.Tensor,
        cond: tuple[torch.Tensor, ...],
        sizes: torch.Tensor | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return noise, or the velocity of a flow, as the MODEL's apply_model estimates the picture."""
        wrapped = self._around(parts)
        sigma = self._sigma(t)
        wide = sigma.view(-1, *[1] * (noisy.ndim - 1))
        x = noisy if self.is_flow else noisy * (1 + wide**2).sqrt()
        deep = self._deep(x)
        given: dict[str, Any] = dict(zip(self._keys, cond, strict=True))
        if guidance is not None:
            given["guidance"] = guidance
        extra = self._extra(wrapped, deep, {**self._fixed, **given})
        inputs = {
            name: each.process_cond(batch_size=len(deep), device=noisy.device, area=None).concat([])
            for name, each in extra.items()
        }
        options = {"optimized_attention_override": _pytorch_attention, "cond_or_uncond": [0], "sigmas": sigma}
        estimate = self._flat(wrapped.apply_model(deep, sigma, transformer_options=options, **inputs))
        return (x.float() - estimate) / wide

    def targets(self, parts: Any, *, convolutions: bool, preset: str = "", norms: bool = False) -> list[Any]:
        """List the linear layers of attention and feed-forward in the repeated blocks; or all there are."""
        linears = [path for path, m in parts.denoiser.named_modules() if isinstance(m, nn.Linear)]
        in_blocks = [path for path in linears if BLOCK.search(path)]
        usual = [path for path in in_blocks if TRAINED.search(path) and not OTHERS.search(path)]
        chosen = linears if preset else usual or in_blocks
        return [api.Target("denoiser", path, f"diffusion_model.{path}", "linear") for path in chosen]

    # ---- inside ----

    def _encode(self, text: str) -> dict[str, Any]:
        """Return ComfyUI's conditioning of a text by the names that extra_conds knows."""
        with torch.no_grad():
            encoded = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        cond, more = encoded[0]  # a CLIP with hooks, which gives several by turns, was refused
        named = {"cross_attn": cond, **more}
        return {
            name: value.float().clone() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in named.items()
        }

    def _extra(self, inner: Any, latents: torch.Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model makes of a conditioning: the inputs that it gets beside the latents."""
        height, width = (side * self.compression for side in latents.shape[-2:])
        sizes = {"noise": latents, "device": latents.device, "width": width, "height": height}
        found: dict[str, Any] = inner.extra_conds(**given, **sizes, prompt_type="positive")
        return found

    def _around(self, parts: Any) -> Any:
        """Return the host's model with the trained denoiser in it, computing in the run's precision."""
        wrapped = copy.copy(self.inner)
        own = {"diffusion_model": parts.denoiser, "model_sampling": self.sampling}
        wrapped._modules = {**self.inner._modules, **own}
        wrapped.manual_cast_dtype = parts.dtype
        wrapped.current_patcher = None
        return wrapped

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Return ComfyUI's sigmas (B,) of timesteps."""
        if self.is_flow:
            return (t.float() / self.objective.num_timesteps).clamp(min=SMALLEST_SIGMA)
        sigmas: torch.Tensor = self.objective.sigmas.to(t.device)[t]
        return sigmas

    def _deep(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents with a time of one frame, where the MODEL knows of time."""
        return latents.unsqueeze(2) if self.inner.latent_format.latent_dimensions == 3 else latents

    def _flat(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, 0] if latents.ndim == 5 else latents


@contextmanager
def differentiable(family: Any) -> Iterator[None]:
    """Have the functions of ComfyUI keep gradients while the block runs, where it computes the steps.

    Some of its kernels have none, and it takes others while this flag of its own is set.
    """
    before = getattr(management, "in_training", False)
    management.in_training = before or isinstance(family, HostFamily)
    try:
        yield
    finally:
        management.in_training = before


def objective_of(sampling: Any, kind: str) -> Any:
    """Return the trainer's objective for a MODEL's sampling; raises LG-NODE-017 for one that it has not."""
    others = (comfy.model_sampling.IMG_TO_IMG_FLOW,)
    if isinstance(sampling, comfy.model_sampling.CONST) and not isinstance(sampling, others):
        return api.Flow(shift=float(getattr(sampling, "shift", 1.0)))
    plain = api.NoiseSchedule()
    own = getattr(sampling, "sigmas", torch.empty(0)).cpu().float()
    is_noise = isinstance(sampling, comfy.model_sampling.EPS) and not isinstance(sampling, OTHER_NOISE)
    if is_noise and own.shape == plain.sigmas.shape and torch.allclose(own, plain.sigmas, rtol=1e-3):
        return plain
    raise LoraGraftError(
        "LG-NODE-017",
        "This MODEL's kind of sampling cannot be trained.",
        where=f"MODEL: {kind}, {' and '.join(c.__name__ for c in type(sampling).__mro__[1:3])}",
        why="the trainer knows Stable Diffusion's noise schedule and rectified flow; a LoRA trained on "
        "another would fit neither.",
        fix="link the loader's MODEL without ModelSampling nodes, or train a model of another family",
    )


def _pytorch_attention(usual: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute attention with torch's own function: others of the host have no gradient."""
    return attention.attention_pytorch(*args, **kwargs)
