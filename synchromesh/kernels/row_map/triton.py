"""row_map on a GPU: rows, pairs, tokens and ends in one launch. No read on the host.

A pair's row is its place behind the rows of all earlier experts. Every program adds these up for its own pairs: a sum
over E numbers that lie in the cache, instead of a second launch that waits for the first.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.types import RowMap

BLOCK_PAIRS = 128  # of a program
MOST = 2**31 - 1  # rows: their numbers are int32 here
BLOCK_EXPERTS = 32  # that are compared with all pairs of a program at a time


def row_map(
    expert_ids: Int[Tensor, "T K"],
    places: Int[Tensor, "T K"],
    counts: Int[Tensor, " E"],
    *,
    num_rows: int,
    capacity: int | Int[Tensor, ""] | None,
) -> RowMap:
    """Compute the reference's map. Pairs without a place, or with an id outside of 0 .. E-1, are absent."""
    fixed, measured = (None, capacity) if isinstance(capacity, Tensor) else (capacity, None)
    rows, pairs, tokens, ends = _row_map(expert_ids, places, counts, num_rows, fixed, measured)
    return RowMap(rows, pairs, ends, capacity).with_tokens(tokens)


@torch.library.custom_op(
    "synchromesh::row_map_triton",
    mutates_args=(),
    schema="(Tensor expert_ids, Tensor places, Tensor counts, SymInt num_rows, SymInt? fixed, Tensor? measured)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
@on_its_device
def _row_map(
    expert_ids: Tensor, places: Tensor, counts: Tensor, num_rows: int, fixed: int | None, measured: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert_ids, places, counts = expert_ids.contiguous(), places.contiguous(), counts.contiguous()
    rows, pairs, tokens, ends = _made(expert_ids, counts, num_rows)
    grid = (triton.cdiv(max(1, rows.numel(), num_rows, len(counts)), BLOCK_PAIRS),)
    _map_rows[grid](
        expert_ids, places, counts, given_or(measured, counts), rows, pairs, tokens, ends,
        rows.numel(), max(1, rows.shape[1]), len(counts), num_rows, MOST if fixed is None else min(fixed, MOST),
        FIXED=fixed is not None, MEASURED=measured is not None, BLOCK=BLOCK_PAIRS, CHUNK=BLOCK_EXPERTS,
    )  # fmt: skip
    return rows, pairs, tokens, ends


@_row_map.register_fake
def _(
    expert_ids: Tensor, places: Tensor, counts: Tensor, num_rows: int, fixed: int | None, measured: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _made(expert_ids, counts, num_rows)


def _made(expert_ids: Tensor, counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = expert_ids.new_empty(expert_ids.shape)
    pairs, tokens = expert_ids.new_empty(num_rows), expert_ids.new_empty(num_rows, dtype=torch.int32)
    return rows, pairs, tokens, counts.new_empty(counts.shape, dtype=torch.int32)


@triton.jit(do_not_specialize=["number", "num_rows", "fixed"])  # which differ from call to call
def _map_rows(
    ids, places, counts, measured, rows, pairs, tokens, ends, number, choices, experts, num_rows, fixed,
    FIXED: tl.constexpr, MEASURED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # numbers of pairs, of rows and of experts
    expert = tl.load(ids + own, mask=own < number, other=-1).to(tl.int32)
    place = tl.load(places + own, mask=own < number, other=-1).to(tl.int32)
    most = fixed
    if MEASURED:
        most = tl.minimum(tl.load(measured), 2147483647).to(tl.int32)
    start, end = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    total = tl.program_id(0) * 0
    for first in range(0, experts, CHUNK):
        e = first + tl.arange(0, CHUNK)
        n = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
        if FIXED or MEASURED:
            n = tl.minimum(n, most)
        start += tl.sum(tl.where(e[None, :] < expert[:, None], n[None, :], 0), 1)
        end += tl.sum(tl.where(e[None, :] <= own[:, None], n[None, :], 0), 1)
        total += tl.sum(n, 0)
    kept = (expert >= 0) & (expert < experts) & (place >= 0)
    if FIXED or MEASURED:
        kept = kept & (place < most)
    row = start + place
    tl.store(rows + own, tl.where(kept, row, -1), mask=own < number)
    kept = kept & (row < num_rows)
    tl.store(pairs + row, own, mask=kept)
    tl.store(tokens + row, own // choices, mask=kept)
    tail = (own >= total) & (own < num_rows)  # no pair's row
    tl.store(pairs + own, -1, mask=tail)
    tl.store(tokens + own, -1, mask=tail)
    tl.store(ends + own, end, mask=own < experts)
