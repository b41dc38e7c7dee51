"""Tilings: the block sizes of one dtype on one kind of GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from synchromesh.kernels.tiles import Tiling

FEW_STEPS = 8  # in which a sum over the rows of an expert is done: its first and last loads take most of its time
LEAST_ROWS = 16  # of a tile: tl.dot multiplies no fewer


@dataclass(frozen=True)
class Tilings:
    """The tilings of one dtype on one kind of GPU; the first three cut rows alike, so that one map of tiles serves all.

    Attributes:
        product: of rows times the matrix of their expert.
        opening: of the first product, with the activation after it; half as many columns with a gate.
        closing: of the backward from the output to the pre-activations.
        weights: of the gradient of a matrix.
        few_stages: of the latter, where it sums over few rows: all their loads start at once; 0 for the same.
    """

    product: Tiling
    opening: Tiling
    closing: Tiling
    weights: Tiling
    few_stages: int = field(default=0, kw_only=True)

    def lowered(self, rows_per_expert: int) -> Tilings:
        """Return tilings whose tiles have fewer rows where an expert has few: the rest of a tile would be wasted."""
        if self.few_stages and rows_per_expert <= FEW_STEPS * self.weights.depth:
            weights = dataclasses.replace(self.weights, stages=self.few_stages)
            return dataclasses.replace(self, weights=weights, few_stages=0).lowered(rows_per_expert)
        rows = self.product.rows
        while rows > LEAST_ROWS and rows >= 2 * max(1, rows_per_expert):
            rows //= 2
        if rows == self.product.rows:
            return self
        product, opening, closing = (_lowered(one, rows) for one in (self.product, self.opening, self.closing))
        return Tilings(product, opening, closing, self.weights, few_stages=self.few_stages)


def _lowered(tiling: Tiling, rows: int) -> Tiling:
    return dataclasses.replace(tiling, rows=rows, cols=min(tiling.cols, 128), warps=8 if rows == 64 else 4)
