"""Tilings: the block sizes of the matrix-product kernels for each kind of GPU.

Chosen from each architecture's shared memory and matrix units; that they compile without spills is tested for every
target. None of them is tuned by measurement yet.
"""

from __future__ import annotations

import torch

from synchromesh.kernels.tiles import Tiling

GROUP = 8  # tiles of rows that run beside one another, so that they share weights in the L2 cache
FEW = 16  # rows of the smallest tile: less than that, tl.dot does not multiply

# For 16-bit numbers, by architecture: the product of rows, of rows with two matrices at once, and of weights.
NARROW = {
    "sm_80": (Tiling(128, 128, 32, 8, 3), Tiling(128, 64, 32, 8, 3), Tiling(128, 128, 32, 8, 3)),
    "sm_90": (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(128, 256, 64, 8, 3)),
    "sm_100": (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(128, 256, 64, 8, 3)),
    "sm_120": (Tiling(128, 128, 32, 8, 3), Tiling(128, 64, 32, 8, 3), Tiling(128, 128, 32, 8, 3)),
    "gfx942": (Tiling(128, 128, 32, 4, 2), Tiling(128, 64, 32, 4, 2), Tiling(128, 128, 32, 4, 2)),
}
WIDE = Tiling(64, 64, 16, 4, 2)  # float32, everywhere
INTERPRETED = Tiling(16, 32, 16, 4, 1)
ELSEWHERE = "sm_80"


def architecture(device: torch.device) -> str:
    """Return the newest architecture in the table that is not newer than the device's."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(name.removeprefix("sm_")) for name in NARROW if name.startswith("sm_")]
    older = [number for number in known if number <= 10 * major + minor]
    return f"sm_{max(older)}" if older else ELSEWHERE


def product_tiling(
    dtype: torch.dtype, device: torch.device, *, rows_per_expert: int, pair: bool = False
) -> Tiling:
    """Return the tiling of a product of rows; pair: with two matrices at once. Few rows take low tiles."""
    if device.type != "cuda":
        return INTERPRETED
    full = WIDE if dtype == torch.float32 else NARROW[architecture(device)][1 if pair else 0]
    return lowered(full, rows_per_expert)


def lowered(full: Tiling, rows_per_expert: int) -> Tiling:
    """Return a tiling of fewer rows where an expert has few."""
    rows = full.rows
    while rows > FEW and rows >= 2 * max(1, rows_per_expert):
        rows //= 2
    warps = full.warps if rows >= 64 else 4
    return full if rows == full.rows else Tiling(rows, min(full.cols, 128), full.depth, warps, full.stages)


def weights_tiling(dtype: torch.dtype, device: torch.device) -> Tiling:
    """Return the tiling of a gradient of weights."""
    if device.type != "cuda":
        return Tiling(16, 32, 16, 4, 1)
    return WIDE if dtype == torch.float32 else NARROW[architecture(device)][2]
