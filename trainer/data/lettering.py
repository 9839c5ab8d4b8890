"""Letters on pictures: Pillow's own font, or a system's for scripts that it lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from PIL import ImageFont

FIRST_BEYOND_OWN_FONT = 0x250  # Pillow's own font draws Latin letters only
SYSTEM_FONTS = (  # Chinese, Japanese, Korean and Cyrillic: Linux, Windows, macOS
    "NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "meiryo.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "DejaVuSans.ttf",
    "arial.ttf",
)


def font_for(size: int, texts: Iterable[str] = ()) -> ImageFont.FreeTypeFont:
    """Return a font of this size that can draw the texts, as far as the system has one."""
    if any(ord(letter) >= FIRST_BEYOND_OWN_FONT for text in texts for letter in text):
        for name in SYSTEM_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # the kind that load_default gives for a size
    return font


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text without what cannot be drawn, its middle left out where it is wider than ``width``."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    shown, keep = clean, len(clean)
    while keep > 2 and font.getlength(shown) > width:
        keep -= 1
        shown = f"{clean[: (keep + 1) // 2]}...{clean[len(clean) - keep // 2 :]}"
    return shown
