import numpy as np
import torch

from synchromesh.data.moves import Move
from synchromesh.data.panoptic import Segment, SegmentMap

SEGMENTS = (Segment(9, 1), Segment(500_000, 0), Segment(7, 1, crowd=True), Segment(3, 1))
IDS = np.array([[9, 9, 500_000, 4], [9, 7, 500_000, 0]])


def test_ids_that_no_segment_has_are_void() -> None:
    found = SegmentMap.of(IDS, SEGMENTS)
    assert found.numbers.tolist() == [[0, 0, 1, -1], [0, 2, 1, -1]]
    assert found.labels(99).tolist() == [[1, 1, 0, 99], [1, 99, 0, 99]]
    assert SegmentMap.of(IDS, ()).labels().tolist() == [[255] * 4] * 2


def test_things_that_are_seen_have_masks_and_tight_boxes() -> None:
    found = SegmentMap.of(IDS, SEGMENTS).instances((False, True))
    assert found.labels.tolist() == [1]  # neither stuff, nor the crowd, nor what is not seen
    assert found.boxes.tolist() == [[0.0, 0.0, 2.0, 2.0]]
    assert found.masks.tolist() == [[[True, True, False, False], [True, False, False, False]]]
    none = SegmentMap.of(IDS, SEGMENTS).instances((False, False))
    assert none.masks.shape == (0, 2, 4)
    assert none.boxes.shape == (0, 4)


def test_a_moved_map_is_void_outside_of_the_picture() -> None:
    move = Move((2, 4), (3, 4), offset=(-2.0, 0.0), flip=True)
    moved = SegmentMap.of(IDS, SEGMENTS).moved(move)
    assert moved.numbers.tolist() == [[-1, -1, -1, 1], [-1, -1, -1, 1], [-1, -1, -1, -1]]
    assert torch.equal(moved.instances((True, True)).boxes, torch.tensor([[3.0, 0.0, 4.0, 2.0]]))
