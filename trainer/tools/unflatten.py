"""kohya's module names with underscores, back into dotted paths.

kohya writes every dot of a path as an underscore. Which underscores were dots follows from the words that
hold one themselves: these are listed, all others are dots.
"""

from __future__ import annotations

import re

WORDS = (
    # diffusers' U-Net
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv_in", "conv_out", "time_embedding"),
    *("add_embedding", "linear_1", "linear_2"),
    # LDM's U-Net
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers"),
    *("skip_connection", "time_embed", "label_emb"),
    # Flux as its authors name it
    *("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod"),
    *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "in_layer", "out_layer", "final_layer"),
    "adaLN_modulation",
    # SD3 as its authors name it
    *("joint_blocks", "context_block", "x_block"),
    *("context_embedder", "x_embedder", "y_embedder", "t_embedder"),
    # CLIP and T5
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "wi_0", "wi_1", "text_projection"),
)
WORD = re.compile("|".join(sorted(WORDS, key=len, reverse=True)) + "|[^_]+")


def unflatten(name: str) -> str:
    """Return the dotted path of a name such as down_blocks_0_attentions_0_proj_in; no prefix in it."""
    parts: list[str] = []
    at = 0
    while at < len(name):
        match = WORD.match(name, at)
        if match is None:  # an underscore more: no word begins with one
            return name
        end = match.end()
        if end < len(name) and name[end] != "_":  # a listed word that only begins a longer one
            match = re.compile("[^_]+").match(name, at)
            assert match is not None
            end = match.end()
        parts.append(name[at:end])
        at = end + 1
    return ".".join(parts)


def flatten(path: str) -> str:
    """Return a dotted path as kohya writes it."""
    return path.replace(".", "_")
