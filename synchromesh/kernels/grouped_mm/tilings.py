"""Tilings: the block sizes of the matrix-product kernels for each kind of GPU.

Chosen from each architecture's registers, shared memory and matrix units; that they compile without spills is tested
for every target. Where tilings were measured on an architecture (tuned.json), those take their place.
"""

from __future__ import annotations

import torch

from synchromesh.kernels.grouped_mm.blocks import Tilings
from synchromesh.kernels.grouped_mm.choice import architecture_of
from synchromesh.kernels.grouped_mm.tuned import shipped
from synchromesh.kernels.tiles import Tiling

GROUP = 8  # tiles of rows that run at about the same time, so that they share weights in the L2 cache

_HOPPER = Tilings(
    Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(128, 64, 64, 8, 3), Tiling(128, 256, 64, 8, 3)
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
    measured = shipped().tilings(architecture_of(device), dtype.itemsize)
    if measured is not None:
        return measured.lowered(rows_per_expert)
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
