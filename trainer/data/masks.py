"""Find every image's mask: a picture of the same name in a folder of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .folders import Found, split_suffix


def split_masks(files: Sequence[Found], folder: str) -> tuple[list[Found], list[Found]]:
    """Split files into those outside and those inside the root's subfolder ``folder``, any case."""
    start = f"{folder.strip('/').casefold()}/"
    inside = [file.name.casefold().startswith(start) for file in files]
    return (
        [file for file, masked in zip(files, inside, strict=True) if not masked],
        [
            Found(file.name[len(start) :], file.place)
            for file, masked in zip(files, inside, strict=True)
            if masked
        ],
    )


def pair_masks(images: Sequence[str], masks: Sequence[Found]) -> tuple[dict[str, Found], list[Found]]:
    """Return each image's mask and the masks without an image; names are relative to their own roots.

    A mask has its image's path with any suffix (``10_cat/a.png`` for ``10_cat/a.jpg``), or lies flat under
    the image's bare name where only one image and one mask have that name.
    """
    by_path = _table(masks, whole=True)
    by_name = _table(masks, whole=False)
    bare = [_key(image, whole=False) for image in images]
    times = Counter(bare)
    pairs: dict[str, Found] = {}
    for image, name in zip(images, bare, strict=True):
        found = by_path.get(_key(image, whole=True), [])
        if not found and times[name] == 1 and len(by_name.get(name, [])) == 1:
            found = by_name[name]
        if found:
            pairs[image] = found[0]
    used = {mask.name for mask in pairs.values()}
    return pairs, [mask for mask in masks if mask.name not in used]


def _table(masks: Sequence[Found], *, whole: bool) -> dict[str, list[Found]]:
    table: dict[str, list[Found]] = {}
    for mask in masks:
        table.setdefault(_key(mask.name, whole=whole), []).append(mask)
    return table


def _key(name: str, *, whole: bool) -> str:
    path = split_suffix(name)[0]
    return (path if whole else path.rpartition("/")[2]).casefold()
