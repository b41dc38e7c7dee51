"""Large buffers whose first use does not cost more than the arithmetic in them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from synchromesh.kernels.pages import pages

HUGE_FROM = 4 * 2**20  # bytes; smaller buffers are torch's
ALIGNED_TO = 64


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialised CPU memory; where it is large, on huge pages that were used before if there are any.

    Fresh memory costs one page fault per 4 KiB when it is first written: for the weight gradients of many small
    experts more than the matrix products. torch asks for pages of 2 MiB only if the user's environment says so, and
    gives large memory back to the kernel at once. The memory is the tensor's own in either case.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < HUGE_FROM:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(pages().take(nbytes)).view(dtype).view(*shape)


def room_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return room laid out as a tensor is: contiguous, or with its last two dims swapped; in another dtype if asked."""
    dtype = tensor.dtype if dtype is None else dtype
    if tensor.is_contiguous() or not tensor.mT.is_contiguous():
        return room(tensor.shape, dtype)
    return room(tensor.mT.shape, dtype).mT


def scratch(num_rows: int, *parts: tuple[int, torch.dtype]) -> list[Tensor]:
    """Return matrices of `num_rows` rows, of the given widths and dtypes, out of one piece of memory."""
    # Each size is rounded up, so that every piece begins on a cache line.
    sizes = [-(-num_rows * width * dtype.itemsize // ALIGNED_TO) * ALIGNED_TO for width, dtype in parts]
    pieces = room((sum(sizes),), torch.uint8).split(sizes)
    return [
        piece[: num_rows * width * dtype.itemsize].view(dtype).view(num_rows, width)
        for piece, (width, dtype) in zip(pieces, parts, strict=True)
    ]
