"""The send buffer of a plan holds every kept pair once per copy, in its piece, at its slot."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.parallel.comm.segments import Segments
from synchromesh.parallel.dispatch import Slots, even_map, ragged_map, rows_per_slot, weights_per_row
from synchromesh.parallel.layout import Layout
from synchromesh.planning.lattice import layout_refusal
from synchromesh.testing.cases import routing_of, row_map_of
from synchromesh.types import Routing, RowMap


@st.composite
def traffic(draw: st.DrawFn) -> tuple[Routing, RowMap, Layout, int, list[int]]:
    world, experts = draw(st.sampled_from([(2, 2), (4, 2), (4, 8), (6, 3), (6, 12), (8, 2), (12, 4)]))
    layouts = [
        Layout(world, experts, g, near)
        for g in range(1, world)
        for near in (True, False)
        if layout_refusal(world, experts, g, near=near) is None
    ]
    layout = draw(st.sampled_from(layouts))
    tokens, choices = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    ids = draw(
        st.lists(st.integers(-1, experts - 1), min_size=tokens * choices, max_size=tokens * choices).map(torch.tensor)
    )
    ids = ids.to(torch.int64).view(tokens, choices)
    capacity = draw(st.integers(0, 4))
    rowmap = row_map_of(ids, experts, capacity=capacity)
    order = draw(st.just(list(range(layout.members))) | st.permutations(range(layout.members)))
    return routing_of(ids, experts, torch.rand(ids.shape)), rowmap, layout, draw(st.sampled_from([1, 2, 4, 8])), order


def slots_of(layout: Layout, order: list[int], expert: int) -> list[int]:
    """Number the slots of an expert as they lie, members in an order."""
    each = layout.local_experts
    return [order.index(slot // each) * each + slot % each for slot in layout.destinations[expert]]


def kept_pairs_of(routing: Routing, rowmap: RowMap) -> list[tuple[int, int, int]]:
    """Token, choice and expert of every kept pair."""
    kept = (rowmap.rows >= 0).nonzero().tolist()
    return [(t, k, int(routing.expert_ids[t, k])) for t, k in kept]


@given(traffic())
@settings(deadline=None, max_examples=150)
def test_a_ragged_buffer_is_sorted_by_piece_and_slot_without_gaps(drawn):
    routing, rowmap, layout, chunks, order = drawn
    slots = Slots.on(torch.device("cpu"), layout, order)
    sent = ragged_map(routing, rowmap, slots, chunks)
    counts = rows_per_slot(rowmap, slots).flatten()
    both = Segments(counts.numpy(), counts)
    sizes = torch.stack([both.piece(c, chunks).device for c in range(chunks)])
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(sizes.shape)
    found = set()
    for t, k, expert in kept_pairs_of(routing, rowmap):
        for copy, slot in enumerate(slots_of(layout, order, expert)):
            row = int(sent.rows[t, k * layout.copies + copy])
            inside = [c for c in range(chunks) if starts[c, slot] <= row < starts[c, slot] + sizes[c, slot]]
            assert len(inside) == 1, "a row lies outside of its slot"
            assert int(sent.pairs[row]) == t * sent.rows.shape[1] + k * layout.copies + copy
            found.add(row)
    assert found == set(range(int(sizes.sum())))
    assert (sent.pairs[len(found) :] == -1).all()
    assert int((sent.rows >= 0).sum()) == len(found)


@given(traffic())
@settings(deadline=None, max_examples=150)
def test_an_even_buffer_gives_every_slot_the_same_room(drawn):
    routing, rowmap, layout, chunks, order = drawn
    rows = max(1, -(-rowmap.capacity // chunks))
    sent = even_map(routing, rowmap, Slots.on(torch.device("cpu"), layout, order), chunks=chunks, rows=rows)
    slots = layout.members * layout.local_experts
    assert len(sent.pairs) == chunks * slots * rows
    taken = 0
    for t, k, expert in kept_pairs_of(routing, rowmap):
        for copy, slot in enumerate(slots_of(layout, order, expert)):
            row = int(sent.rows[t, k * layout.copies + copy])
            assert row // rows % slots == slot
            assert int(sent.pairs[row]) == t * sent.rows.shape[1] + k * layout.copies + copy
            taken += 1
    assert int((sent.pairs >= 0).sum()) == int((sent.rows >= 0).sum()) == taken


@given(traffic())
@settings(deadline=None, max_examples=50)
def test_every_copy_of_a_row_has_the_weight_of_its_pair(drawn):
    routing, _, layout, *_ = drawn
    weights = weights_per_row(routing, layout).view(*routing.weights.shape, layout.copies)
    assert torch.equal(weights, routing.weights[..., None].expand_as(weights))
