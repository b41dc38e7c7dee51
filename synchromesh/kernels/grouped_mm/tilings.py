"""Tilings: the block sizes of the matrix-product kernels for each kind of GPU.

Chosen from each architecture's registers, shared memory and matrix units; that they compile without spills is tested
for every target. None of them is tuned by measurement yet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from synchromesh.kernels.tiles import Tiling

GROUP = 8  # tiles of rows that run at about the same time, so that they share weights in the L2 cache
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


_HOPPER = Tilings(
    Tiling(128, 256, 64, 8, 3),
    Tiling(128, 256, 64, 8, 3),
    Tiling(128, 128, 64, 8, 3),
    Tiling(128, 256, 64, 8, 3),
    few_stages=5,
)
_AMPERE = Tilings(
    Tiling(128, 128, 32, 8, 3), Tiling(128, 128, 32, 8, 3), Tiling(128, 64, 32, 8, 3), Tiling(128, 128, 32, 8, 3)
)
_CDNA3 = Tilings(
    Tiling(128, 128, 32, 4, 2), Tiling(128, 128, 32, 4, 2), Tiling(128, 64, 32, 4, 2), Tiling(128, 128, 32, 4, 2)
)
OF_16_BITS = {"sm_80": _AMPERE, "sm_90": _HOPPER, "sm_100": _HOPPER, "sm_120": _AMPERE, "gfx942": _CDNA3}
_EIGHT_HOPPER = Tilings(*[Tiling(128, 128, 128, 8, 3)] * 4)
_EIGHT_ADA = Tilings(*[Tiling(128, 128, 64, 8, 3)] * 4)
OF_8_BITS = {"sm_80": _EIGHT_ADA, "sm_90": _EIGHT_HOPPER, "sm_100": _EIGHT_HOPPER, "sm_120": _EIGHT_ADA}
OF_32_BITS = Tilings(*[Tiling(64, 64, 16, 8, 2)] * 4)
INTERPRETED = Tilings(*[Tiling(32, 32, 32, 4, 1)] * 4)  # on a CPU, block by block


def tilings_of(dtype: torch.dtype, device: torch.device, *, rows_per_expert: int) -> Tilings:
    """Return the block sizes of the product kernels for a dtype on a device."""
    if device.type != "cuda":
        return INTERPRETED
    return tilings_for(_architecture(device), dtype, rows_per_expert)


def tilings_for(architecture: str, dtype: torch.dtype, rows_per_expert: int) -> Tilings:
    """Return the tilings of an architecture in OF_16_BITS; of those for 8-bit numbers only `product` is used."""
    table = OF_8_BITS if dtype.itemsize == 1 else OF_16_BITS
    return (OF_32_BITS if dtype == torch.float32 else table[architecture]).lowered(rows_per_expert)


def _architecture(device: torch.device) -> str:
    """Return the newest architecture in the table that is not newer than the device's, or the oldest."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(name.removeprefix("sm_")) for name in OF_16_BITS if name.startswith("sm_"))
    return f"sm_{max([number for number in known if number <= 10 * major + minor], default=known[0])}"
