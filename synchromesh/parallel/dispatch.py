r"""Dispatch: where each routed row lies in the buffer that a rank sends, for any plan.

A slot is one member's copy, or shard, of an expert (`Layout.destinations`). The buffer is sorted by (piece, slot),
pieces being the chunks of the pipeline; slots lie in the order in which messages leave (`AllToAll.order`). One of W = 2
ranks, with E = 4 experts a to d, gather degree 1 and 10 kept pairs:

    as tokens chose          b c a d a c a a b c                by (token, choice)
    capacity's RowMap        a a a a|b b|c c c|d                by expert; with one piece it is sent as it is
    ragged, two pieces       a a|b|c|   ,  a a|b|c c|d          half of every slot's rows in each piece
    even, two pieces         a a|b b|c c|d .  ,  a a|. .|c .|. .   room for half the capacity, 4, in every slot
                             \_____/ \_____/
                             member 0  member 1

Each piece is one all-to-all. What arrives lies by (sender, local expert), and kernels read it so (`arrivals`). Results
return the same way, and `SendMap.combine` sums them per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels import REFERENCE, Kernels
from synchromesh.parallel.layout import Layout
from synchromesh.types import Routing, RowMap


@dataclass(frozen=True)
class Slots:
    """The slots of a layout as tensors on a device, made once for many forwards.

    Attributes:
        layout: of the plan.
        destinations: int64, the r slots of each expert, numbered as they lie.
        expert: int64, the expert of each of the X * N slots.
        in_expert_order: whether slots are the experts, one each and in order: rows sorted by expert are then sorted by
            slot.
    """

    layout: Layout
    destinations: Int[Tensor, "E r"]
    expert: Int[Tensor, " S"]
    in_expert_order: bool

    @classmethod
    def on(cls, device: torch.device, layout: Layout, order: Sequence[int]) -> Slots:
        """Make the slots of members whose rows lie in an order."""
        number = {member: place for place, member in enumerate(order)}
        each = layout.local_experts
        destinations = [[number[slot // each] * each + slot % each for slot in own] for own in layout.destinations]
        experts = [expert for member in order for expert in layout.experts_of(member)]
        in_order = destinations == [[expert] for expert in range(layout.num_experts)]
        return cls(layout, torch.tensor(destinations, device=device), torch.tensor(experts, device=device), in_order)


@dataclass(frozen=True)
class SendMap:
    """Where each copy of a kept pair lies in the buffer that a rank sends.

    Attributes:
        rows: int64, rows of each pair's r copies; -1 where it was dropped or is absent.
        pairs: int64, the copy t * K r + k r + i in each row; -1 where there is none.
        ends: int32, running sum of the rows of each (piece, slot), which lie without gaps; None where slots are padded.
    """

    rows: Int[Tensor, "T Kr"]
    pairs: Int[Tensor, " R"]
    ends: Int[Tensor, " S"] | None

    def gather(self, x: Float[Tensor, "T D"], kernels: Kernels) -> Float[Tensor, "R D"]:
        """Copy tokens to their rows."""
        return self._suited(kernels).gather(x, self._rowmap())

    def combine(
        self, buffer: Float[Tensor, "R D"], weights: Float[Tensor, "T Kr"], kernels: Kernels
    ) -> Float[Tensor, "T D"]:
        """Return the weighted sum of each token's rows."""
        return self._suited(kernels).combine(buffer, weights, self._rowmap())

    def _suited(self, kernels: Kernels) -> Kernels:
        return REFERENCE if self.ends is None else kernels  # only the reference reads `rows` and `pairs` alone

    def _rowmap(self) -> RowMap:
        ends = self.pairs.new_zeros(0, dtype=torch.int32) if self.ends is None else self.ends
        return RowMap(self.rows, self.pairs, ends, None)


def rows_per_slot(rowmap: RowMap, slots: Slots) -> Int[Tensor, "X N"]:
    """Return how many rows go to each member's local experts, members in the order of the slots."""
    return _counts(rowmap)[slots.expert].unflatten(0, (slots.layout.members, slots.layout.local_experts))


def ragged_map(routing: Routing, rowmap: RowMap, slots: Slots, chunks: int) -> SendMap:
    """Map the kept pairs to a buffer of real rows only; each slot's rows are cut into pieces as `piece` cuts them."""
    layout = slots.layout
    if chunks == 1 and slots.in_expert_order:
        return SendMap(rowmap.rows, rowmap.pairs, rowmap.ends)
    slot_TKr, place_TK, count_TK = _places(routing, rowmap, slots)
    # Piece c of n rows holds those from floor(n c / chunks) on, so the row at a place is in this piece:
    piece_TK = ((place_TK + 1) * chunks - 1) // count_TK.clamp(min=1)
    place_TK = place_TK - count_TK * piece_TK // chunks
    per_slot = rows_per_slot(rowmap, slots).flatten()
    numbers = torch.arange(chunks + 1, device=per_slot.device)[:, None]
    sizes = torch.diff(per_slot * numbers // chunks, dim=0).flatten()  # [pieces * slots]
    ends = sizes.cumsum(0)
    starts = (ends - sizes)[piece_TK[..., None] * len(per_slot) + slot_TKr]
    rows = _kept_rows(starts + place_TK[..., None], rowmap)
    return SendMap(rows, inverse(rows, len(rowmap.pairs) * layout.copies), ends.to(torch.int32))


def even_map(routing: Routing, rowmap: RowMap, slots: Slots, *, chunks: int, rows: int) -> SendMap:
    """Map the kept pairs to a padded buffer [chunks, slots, rows], the same shape on every rank."""
    slot_TKr, place_TK, _ = _places(routing, rowmap, slots)
    num_slots = len(slots.expert)
    starts = ((place_TK // rows)[..., None] * num_slots + slot_TKr) * rows
    at = _kept_rows(starts + (place_TK % rows)[..., None], rowmap)
    return SendMap(at, inverse(at, chunks * num_slots * rows), ends=None)


def weights_per_row(routing: Routing, layout: Layout) -> Float[Tensor, "T Kr"]:
    """Return the combine weights, once for every copy of a row."""
    return routing.weights if layout.copies == 1 else routing.weights.repeat_interleave(layout.copies, dim=1)


def _counts(rowmap: RowMap) -> Int[Tensor, " E"]:
    return torch.diff(rowmap.ends.to(torch.int64), prepend=rowmap.ends.new_zeros(1, dtype=torch.int64))


def _places(routing: Routing, rowmap: RowMap, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's slots [T, K, r], place among its expert's rows, and the number of these (any if not kept)."""
    ids, counts = routing.expert_ids.clamp(min=0), _counts(rowmap)
    places = (rowmap.rows - (rowmap.ends - counts)[ids]).clamp(min=0)
    return slots.destinations[ids], places, counts[ids]


def _kept_rows(rows_TKr: Tensor, rowmap: RowMap) -> Int[Tensor, "T Kr"]:
    return torch.where((rowmap.rows >= 0)[..., None], rows_TKr, -1).flatten(1)


def inverse(rows: Int[Tensor, "T Kr"], num_rows: int) -> Int[Tensor, " R"]:
    """Invert rows; what no pair fills is -1."""
    slots = torch.where(rows >= 0, rows, num_rows).flatten()  # one slot past the end takes the pairs without a row
    buffer = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=rows.device)
    return buffer.scatter(0, slots, torch.arange(rows.numel(), device=rows.device))[:num_rows]
