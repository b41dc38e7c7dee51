"""segment_map on a GPU: rows, pairs, tokens and ends of a piece in one launch. No read on the host.

Every program adds up for its own segment how many rows lie before it, and how many will: two sums over X N numbers that
lie in the cache, instead of launches for running sums that wait for each other. Then it counts on from both.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from synchromesh.kernels.launch import on_its_device
from synchromesh.types import RowMap

BLOCK_ROWS = 512  # that a program writes at a time
BLOCK_SEGMENTS = 64  # that a program adds up at a time
MOST_PROGRAMS = 16  # of one segment: where one member sends nearly all rows for one expert, one would write long


def segment_map(counts: Int[Tensor, "X N"], *, num_rows: int, part: int = 0, parts: int = 1) -> RowMap:
    """Compute the reference's map."""
    rows, pairs, tokens, ends = _segment_map(counts, num_rows, part, parts)
    return RowMap(rows, pairs, ends, None).with_tokens(tokens)


@torch.library.custom_op(
    "synchromesh::segment_map_triton",
    mutates_args=(),
    schema="(Tensor counts, SymInt num_rows, int part, int parts) -> (Tensor, Tensor, Tensor, Tensor)",
)
@on_its_device
def _segment_map(counts: Tensor, num_rows: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made, segments = _made(counts, num_rows), counts.numel()
    across = min(MOST_PROGRAMS, max(1, triton.cdiv(num_rows, segments * BLOCK_ROWS)))
    _map_segments[(segments, across)](
        counts.contiguous(), *made, segments, counts.shape[1], part, parts, ROWS=BLOCK_ROWS, CHUNK=BLOCK_SEGMENTS
    )
    return made


@_segment_map.register_fake
def _(counts: Tensor, num_rows: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _made(counts, num_rows)


def _made(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, pairs = counts.new_empty(num_rows, 1), counts.new_empty(num_rows)
    tokens, ends = (counts.new_empty(size, dtype=torch.int32) for size in (num_rows, counts.shape[1]))
    return rows, pairs, tokens, ends


@triton.jit(do_not_specialize=["segments", "experts", "part", "parts"])  # which differ from call to call
def _map_segments(
    counts, rows, pairs, tokens, ends, segments, experts, part, parts, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    segment = tl.program_id(0)
    expert = segment % experts
    start, to, own, end = segment * 0, segment * 0, segment * 0, segment * 0
    for first in range(0, segments, CHUNK):
        other = first + tl.arange(0, CHUNK)
        n = tl.load(counts + other, mask=other < segments, other=0).to(tl.int64)
        n = (n * (part + 1) // parts - n * part // parts).to(tl.int32)
        e = other % experts
        start += tl.sum(tl.where(other < segment, n, 0), 0)
        to += tl.sum(tl.where((e < expert) | ((e == expert) & (other < segment)), n, 0), 0)
        own += tl.sum(tl.where(other == segment, n, 0), 0)
        end += tl.sum(tl.where(e <= expert, n, 0), 0)
    for done in range(tl.program_id(1) * ROWS, own, tl.num_programs(1) * ROWS):
        row = done + tl.arange(0, ROWS)
        mask = row < own
        tl.store(rows + start + row, (to + row).to(tl.int64), mask=mask)
        tl.store(pairs + to + row, (start + row).to(tl.int64), mask=mask)
        tl.store(tokens + to + row, start + row, mask=mask)
    if (segment < experts) & (tl.program_id(1) == 0):  # one program for each expert
        tl.store(ends + expert, end)
