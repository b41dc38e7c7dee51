"""Where parts lie and rows go: pure arithmetic, over every number of ranks and experts."""

import pytest

from synchromesh.parallel.layout import Layout
from synchromesh.planning.lattice import layout_refusal, row_copies
from synchromesh.types import Plan

SIZES = [(w, e) for w in (1, 2, 3, 4, 6, 8, 12) for e in (1, 2, 3, 4, 6, 8, 12, 24) if w % e == 0 or e % w == 0]
LAYOUTS = [
    Layout(world, experts, gather, near)
    for world, experts in SIZES
    for gather in range(1, world + 1)
    for near in (True, False)
    if layout_refusal(world, experts, gather, near=near) is None
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_expert_is_computed_exactly_once_by_each_exchange_group(layout):
    held = sorted(part for member in range(layout.members) for part in layout.holds(member))
    assert held == list(range(layout.world))
    pieces = [(e, s) for m in range(layout.members) for e in layout.experts_of(m) for s in layout.shards_of(m)]
    assert sorted(pieces) == [(e, s) for e in range(layout.num_experts) for s in range(layout.shards)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_reach_every_member_that_holds_a_piece_of_their_expert(layout):
    for expert, slots in enumerate(layout.destinations):
        assert len(slots) == layout.copies
        for slot in slots:
            member, place = divmod(slot, layout.local_experts)
            assert layout.experts_of(member)[place] == expert
    assert layout.copies * layout.num_experts == layout.members * layout.local_experts
    of_slot = [expert for member in range(layout.members) for expert in layout.experts_of(member)]
    assert [of_slot[slot] for slots in layout.destinations for slot in slots] == [
        expert for expert, slots in enumerate(layout.destinations) for _ in slots
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_groups_of_a_rank_tile_the_world(layout):
    for rank in range(layout.world):
        gather, exchange = layout.gather_group(rank), layout.exchange_group(rank)
        assert rank in gather
        assert exchange[layout.member(rank)] == rank
        assert [layout.member(other) for other in exchange] == list(range(layout.members))
        assert {layout.member(other) for other in gather} == {layout.member(rank)}
        assert all(layout.gather_group(other) == gather for other in gather)
        assert all(layout.exchange_group(other) == exchange for other in exchange)


@pytest.mark.parametrize(
    ("gather", "near", "copies"),
    [(1, True, 4), (2, True, 2), (2, False, 4), (4, True, 1), (4, False, 2), (8, True, 1)],
)
def test_row_copies_of_two_experts_on_eight_ranks(gather, near, copies):
    assert Layout(8, 2, gather, near).copies == copies


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_copies_of_a_row_are_those_that_the_lattice_tells(layout):
    plan = Plan(gather=layout.gather, near=layout.near)
    assert row_copies(layout.world, layout.num_experts, plan) == layout.copies


@pytest.mark.parametrize(
    ("world", "experts", "gather", "near", "says"),
    [(6, 6, 4, True, "does not divide"), (6, 6, 6, False, "one plan"), (6, 3, 3, True, "shards")],
)
def test_a_layout_that_cannot_be_says_why(world, experts, gather, near, says):
    with pytest.raises(ValueError, match=says):
        Layout(world, experts, gather, near)
