"""A folder as it comes from downloads: every format, wrong suffixes, twins, masks, captions of many kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

FILES = Path(__file__).resolve().parents[1] / "trainer" / "files"


def picture(size: tuple[int, int], shade: int) -> Image.Image:
    across = Image.linear_gradient("L").rotate(90).resize(size)
    down = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (across, down, Image.new("L", size, shade)))


def raw_folder(folder: Path) -> Path:
    """Write a folder as it comes from downloads: every format, wrong suffixes, twins, masks, captions."""
    cat, dog = folder / "3_a cat", folder / "dogs"
    cat.mkdir(parents=True)
    dog.mkdir()
    formats = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
    for number, format in enumerate(formats):
        picture((96, 80 + 8 * number), 30 * number).save(cat / f"{number} photo.{format.lower()}", format)
    picture((120, 90), 5).save(cat / "wrong.png", "JPEG")
    picture((130, 90), 15).save(cat / "download.image", "WEBP")
    picture((100, 140), 25).convert("CMYK").save(cat / "print.jpg")
    (cat / "phone.heic").write_bytes((FILES / "turned.heic").read_bytes())
    picture((110, 90), 35).save(dog / "\u72d7 \u00e9\U0001f415.png")
    picture((90, 110), 45).save(dog / f"{'long ' * 38}.png")
    twin = Image.effect_mandelbrot((200, 160), (-2, -1.2, 1, 1.2), 100).convert("RGB")
    twin.save(dog / "twin.png")
    twin.save(dog / "twin.bmp")
    twin.resize((100, 80)).save(dog / "small twin.jpg")
    (cat / "0 photo.txt").write_text("by text", "utf-8")
    (cat / "1 photo.jpeg.json").write_text(json.dumps({"tags": ["by", "sidecar"]}), "utf-8")
    (folder / "captions.json").write_text(json.dumps({"dogs/twin": "by list"}), "utf-8")
    masks = folder / "masks" / "3_a cat"
    masks.mkdir(parents=True)
    Image.linear_gradient("L").save(masks / "0 photo.png")
    return folder


def cached(entry: dict[str, Any]) -> set[str]:
    return set(next(d["nodes"] for kind, d in entry["status"]["messages"] if kind == "execution_cached"))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {f.relative_to(folder).as_posix(): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
