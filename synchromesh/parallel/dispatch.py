"""Dispatch: the send buffer of a plan, as a `RowMap` onto slots instead of experts.

A slot is one member's copy, or shard, of an expert (`Layout.destinations`). The buffer is sorted by (piece, slot),
pieces being the chunks of the pipeline; with one piece and the experts' own order it is the capacity's own map.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.parallel.layout import Layout
from synchromesh.types import Routing, RowMap


def rows_per_slot(rowmap: RowMap, layout: Layout) -> Int[Tensor, "X N"]:
    """Return how many rows go to each member's local experts."""
    counts = _counts(rowmap)[layout.expert_of_slot(rowmap.ends.device)]
    return counts.unflatten(0, (layout.members, layout.local_experts))


def ragged_map(routing: Routing, rowmap: RowMap, layout: Layout, chunks: int) -> RowMap:
    """Map the kept pairs to a buffer of real rows only; each slot's rows are cut into pieces as `piece` cuts them."""
    if chunks == 1 and layout.in_expert_order:
        return rowmap
    slot_TKr, place_TK, count_TK = _slots(routing, rowmap, layout)
    piece_TK = ((place_TK + 1) * chunks - 1) // count_TK.clamp(min=1)
    place_TK = place_TK - count_TK * piece_TK // chunks
    per_slot = rows_per_slot(rowmap, layout).flatten()
    numbers = torch.arange(chunks + 1, device=per_slot.device)[:, None]
    sizes = torch.diff(per_slot * numbers // chunks, dim=0).flatten()  # [pieces * slots]
    ends = sizes.cumsum(0)
    starts = (ends - sizes)[piece_TK[..., None] * len(per_slot) + slot_TKr]
    rows = _kept_rows(starts + place_TK[..., None], rowmap)
    return RowMap(rows, _pairs(rows, len(rowmap.pairs) * layout.copies), ends.to(torch.int32), rowmap.capacity)


def even_map(routing: Routing, rowmap: RowMap, layout: Layout, *, chunks: int, rows: int) -> RowMap:
    """Map the kept pairs to a padded buffer [chunks, slots, rows]; what no pair fills is -1 in `pairs`.

    Its `ends` do not tell where rows end: it is for `permute`'s reference, which reads `rows` and `pairs` alone.
    """
    slot_TKr, place_TK, _ = _slots(routing, rowmap, layout)
    num_slots = layout.members * layout.local_experts
    starts = ((place_TK // rows)[..., None] * num_slots + slot_TKr) * rows
    at = _kept_rows(starts + (place_TK % rows)[..., None], rowmap)
    return RowMap(at, _pairs(at, chunks * num_slots * rows), rowmap.ends, rowmap.capacity)


def weights_per_row(routing: Routing, layout: Layout) -> Float[Tensor, "T Kr"]:
    """Return the combine weights, once for every copy of a row."""
    return routing.weights if layout.copies == 1 else routing.weights.repeat_interleave(layout.copies, dim=1)


def _counts(rowmap: RowMap) -> Int[Tensor, " E"]:
    return torch.diff(rowmap.ends.to(torch.int64), prepend=rowmap.ends.new_zeros(1, dtype=torch.int64))


def _slots(routing: Routing, rowmap: RowMap, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's slots [T, K, r], place among its expert's rows, and the number of these (any if not kept)."""
    ids, counts = routing.expert_ids.clamp(min=0), _counts(rowmap)
    places = (rowmap.rows - (rowmap.ends - counts)[ids]).clamp(min=0)
    return layout.table(ids.device)[ids], places, counts[ids]


def _kept_rows(rows_TKr: Tensor, rowmap: RowMap) -> Int[Tensor, "T Kr"]:
    return torch.where((rowmap.rows >= 0)[..., None], rows_TKr, -1).flatten(1)


def _pairs(rows: Int[Tensor, "T Kr"], num_rows: int) -> Int[Tensor, " R"]:
    """Invert rows; what no pair fills is -1."""
    slots = torch.where(rows >= 0, rows, num_rows).flatten()  # one slot past the end takes the pairs without a row
    buffer = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=rows.device)
    return buffer.scatter(0, slots, torch.arange(rows.numel(), device=rows.device))[:num_rows]
