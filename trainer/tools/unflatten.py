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
    "conv_norm_out",
    *("add_embedding", "linear_1", "linear_2"),
    # LDM's U-Net
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers"),
    *("skip_connection", "time_embed", "label_emb"),
    # Flux as its authors name it
    *("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod"),
    *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "in_layer", "out_layer", "final_layer"),
    "adaLN_modulation",
    # Chroma and FLUX.2 beside these
    *("distilled_guidance_layer", "in_proj", "double_stream_modulation_img", "double_stream_modulation_txt"),
    *("single_stream_modulation", "query_norm", "key_norm"),
    # SD3 as its authors name it
    *("joint_blocks", "context_block", "x_block", "ln_q", "ln_k"),
    *("context_embedder", "x_embedder", "y_embedder", "t_embedder"),
    # Lumina 2 and Z-Image
    *("noise_refiner", "context_refiner", "cap_embedder", "feed_forward", "q_norm", "k_norm"),
    *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
    # Qwen-Image
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_q", "norm_k", "norm_added_q"),
    *("norm_added_k", "txt_norm", "norm_out", "time_text_embed", "timestep_embedder"),
    # CLIP, T5 and language models
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "wi_0", "wi_1", "text_projection"),
    *("o_proj", "gate_proj", "up_proj", "down_proj"),
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
