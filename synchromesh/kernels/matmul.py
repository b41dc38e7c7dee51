"""One product of two matrices on a CPU, by the faster of two libraries.

In float32 torch multiplies by MKL, which on processors of AMD computes with vectors of 256 bits: all that Zen 4 has,
half of what Zen 5 has. oneDNN, which torch takes for bfloat16 and convolutions, uses them whole. Which one is faster
for how many rows is measured (`product_costs`).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.product_costs import costs_here
from synchromesh.torch_private import onednn_linear

# oneDNN compiles a kernel for each number of rows, which takes as long as a product; as loads differ from step to step,
# it is given whole multiples.
STEP = 32

# Of a result, and of rows that are turned, at a time: both are in memory of oneDNN's own, and better in a cache.
PART_BYTES = 2**20


def has_onednn(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN can multiply this dtype, and torch by itself does not."""
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def prefers_onednn(rows: int, numbers: int, dtype: torch.dtype) -> bool:
    """Tell whether so many rows, always as many, are multiplied by a matrix of so many numbers faster by oneDNN."""
    return _prefers(dtype, rows, 0, numbers)


def turned_by_onednn(a: Float[Tensor, "R I"], b: Float[Tensor, "R O"]) -> Float[Tensor, "I O"]:
    """Return a^T b, a sum over rows; the smaller side is put where oneDNN makes a turned copy."""
    (rows, left), right = a.shape, b.shape[1]
    if rows * right + left * right < rows * left:
        return onednn_linear(b.t(), a.t(), None, gelu=False).t()
    return onednn_linear(a.t(), b.t(), None, gelu=False)


def matmul(a: Float[Tensor, "R I"], b: Float[Tensor, "I O"], out: Float[Tensor, "R O"], bias: Tensor | None) -> None:
    """Write a b, plus a bias [O], into out."""
    rows = _padded(a, b.numel())
    if rows is not None:
        for to, own in zip(_parts(out), _parts(rows, like=out), strict=True):
            to.copy_(onednn_linear(own, b.t(), bias, gelu=False)[: len(to)])
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def matmul_anywhere(
    a: Float[Tensor, "R I"], b: Float[Tensor, "I O"], out: Float[Tensor, "R O"], bias: Tensor | None
) -> Float[Tensor, "R O"]:
    """Return a b, plus a bias [O]: in out, or in oneDNN's own memory, which saves a copy and keeps products large."""
    rows = _padded(a, b.numel())
    if rows is None:
        matmul(a, b, out, bias)
        return out
    return onednn_linear(rows, b.t(), bias, gelu=False)[: len(a)]


def add_matmul(a: Float[Tensor, "R I"], b: Float[Tensor, "I O"], out: Float[Tensor, "R O"]) -> None:
    """Add a b to out."""
    rows = _padded(a, b.numel())
    if rows is None:
        out.addmm_(a, b)
        return
    for to, own in zip(_parts(out), _parts(rows, like=out), strict=True):
        to += onednn_linear(own, b.t(), None, gelu=False)[: len(to)]


def matmul_turned(a: Float[Tensor, "R I"], b: Float[Tensor, "R O"], out: Float[Tensor, "I O"]) -> None:
    """Write a^T b, a sum over rows, into out."""
    most = len(a) - len(a) % STEP
    if not _prefers(a.dtype, most, len(a) - most, out.numel()):
        torch.mm(a.t(), b, out=out)
        return
    for columns, to in zip(_parts(a.t(), like=out), _parts(out), strict=True):
        _add_turned(columns.t()[:most], b[:most], to)
    if most < len(a):
        out.addmm_(a[most:].t(), b[most:])


def _add_turned(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a^T b into out, some rows at a time: one side is copied turned."""
    narrow = min(a, b, key=lambda side: side.shape[1])
    lengths = [len(part) for part in _parts(narrow)]
    for number, (left, right) in enumerate(zip(a.split(lengths), b.split(lengths), strict=True)):
        product = turned_by_onednn(left, right)
        out.add_(product) if number else out.copy_(product)


def _parts(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the rows in parts, of each of which those of the output (like) take so much memory."""
    width = rows.shape[1] if like is None else like.shape[1]
    most = max(1, PART_BYTES // max(1, width * rows.element_size() * STEP)) * STEP
    return rows.split(most) if len(rows) > most else (rows,)


def _padded(a: Tensor, numbers: int) -> Tensor | None:
    """Return a and the rows that its memory has behind it, a multiple of STEP, if oneDNN is to multiply them.

    What is behind is anything, and so are its products. None where the memory ends, too: torch multiplies then.
    """
    rows = -(-len(a) // STEP) * STEP
    if not _prefers(a.dtype, rows, 0, numbers, instead=len(a)) or not a.is_contiguous():
        return None
    wanted = a.storage_offset() + rows * a.shape[1]
    if wanted * a.element_size() > a.untyped_storage().nbytes():
        return None
    return a.as_strided((rows, a.shape[1]), a.stride())


def _prefers(dtype: torch.dtype, rows: int, rest: int, numbers: int, instead: int | None = None) -> bool:
    """Tell whether so many rows by oneDNN and a rest by torch take less time than all, or others instead, by torch."""
    if not has_onednn(dtype):
        return False
    return _is_faster(torch.get_num_threads(), rows, rest, rows + rest if instead is None else instead, numbers)


@functools.lru_cache(2**14)
def _is_faster(threads: int, rows: int, rest: int, instead: int, numbers: int) -> bool:
    costs = costs_here(threads, torch.float32)
    return costs.prefers_onednn(rows=rows, rest=rest, instead=instead, numbers=numbers)
