"""The example workflows that do what well-known guides describe, one a guide, on the embedded samples.

Learning rates and sizes are those of the tiny base; the notes give the guides' own numbers for SD1.x. In the
notes, sections are called what the guides call them, in their languages.
"""

from __future__ import annotations

from collections.abc import Callable

from loragraft_tests.comfyui.guides.character import character_workflow
from loragraft_tests.comfyui.guides.dreambooth import dreambooth_workflow
from loragraft_tests.comfyui.guides.families import sd2_workflow, sd35_workflow, sdxl_workflow
from loragraft_tests.comfyui.guides.flux import flux_workflow
from loragraft_tests.comfyui.guides.kohya import kohya_workflow
from loragraft_tests.comfyui.guides.photos import photos_workflow
from loragraft_tests.comfyui.guides.style import style_workflow
from loragraft_tests.comfyui.sheet import Info, Workflow

PHOTOS = "LoraGraft Photos and Videos"
CHARACTER = "LoraGraft Character with LyCORIS"
DREAMBOOTH = "LoraGraft DreamBooth"
STYLE = "LoraGraft Style with LoHa"
KOHYA = "LoraGraft Kohya Settings"

SD2 = "LoraGraft SD2.x"
SDXL = "LoraGraft SDXL"
SD35 = "LoraGraft SD3.5"
FLUX = "LoraGraft Flux.1"

GUIDES: dict[str, Callable[[Info], Workflow]] = {
    PHOTOS: photos_workflow,
    CHARACTER: character_workflow,
    DREAMBOOTH: dreambooth_workflow,
    STYLE: style_workflow,
    KOHYA: kohya_workflow,
}
# One a family, for models of the reader's own.
FAMILIES: dict[str, Callable[[Info], Workflow]] = {
    SD2: sd2_workflow,
    SDXL: sdxl_workflow,
    SD35: sd35_workflow,
    FLUX: flux_workflow,
}
