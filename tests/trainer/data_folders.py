"""Small image folders for the data tests, and a check that a refusal says all it must."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft.trainer.errors import LoraGraftError

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden(name: str) -> Any:
    """Return one of the reference's outputs."""
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def picture(size: tuple[int, int] = (64, 64), shade: int = 0, mode: str = "RGB") -> Image.Image:
    """Return a picture (width, height) in which every pixel tells where it is."""
    width, height = size
    across = Image.linear_gradient("L").rotate(90).resize(size)
    down = Image.linear_gradient("L").resize(size)
    flat = Image.new("L", (width, height), shade)
    return Image.merge("RGB", (across, down, flat)).convert(mode)


def fill(root: Path, files: Mapping[str, tuple[int, int] | str | bytes]) -> Path:
    """Write files below ``root``: a size becomes an image of its own shade, text and bytes go as they are."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            picture(content, shade=number % 256).save(path)
        elif isinstance(content, str):
            path.write_text(content, "utf-8", newline="")
        else:
            path.write_bytes(content)
    return root


class Refusal:
    """Expect a LoraGraftError with this code, and check that it is fit to be shown."""

    def __init__(self, code: str, *mentions: str) -> None:
        self.code, self.mentions = code, mentions
        self.raises: AbstractContextManager[pytest.ExceptionInfo[LoraGraftError]] = pytest.raises(
            LoraGraftError
        )

    def __enter__(self) -> pytest.ExceptionInfo[LoraGraftError]:
        self.info = self.raises.__enter__()
        return self.info

    def __exit__(self, *args: Any) -> bool:
        handled = self.raises.__exit__(*args)
        if not handled:
            return False
        error = self.info.value
        lines = str(error).split("\n")
        assert error.code == self.code, error
        assert len(lines) == 4, error
        assert len(f"{error.code}  {error.what}") <= 120
        assert all([error.what, error.where, error.why, error.fix])
        for text in self.mentions:
            assert text in str(error), (text, str(error))
        return True
