"""Tensors made of pieces of other tensors: whole ones, slices of rows, or several stacked along the rows.

Single files, diffusers folders and hosts cut the same weights differently: query, key and value lie in
three tensors or in one; scale and shift are swapped. A recipe for each name says what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of the source's tensor ``name``, all by default; a view.

    ``transposed`` swaps the two dimensions of a matrix first.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    transposed: bool = False

    def of(self, source: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the piece, a view on the source's tensor; KeyError where the source has none."""
        tensor = source[self.name]
        tensor = tensor.T if self.transposed else tensor
        return tensor if self.start is None and self.stop is None else tensor[self.start : self.stop]


Recipe = str | Piece | Sequence[Piece]


@dataclass(frozen=True)
class Pieced(Mapping[str, torch.Tensor]):
    """Tensors under new names, made when asked for.

    A recipe of a name or of one piece is a view of ``source``; one of several pieces is a copy, stacked
    along the rows, made anew each time.
    """

    source: Mapping[str, torch.Tensor]
    recipes: Mapping[str, Recipe]

    def __getitem__(self, name: str) -> torch.Tensor:
        recipe = self.recipes[name]
        if isinstance(recipe, str):
            return self.source[recipe]
        if isinstance(recipe, Piece):
            return recipe.of(self.source)
        pieces = [piece.of(self.source) for piece in recipe]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)


def stacked(*names: str) -> tuple[Piece, ...]:
    """Return the recipe of whole tensors one below the other."""
    return tuple(Piece(name) for name in names)


def share(source: Mapping[str, torch.Tensor], name: str, index: int, count: int) -> Piece:
    """Return share ``index`` of a tensor whose rows are ``count`` equal shares, as of q, k and v."""
    rows = source[name].shape[0] // count
    return Piece(name, index * rows, (index + 1) * rows)


def swapped(source: Mapping[str, torch.Tensor], name: str) -> tuple[Piece, Piece]:
    """Return the recipe of a tensor whose halves change places, as scale and shift do; its own inverse."""
    return share(source, name, 1, 2), share(source, name, 0, 2)
