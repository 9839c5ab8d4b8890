"""Qwen's language models, 2.5-VL's and 3, as text encoders, with transformers' classes.

A caption is put where a user speaks in a chat; what is left of the chat before the model would answer is
encoded. Text flows one way in these models: no place sees what lies behind it, so padding behind a caption
changes nothing before it and needs no mask. Of 2.5-VL the part that sees images is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ...errors import LoraGraftError
from ..base import Reading, Room, Tensors, Texts
from ..modules.building import assign, built, count
from ..sources.versions import newer
from ..sources.weights import Renamed

HEAD_DIM = 128  # of Qwen2.5; Qwen3's weights tell theirs
ROPE_BASE, EPS = 1_000_000.0, 1e-6
BEGIN, END = "<|im_start|>", "<|im_end|>"
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # of files of the whole model
UNUSED = ("visual.", "model.visual.", "lm_head.")


@dataclass(frozen=True)
class Chat:
    """How a family has captions read.

    ``before`` and ``after`` stand around the caption. The denoiser does not see ``before`` if it is
    ``hidden``. ``layer`` is the layer whose states it sees, counted from the end; -1 are the last one's,
    normalised. ``length`` is the usual number of places that it sees, ``longest`` the greatest; ``padding``
    as in `Room`.
    """

    before: str
    after: str
    hidden: bool
    layer: int
    length: int = 512
    longest: int = 1024
    padding: int | None = 0

    def hides(self, tokenizer: Any) -> int:
        """Return how many tokens at the beginning the denoiser does not see."""
        return len(_ids(tokenizer, self.before)) if self.hidden else 0

    def places(self, reading: Reading) -> int:
        """Return how many places the denoiser sees."""
        return reading.t5_length or self.length


def qwen_weights(sd: Tensors) -> Tensors:
    """Return the language model's weights under the names of transformers' plain model (views)."""
    names = {}
    for name in sd:
        if not name.startswith(UNUSED):
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            names[name.removeprefix(prefix)] = name
    return Renamed(sd, names)


def qwen_config(sd: Tensors) -> dict[str, Any]:
    """Read the model's shape from its weights; KeyError where they are not those of a Qwen."""
    vocabulary, hidden = sd["embed_tokens.weight"].shape
    layer = "layers.0.self_attn."
    norm = f"{layer}q_norm.weight"
    head = sd[norm].shape[0] if norm in sd else HEAD_DIM
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": sd["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count(sd, r"layers\.(\d+)\."),
        "num_attention_heads": sd[f"{layer}q_proj.weight"].shape[0] // head,
        "num_key_value_heads": sd[f"{layer}k_proj.weight"].shape[0] // head,
        "head_dim": head,
        "rope_theta": ROPE_BASE,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,  # there is no head to tie
    }


def load_qwen(sd: Tensors, tokenizer: Any, family: str) -> nn.Module:
    """Build the model on its weights, shared; raises LG-BASE-003, -006, and -010 for an old transformers."""
    third = any(name.endswith("self_attn.q_norm.weight") for name in sd)
    name, since = ("Qwen3", "4.51") if third else ("Qwen2", "4.50.3")
    config_class = newer("transformers", f"{name}Config", family=family, since=since)
    model_class = newer("transformers", f"{name}Model", family=family, since=since)
    model: Any = built(
        "text encoder", family, lambda: cast(nn.Module, model_class(config_class(**qwen_config(sd))))
    )
    assign(model, sd, "text encoder", family)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # its buffers lie in no file
    _check_tokenizer(tokenizer, model.embed_tokens.num_embeddings)
    return cast(nn.Module, model.train(False))


def chat_tokens(tokenizer: Any, captions: Sequence[str], reading: Reading, chat: Chat) -> Texts:
    """Return token ids (B, hidden + L) and 1 where one of the L places to see is no padding, both int64.

    What is too long is cut at its end, as the families' own pipelines do.
    """
    hides = chat.hides(tokenizer)
    total = hides + chat.places(reading)
    rows, masks = [], []
    for caption in captions:
        ids = _ids(tokenizer, chat.before + caption + chat.after)[:total]
        rows.append(ids + [0] * (total - len(ids)))
        masks.append([1] * (len(ids) - hides) + [0] * (total - len(ids)))
    return torch.tensor(rows), torch.tensor(masks)


def chat_room(tokenizer: Any, captions: Sequence[str], reading: Reading, chat: Chat) -> Room:
    """Return how many places captions take with what stands around them, as the denoiser sees it."""
    hides = chat.hides(tokenizer)
    lengths = [len(_ids(tokenizer, chat.before + c + chat.after)) - hides for c in captions]
    return Room(lengths, chat.places(reading), chat.longest, padding=chat.padding)


def long_enough(tokenizer: Any, captions: Sequence[str], reading: Reading, chat: Chat) -> Reading:
    """Return the reading with the places that the longest caption needs, and no more, up to the greatest."""
    room = chat_room(tokenizer, captions, reading, chat)
    return replace(reading, t5_length=min(room.up(max(room.lengths)), chat.longest))


def encode_chat(encoder: nn.Module, tokens: Texts, chat: Chat) -> Texts:
    """Return states (B, L, D), 0 where there is padding, and 1 where there is none (B, L), in their dtype."""
    ids, mask = tokens
    out: Any = encoder(input_ids=ids, output_hidden_states=chat.layer != -1, use_cache=False)
    states = out.last_hidden_state if chat.layer == -1 else out.hidden_states[chat.layer]
    states = states[:, ids.shape[1] - mask.shape[1] :]
    seen = mask.bool()
    return states.masked_fill(~seen[..., None], 0), seen.to(states.dtype)


def chat_shapes(encoder: nn.Module, reading: Reading, chat: Chat) -> list[tuple[int, ...]]:
    """Return the shapes of `encode_chat`'s tensors without the batch."""
    length = chat.places(reading)
    return [(length, cast(Any, encoder).config.hidden_size), (length,)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raise LG-BASE-006 for more entries than embeddings, or marks of a chat that are no token each."""
    fault = None
    if len(tokenizer) > rows:  # the embeddings are filled up to a round number
        fault = f"The tokenizer has {len(tokenizer)} entries, the text encoder {rows}."
    elif any(len(_ids(tokenizer, mark)) != 1 for mark in (BEGIN, END)):
        fault = f"The tokenizer does not know {BEGIN} and {END}."
    if fault is not None:
        raise LoraGraftError(
            "LG-BASE-006",
            fault,
            where="tokenizer",
            why="captions would be read as other words than the base model learnt.",
            fix="name the tokenizer folder that belongs to this base model",
        )
