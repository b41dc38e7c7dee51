"""segment_map: rows that lie by (member, expert), as an exchange brings them, laid out by expert."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from synchromesh.types import RowMap


def segment_map(counts: Int[Tensor, "X N"], *, num_rows: int, part: int = 0, parts: int = 1) -> RowMap:
    """Map rows that lie in segments, by member and then by expert, to rows sorted by expert and then by member.

    Each row is to the map a token with one choice, the segments' order that of the tokens.

    Args:
        counts: int64, rows of each segment.
        num_rows: R, of all segments, or of one part of all.
        part: which part of every segment the rows are; of n rows those from n part // parts to n (part + 1) // parts.
        parts: in how many each segment is cut.
    """
    sizes = counts * (part + 1) // parts - counts * part // parts
    moved = (_starts(sizes.T).T - _starts(sizes)).flatten()  # a segment moves as a whole
    number = torch.arange(num_rows, device=counts.device)
    rows = number + torch.repeat_interleave(moved, sizes.flatten(), output_size=num_rows)
    pairs = torch.empty_like(number).scatter_(0, rows, number)
    ends = sizes.sum(0).cumsum(0).to(torch.int32)
    return RowMap(rows[:, None], pairs, ends, None).with_tokens(pairs.to(torch.int32))


def _starts(sizes: Tensor) -> Tensor:
    """Return how many rows lie before each segment, where they lie row by row of [A, B]."""
    flat = sizes.flatten()
    return (flat.cumsum(0) - flat).view(sizes.shape)
