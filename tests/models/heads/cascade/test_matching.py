"""Matching against the same rules as loops over boxes and objects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.models.boxes import iou
from synchromesh.models.heads.cascade import matching
from synchromesh.models.heads.cascade.matching import NOTHING, UNDECIDED, matched, sampled


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes with whole corners in a few pixels, so that many overlaps are equal; some are empty."""
    corners = torch.randint(0, 6, (count, 2), generator=generator)
    return torch.cat([corners, corners + torch.randint(0, 7, (count, 2), generator=generator)], dim=1).float()


def slow(
    boxes: torch.Tensor, objects: torch.Tensor, positive: float, negative: float, least: float | None
) -> list[int]:
    overlap = iou(boxes, objects).tolist()
    found = []
    for row in overlap:
        most = max(row, default=0.0)
        found.append(row.index(most) if row and most >= positive else NOTHING if most < negative else UNDECIDED)
    if least is not None and overlap:
        for number in range(len(objects)):
            column = [row[number] for row in overlap]
            if max(column) > 0 and max(column) >= least:
                for box, value in enumerate(column):
                    if value == max(column):
                        found[box] = number
    return found


@given(
    st.integers(0, 10_000),
    st.integers(0, 9),
    st.integers(0, 5),
    st.sampled_from([(0.7, 0.3, 0.3), (0.7, 0.3, 0.0), (0.5, 0.5, None), (0.6, 0.2, None)]),
    st.sampled_from([1, 7, 20, 1000]),
)
def test_a_box_stands_for_the_object_that_the_loops_find(seed, boxes, objects, rule, pairs) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, true = random_boxes(boxes, generator), random_boxes(objects, generator)
    positive, negative, least = rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "PAIRS_AT_ONCE", pairs)
        found = matched(own, true, positive=positive, negative=negative, least_best=least)
    assert found.tolist() == slow(own, true, positive, negative, least)


@pytest.mark.parametrize("pairs", [1, 1000])
def test_of_equal_objects_a_box_stands_for_the_first_and_the_best_box_of_both_for_the_last(pairs, monkeypatch) -> None:
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs)
    box = torch.tensor([[2.0, 2, 8, 8]])
    assert matched(box, box.repeat(3, 1), positive=0.5, negative=0.5).tolist() == [0]
    assert matched(box, box.repeat(3, 1), positive=0.7, negative=0.3, least_best=0.3).tolist() == [2]


def test_an_object_without_area_is_nobodys() -> None:
    flat = torch.tensor([[3.0, 3, 3, 9]])
    found = matched(torch.tensor([[3.0, 3, 3, 9], [0.0, 0, 8, 8]]), flat, positive=0.5, negative=0.5, least_best=0.0)
    assert found.tolist() == [NOTHING, NOTHING]


def test_where_there_are_no_more_than_wanted_all_are_taken_in_order_and_nothing_is_drawn() -> None:
    matches = torch.tensor([NOTHING, 3, UNDECIDED, 0, NOTHING, 3])
    before = torch.get_rng_state()
    some, none = sampled(matches, count=5, positives=3)
    assert (some.tolist(), none.tolist()) == ([1, 3, 5], [0, 4])
    assert torch.equal(torch.get_rng_state(), before)


def test_of_too_many_a_random_share_is_taken_and_room_that_objects_leave_goes_to_nothing() -> None:
    matches = torch.tensor([0] * 30 + [NOTHING] * 100 + [UNDECIDED] * 20)
    seen: set[int] = set()
    for _ in range(40):
        some, none = sampled(matches, count=40, positives=10)
        assert (len(set(some.tolist())), len(set(none.tolist()))) == (10, 30)
        assert (matches[some] == 0).all()
        assert (matches[none] == NOTHING).all()
        seen |= {*some.tolist(), *none.tolist()}
    assert seen == set(range(130)), "every one has a chance"
    some, none = sampled(matches[28:], count=40, positives=10)
    assert (len(some), len(none)) == (2, 38)
