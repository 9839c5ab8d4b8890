"""Stable Diffusion 1.x: U-Net with cross-attention, CLIP text model, KL VAE, eps-prediction.

Modules are diffusers' and transformers' own classes. Their shapes are read from the weights, so the
same code serves a real SD1.5 checkpoint and the tiny embedded base of the same structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import nn

from ..block_weights import SD1, Blocks
from ..engine.precision import visiting
from ..errors import LoraGraftError, listed
from ..objective import NoiseSchedule, generator
from ..parts import Parts, Target
from .base import Tensors
from .clip_tokens import CHUNK, caption_ids, in_chunks, weighted_ids
from .ldm_keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    is_vae_attention_weight,
    unet_to_diffusers,
    unet_to_ldm,
    vae_to_diffusers,
    vae_to_ldm,
)
from .targets import find_targets
from .weights import Renamed, joined
from .words import WordEmbedding

SCALING_FACTOR = 0.18215
NUM_HEADS = 8  # of every attention in SD1.x; not visible in the weights
TEXT_HEAD_DIM = 64

IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
Built = TypeVar("Built", bound=nn.Module)


class SD15:
    """The SD1.x family; stateless."""

    name = "sd15"
    latent_multiple = 8
    blocks: Blocks | None = SD1
    schedule = NoiseSchedule()
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }

    def detect(self, keys: Sequence[str]) -> bool:
        """Say whether single-file keys belong to SD1.x."""
        names = set(keys)
        return (
            any(k.startswith(UNET_PREFIX + "input_blocks.") for k in names)
            and any(k.startswith(TEXT_PREFIX + "text_model.") for k in names)
            and UNET_PREFIX + "label_emb.0.0.weight" not in names
        )

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into diffusers-named state dicts of the three parts (views)."""

        def below(prefix: str) -> list[str]:
            return [k[len(prefix) :] for k in weights if k.startswith(prefix)]

        unet = {new: UNET_PREFIX + old for new, old in unet_to_diffusers(below(UNET_PREFIX)).items()}
        vae = {new: VAE_PREFIX + old for new, old in vae_to_diffusers(below(VAE_PREFIX)).items()}
        text = {k: TEXT_PREFIX + k for k in below(TEXT_PREFIX) if not k.endswith("position_ids")}
        matrices = frozenset(new for new, old in vae.items() if is_vae_attention_weight(old))
        return {
            "denoiser": Renamed(weights, unet),
            "vae": Renamed(weights, vae, matrices),
            "text_encoder": Renamed(weights, text),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the three parts under single-file names (views): what `split` takes apart."""
        unet, vae, text = (state_dicts[part] for part in ("denoiser", "vae", "text_encoder"))
        of_vae = {VAE_PREFIX + new: old for new, old in vae_to_ldm(vae).items()}
        kernels = frozenset(n for n in of_vae if is_vae_attention_weight(n) and vae[of_vae[n]].ndim == 2)
        return joined(
            [
                Renamed(vae, of_vae, kernels=kernels),
                Renamed(text, {TEXT_PREFIX + name: name for name in text}),
                Renamed(unet, {UNET_PREFIX + new: old for new, old in unet_to_ldm(unet).items()}),
            ]
        )

    def load(self, state_dicts: Mapping[str, Tensors], tokenizer: Any) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        text_sd = dict(state_dicts["text_encoder"])
        with torch.device("meta"):
            unet = _built("U-Net", lambda: UNet2DConditionModel(**unet_config(state_dicts["denoiser"])))
            vae = _built("VAE", lambda: AutoencoderKL(**vae_config(state_dicts["vae"])))
            text = _built("text encoder", lambda: CLIPTextModel(CLIPTextConfig(**text_config(text_sd))))
        if not hasattr(text, "text_model"):  # transformers 5 dropped the inner module and its prefix
            text_sd = {k.removeprefix("text_model."): v for k, v in text_sd.items()}
        _assign(unet, state_dicts["denoiser"], "U-Net")
        _assign(vae, state_dicts["vae"], "VAE")
        _assign(text, text_sd, "text encoder")
        embeddings = _text_body(text).embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0]).expand((1, -1))
        rows = embeddings.token_embedding.weight.shape[0]
        if len(tokenizer) != rows:
            raise LoraGraftError(
                "LG-BASE-006",
                f"The tokenizer has {len(tokenizer)} entries, the text encoder {rows}.",
                where="tokenizer",
                why="captions would be read as other words than the base model learnt.",
                fix="name the tokenizer folder that belongs to this base model",
            )
        for module in (unet, vae, text):
            module.requires_grad_(False)
        return Parts(unet, vae, text, tokenizer)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled."""
        posterior = cast(Any, parts.vae).encode(pixels.float()).latent_dist
        return {"mean": posterior.mean.float(), "std": posterior.std.float()}

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, 4, H/8, W/8) from moments with standard normal ``noise``."""
        return (moments["mean"] + moments["std"] * noise) * SCALING_FACTOR

    def tokenize(self, parts: Parts, captions: Sequence[str], max_token_length: int) -> torch.Tensor:
        """Return token ids (B, chunks, 77): 75 between a start and an end token, as kohya cuts them."""
        ids = [caption_ids(parts.tokenizer, caption, parts.words) for caption in captions]
        return torch.stack([in_chunks(parts.tokenizer, each, max_token_length) for each in ids])

    def tokenize_weighted(
        self, parts: Parts, captions: Sequence[str], max_token_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids (B, chunks, 77) of captions with emphasis, and the weights (B, chunks*75+2).

        The weights are those of the conditioning's places; start, end and padding weigh 1.
        """
        read = [weighted_ids(parts.tokenizer, caption, parts.words) for caption in captions]
        ids = [in_chunks(parts.tokenizer, each, max_token_length) for each, _ in read]
        weights = [w[:max_token_length] for _, w in read]
        padded = [[1.0, *w, *[1.0] * (max_token_length + 1 - len(w))] for w in weights]
        return torch.stack(ids), torch.tensor(padded)

    def encode_text(self, parts: Parts, ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
        """Return the conditioning (B, chunks*75+2, D): one start, all chunks' insides, one end token."""
        batch, chunks, length = ids.shape
        text = parts.text_encoder
        layers = len(_text_body(text).encoder.layers)
        if clip_skip > layers:
            raise LoraGraftError(
                "LG-CFG-008",
                f"clip_skip is {clip_skip}, but the text encoder has {layers} layers.",
                where="clip_skip",
                why="there is no such layer to take the conditioning from.",
                fix=f"set clip_skip to 1 or 2, at most {layers}",
            )
        out = text(ids.reshape(batch * chunks, length), output_hidden_states=clip_skip > 1)
        hidden = (
            out.last_hidden_state
            if clip_skip == 1
            else _text_body(text).final_layer_norm(out.hidden_states[-clip_skip])
        )
        hidden = hidden.reshape(batch, chunks, length, -1)
        if chunks == 1:
            return cast(torch.Tensor, hidden[:, 0])
        inside = hidden[:, :, 1:-1].reshape(batch, chunks * (length - 2), -1)
        return torch.cat([hidden[:, 0, :1], inside, hidden[:, -1, -1:]], dim=1)

    @torch.no_grad()
    def word_rows(self, parts: Parts, text: str) -> torch.Tensor:
        """Return the embeddings (n, D) of a text's tokens, float32 on the CPU; of "", those of all tokens."""
        embedding = _text_body(parts.text_encoder).embeddings.token_embedding
        ids = caption_ids(parts.tokenizer, text, {}) if text else range(len(parts.tokenizer))
        device = next(parts.text_encoder.parameters()).device
        rows: torch.Tensor = embedding(torch.tensor(ids, device=device))
        return rows.float().cpu()

    def add_words(self, parts: Parts, vectors: Mapping[str, nn.Parameter]) -> None:
        """Let captions mean ``vectors``, (n, D) a word, wherever they have one of the words."""
        embeddings, first = _text_body(parts.text_encoder).embeddings, len(parts.tokenizer)
        for word, rows in vectors.items():
            parts.words[word] = tuple(range(first, first + len(rows)))
            first += len(rows)
        embeddings.token_embedding = WordEmbedding(embeddings.token_embedding, list(vectors.values()))

    def predict(self, parts: Parts, noisy: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Return what the base predicts, noise or velocity, for noisy latents at integer timesteps t (B,)."""
        noisy, cond = noisy.to(parts.dtype), cond.to(parts.dtype)
        return cast(torch.Tensor, parts.denoiser(noisy, t, encoder_hidden_states=cond, return_dict=False)[0])

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that kohya's trainer trains, or those of a LyCORIS preset; see `find_targets`."""
        return find_targets(parts, block_of, convolutions=convolutions, preset=preset, norms=norms)

    @torch.no_grad()
    def sample(
        self,
        parts: Parts,
        prompts: Sequence[str],
        *,
        negative: str = "",
        seeds: Sequence[int],
        size: tuple[int, int],
        steps: int = 20,
        cfg: float = 7.0,
        clip_skip: int = 1,
        velocity: bool = False,
        zero_terminal_snr: bool = False,
    ) -> list[Image.Image]:
        """Draw an image of ``size`` (height, width) pixels for each prompt and its seed.

        Euler's method over k-diffusion's sigmas (Karras et al. 2022), with classifier-free guidance.
        ``velocity`` says that the base predicts v and not noise.
        """
        device = next(parts.denoiser.parameters()).device
        longest = max(len(caption_ids(parts.tokenizer, p, parts.words)) for p in (*prompts, negative))
        texts = [negative] * len(prompts) + list(prompts)
        ids = self.tokenize(parts, texts, max(1, -(-longest // CHUNK)) * CHUNK).to(device)
        with visiting(parts.text_encoder, device):
            cond = self.encode_text(parts, ids, clip_skip)
        schedule = replace(self.schedule, zero_terminal_snr=True) if zero_terminal_snr else self.schedule
        t = torch.linspace(schedule.num_timesteps - 1, 0, steps).round().long()
        sigmas = torch.cat([schedule.sigmas[t], torch.zeros(1)]).to(device)
        shape = (4, size[0] // 8, size[1] // 8)
        noise = torch.stack([torch.randn(shape, generator=generator(seed, "sample")) for seed in seeds])
        x = noise.to(device) * (1 + sigmas[0] ** 2) ** 0.5
        for i in range(steps):
            scaled = (x / (1 + sigmas[i] ** 2) ** 0.5).repeat(2, 1, 1, 1)
            both = self.predict(parts, scaled, t[i].to(device).expand(len(scaled)), cond)
            eps_negative, eps = both.float().chunk(2)
            if velocity:  # noise = sqrt(1 - a) x_t + sqrt(a) v, where sqrt(a) = 1 / sqrt(1 + sigma^2)
                share = 1 / (1 + sigmas[i] ** 2) ** 0.5
                of_x = scaled.chunk(2)[0] * sigmas[i] * share
                eps_negative, eps = eps_negative * share + of_x, eps * share + of_x
            x = x + (eps_negative + cfg * (eps - eps_negative)) * (sigmas[i + 1] - sigmas[i])
        with visiting(parts.vae, device):
            pixels = cast(Any, parts.vae).decode(x / SCALING_FACTOR, return_dict=False)[0].float()
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(image.numpy()) for image in levels.cpu()]


def unet_config(sd: Tensors) -> dict[str, Any]:
    """Read the U-Net's shape from diffusers-named weights."""
    levels = _count(sd, r"down_blocks\.(\d+)\.")
    attended = [f"down_blocks.{i}.attentions.0.norm.weight" in sd for i in range(levels)]
    cross = _first(sd, "attn2.to_k.weight")
    if cross.shape[1] == 1024 or sd["conv_in.weight"].shape[1] != 4:
        kind = "SD2.x" if cross.shape[1] == 1024 else "an inpainting or otherwise extended model"
        raise LoraGraftError(
            "LG-BASE-004",
            f"This base model is {kind}, which is not supported.",
            where=f"U-Net: context width {cross.shape[1]}, {sd['conv_in.weight'].shape[1]} input channels",
            why="this release trains SD1.x text-to-image models.",
            fix="load an SD1.x checkpoint",
        )
    return {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": tuple(
            sd[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": _count(sd, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": cross.shape[1],
        "attention_head_dim": NUM_HEADS,
        "use_linear_projection": _first(sd, "proj_in.weight").ndim == 2,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
    }


def vae_config(sd: Tensors) -> dict[str, Any]:
    """Read the VAE's shape from its decoder's weights: the decoder has a block at every level."""
    levels = _count(sd, r"decoder\.up_blocks\.(\d+)\.")
    return {
        "block_out_channels": tuple(
            sd[f"decoder.up_blocks.{levels - 1 - i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": _count(sd, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "latent_channels": sd["post_quant_conv.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "scaling_factor": SCALING_FACTOR,
    }


def text_config(sd: Tensors) -> dict[str, Any]:
    """Read the text encoder's shape from its weights."""
    vocabulary, hidden = sd["text_model.embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": sd["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(sd, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, hidden // TEXT_HEAD_DIM),
        "max_position_embeddings": sd["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _text_body(text: nn.Module) -> Any:
    """Return the module that holds embeddings, encoder and final_layer_norm (transformers 4 and 5)."""
    return getattr(text, "text_model", text)


def block_of(path: str) -> int | None:
    """Return the index of the U-Net's block that a module lies in; None outside of them.

    Counted as in the reference: 0 is the first convolution, which it does not train; three to a level, of
    which the third is the change of size; 12 is the middle.
    """
    if path.startswith("mid_block."):
        return SD1.down
    found = IN_BLOCK.match(path)
    if found is None:
        return None
    third = found[3] in ("downsamplers", "upsamplers")
    index = 3 * int(found[2]) + (2 if third else int(found[4]))
    return 1 + index if found[1] == "down" else SD1.down + SD1.mid + index


def _assign(module: nn.Module, sd: Tensors, what: str) -> None:
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    faults = {
        "missing": [k for k in shapes if k not in sd],
        "unknown": [k for k in sd if k not in shapes],
        "of another shape": [k for k, v in sd.items() if k in shapes and v.shape != shapes[k]],
    }
    if any(faults.values()):
        raise _unfit(what, "; ".join(f"{k}: {listed(v, limit=3)}" for k, v in faults.items() if v))
    module.load_state_dict(dict(sd), assign=True)


def _built(what: str, build: Callable[[], Built]) -> Built:
    """Call ``build``; weights that tell no shape, or an impossible one, raise LG-BASE-003."""
    try:
        return build()
    except LoraGraftError:
        raise
    except KeyError as error:
        raise _unfit(what, f"missing: {error.args[0]}") from error
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _unfit(what, f"shapes that make no {what}: {error}") from error


def _unfit(what: str, where: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-BASE-003",
        f"The {what}'s weights are not complete, or not those of SD1.x.",
        where=where,
        why="a module would keep random weights.",
        fix="use a complete SD1.x checkpoint (U-Net, VAE and text encoder)",
    )


def _first(sd: Tensors, ending: str) -> torch.Tensor:
    """Return the first tensor whose name ends so; KeyError if there is none."""
    for name, tensor in sd.items():
        if name.endswith(ending):
            return tensor
    raise KeyError(ending)


def _count(sd: Tensors, pattern: str) -> int:
    return 1 + max((int(m[1]) for k in sd if (m := re.match(pattern, k))), default=-1)
