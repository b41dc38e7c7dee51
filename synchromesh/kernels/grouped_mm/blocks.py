"""Tilings: the block sizes of one dtype on one kind of GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from synchromesh.kernels.tiles import Tiling

LEAST_ROWS = 16  # of a tile: tl.dot multiplies no fewer


@dataclass(frozen=True)
class Tilings:
    """The tilings of one dtype on one kind of GPU; the first three cut rows alike, so that one map of tiles serves all.

    Attributes:
        product: of rows times the matrix of their expert.
        opening: of the first product, with the activation after it; half as many columns with a gate.
        closing: of the backward from the output to the pre-activations.
        weights: of the gradient of a matrix.
    """

    product: Tiling
    opening: Tiling
    closing: Tiling
    weights: Tiling

    def lowered(self, rows_per_expert: int) -> Tilings:
        """Return tilings whose tiles have fewer rows where an expert has few: the rest of a tile would be wasted."""
        rows = self.product.rows
        while rows > LEAST_ROWS and rows >= 2 * max(1, rows_per_expert):
            rows //= 2
        if rows == self.product.rows:
            return self
        product, opening, closing = (_lowered(one, rows) for one in (self.product, self.opening, self.closing))
        return Tilings(product, opening, closing, self.weights)


def _lowered(tiling: Tiling, rows: int) -> Tiling:
    return dataclasses.replace(tiling, rows=rows, cols=min(tiling.cols, 128), warps=8 if rows == 64 else 4)
