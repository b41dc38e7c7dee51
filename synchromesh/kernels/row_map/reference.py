"""row_map: the kept pairs laid out by expert."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from synchromesh.types import RowMap


def row_map(
    expert_ids: Int[Tensor, "T K"],
    places: Int[Tensor, "T K"],
    counts: Int[Tensor, " E"],
    *,
    num_rows: int,
    capacity: int | Int[Tensor, ""] | None,
) -> RowMap:
    """Lay the kept pairs out by expert, those of an expert in the order of their places.

    Args:
        expert_ids: int64; -1 is an absent pair.
        places: of each pair in its expert's queue.
        counts: length of the queues.
        num_rows: R, at least the number of kept pairs.
        capacity: pairs that an expert keeps, the first in its queue; None keeps all.
    """
    # Kept pairs of an expert are those first in its queue, so their places are their rows from its start on: no sort.
    kept_counts = counts if capacity is None else counts.clamp(max=capacity)
    ends = kept_counts.cumsum(0)
    starts = ends - kept_counts
    kept = expert_ids >= 0 if capacity is None else (expert_ids >= 0) & (places < capacity)
    rows = torch.where(kept, starts[expert_ids.clamp(min=0)] + places, -1)
    slots = torch.where(kept, rows, num_rows).flatten()  # one slot past the end takes the pairs without a row
    pairs = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=expert_ids.device)
    pairs = pairs.scatter(0, slots, torch.arange(expert_ids.numel(), device=expert_ids.device))
    return RowMap(rows, pairs[:num_rows], ends.to(torch.int32), capacity)
