"""SD3's three text encoders as one conditioning: CLIP-L, CLIP-G and T5-XXL, of which any may be missing.

The penultimate states of both CLIPs lie side by side, filled up with zeros to T5's width, and T5's follow
them along the sequence; the CLIPs' pooled states modulate every block. What a missing encoder leaves is
what ComfyUI leaves, so that a LoRA is trained as it will be drawn: zeros beside the other CLIP and in the
pooled state, no places where both CLIPs or T5 are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F

from ...parts import Parts
from ..base import Reading, Room, Texts
from ..modules.building import unfit
from .clip_text import clip_room, clip_tokens, long_enough, text_body, text_width
from .clip_tokens import CHUNK
from .t5_text import encode_t5, t5_longest, t5_room, t5_tokens

CLIP_L, CLIP_G, T5 = "text_encoder", "text_encoder_2", "text_encoder_3"
T5_LENGTH = 256  # the reference trainer's
PADS = {CLIP_L: None, CLIP_G: 0}  # OpenCLIP pads with the token of "!", CLIP with its end token
PLACES = CHUNK + 2


def tokens_of(parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
    """Return ids (B, chunks, 77) for each CLIP and (B, L) for T5, of those that are there, in their order.

    With ``mask_padding`` T5's mask (B, L) follows, 0 where a place is padding.
    """
    found: list[torch.Tensor] = []
    for part, tokenizer in parts.tokenizers.items():
        if part == T5:
            ids, mask = t5_tokens(tokenizer, captions, reading.t5_length or T5_LENGTH)
            found += [ids, mask] if reading.mask_padding else [ids]
        else:
            found += clip_tokens(tokenizer, captions, reading, parts.words, pad=PADS[part])
    return tuple(found)


def room_of(parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
    """Return how long captions are for T5, beside which CLIP need not read them whole; without it for CLIP.

    The transformer sees T5's padding, and its number belongs to the model.
    """
    if T5 in parts.tokenizers:
        return t5_room(parts.tokenizers[T5], captions, reading.t5_length or T5_LENGTH)
    return clip_room(next(iter(parts.tokenizers.values())), captions, reading, parts.words)


def longer(parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
    """Return the reading with as many chunks for CLIP and tokens for T5 as the longest captions need."""
    for part, tokenizer in parts.tokenizers.items():
        if part == T5:
            length = max(reading.t5_length or T5_LENGTH, t5_longest(tokenizer, captions))
            reading = replace(reading, t5_length=length)
        else:
            reading = long_enough(tokenizer, captions, reading, parts.words)
    return reading


def conditioning(parts: Parts, tokens: Texts, reading: Reading) -> Texts:
    """Return the conditioning (B, L, W) and its pooled part (B, P) for what `tokens_of` returned."""
    width, pooled_width = context_widths(parts)
    given = dict(zip(parts.text_encoders, tokens, strict=False))
    clips = [
        _clip(parts.text_encoders[part], given[part], projected=part == CLIP_G)
        for part in (CLIP_L, CLIP_G)
        if part in given
    ]
    states: list[torch.Tensor] = []
    pooled = torch.zeros(len(tokens[0]), 0, device=tokens[0].device)
    before = 0
    if clips:
        side_by_side = torch.cat([hidden for hidden, _ in clips], dim=-1)
        pooled = torch.cat([each for _, each in clips], dim=-1)
        # CLIP-L comes first; where it is missing, it has the width that CLIP-G leaves of the pooled state.
        before = 0 if CLIP_L in given else pooled_width - pooled.shape[-1]
        states.append(_filled(side_by_side, before, width))
    if T5 in given:
        mask = tokens[-1] if reading.mask_padding else None
        states.append(encode_t5(parts.text_encoders[T5], given[T5], mask))
    return torch.cat(states, dim=1), _filled(pooled.to(states[0].dtype), before, pooled_width)


def num_places(parts: Parts, reading: Reading) -> int:
    """Return the length of the conditioning."""
    has_clip = CLIP_L in parts.text_encoders or CLIP_G in parts.text_encoders
    clip = reading.max_token_length // CHUNK * PLACES if has_clip else 0
    return clip + ((reading.t5_length or T5_LENGTH) if T5 in parts.text_encoders else 0)


def context_widths(parts: Parts) -> tuple[int, int]:
    """Return the widths of the conditioning and of its pooled part, as the denoiser wants them."""
    config = cast(Any, parts.denoiser).config
    return config.joint_attention_dim, config.pooled_projection_dim


def check_widths(parts: Parts, family: str) -> None:
    """Raise LG-BASE-003 for text encoders whose states do not fit the denoiser, or where there are none."""
    width, pooled_width = context_widths(parts)
    clips = {part: text_width(parts.text_encoders[part]) for part in PADS if part in parts.text_encoders}
    total = sum(clips.values())
    if not parts.text_encoders:
        raise unfit("text encoders", family, "CLIP-L, CLIP-G and T5 are all missing")
    if T5 in parts.text_encoders:
        t5_width = cast(Any, parts.text_encoders[T5]).config.d_model
        if t5_width != width:
            raise unfit("T5 text encoder", family, f"width {t5_width}, of which the denoiser takes {width}")
    if total > width or (total != pooled_width if len(clips) == len(PADS) else total >= pooled_width):
        found = " and ".join(map(str, clips.values()))
        raise unfit("CLIP text encoders", family, f"widths {found}, where the denoiser takes {pooled_width}")


def _clip(text: Any, ids: torch.Tensor, *, projected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last states but one (B, chunks * 77, D), not normalised, and the first chunk's pooled state.

    CLIP-L's pooled state is taken before its projection: what SD3 learnt (ComfyUI takes it so; in SD3's own
    files the projection is the identity).
    """
    batch, chunks, length = ids.shape
    out = text_body(text)(ids.flatten(0, 1), output_hidden_states=True)
    pooled = out.pooler_output.view(batch, chunks, -1)[:, 0]
    hidden = out.hidden_states[-2].reshape(batch, chunks * length, -1)
    return hidden, text.text_projection(pooled) if projected else pooled


def _filled(x: torch.Tensor, before: int, width: int) -> torch.Tensor:
    """Return x (..., D) with zeros before and behind it, (..., width)."""
    return F.pad(x, (before, width - before - x.shape[-1]))
