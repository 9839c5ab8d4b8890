"""Sets of modules of a U-Net with a CLIP text model that can be trained: kohya's, and LyCORIS' presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TRANSFORMERS = ("Transformer2DModel",)
RESNETS = ("ResnetBlock2D",)
SCALERS = ("Downsample2D", "Upsample2D")
TEXT = ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2", "CLIPMLP")
TIME = ("time_embedding.linear_1", "time_embedding.linear_2")
CONVOLUTIONS = ("conv_in", "conv_out")
IA3_INPUTS = ("ff.net.2", "mlp.fc2")  # the layers whose inputs (IA)^3 scales, not their outputs


@dataclass(frozen=True)
class Preset:
    """Classes whose insides are trained, modules named in full, and modules named by their endings.

    ``convolutions`` says whether kernels of more than one pixel are among them, ``norms`` whether
    normalisation layers are.
    """

    denoiser: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    convolutions: bool = False
    norms: bool = False


EVERYTHING = TRANSFORMERS + RESNETS + SCALERS
KOHYA = Preset(TRANSFORMERS, TEXT)
KOHYA_CONVOLUTIONS = Preset(EVERYTHING, TEXT, convolutions=True)
PRESETS: Mapping[str, Preset] = {
    "full": Preset(EVERYTHING, TEXT, CONVOLUTIONS + TIME, convolutions=True),
    "full-lin": Preset(TRANSFORMERS + RESNETS, TEXT, TIME),
    "attn-mlp": Preset(TRANSFORMERS, TEXT),
    "attn-only": Preset(("Attention",), TEXT[:3]),
    "unet-only": Preset(EVERYTHING, (), CONVOLUTIONS + TIME, convolutions=True),
    "unet-transformer-only": Preset(TRANSFORMERS),
    "unet-convblock-only": Preset(RESNETS + SCALERS, (), CONVOLUTIONS, convolutions=True),
    "everything": Preset(("UNet2DConditionModel",), TEXT, convolutions=True, norms=True),
    "ia3": Preset(endings=("to_k", "to_v", "k_proj", "v_proj", *IA3_INPUTS)),
}
