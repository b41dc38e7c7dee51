import numpy as np

from synchromesh.data.dense_targets import UNKNOWN, dense_targets, edges_of
from synchromesh.data.panoptic import Segment, SegmentMap

# 0 is background, 1 and 2 are things, -1 is void, the last segment a crowd of things.
NUMBERS = np.array(
    [
        [0, 0, 0, 0, -1],
        [0, 1, 1, 0, -1],
        [0, 1, 2, 2, 3],
        [0, 0, 0, 0, 3],
    ],
    dtype=np.int32,
)
SEGMENTS = SegmentMap(NUMBERS, (Segment(0, 2), Segment(1, 0), Segment(2, 1), Segment(3, 1, crowd=True)))


def test_every_target_is_what_its_pixels_say_one_by_one():
    found = dense_targets(SEGMENTS, (True, True, False))
    unknown = (NUMBERS == -1) | (NUMBERS == 3)
    things = (NUMBERS == 1) | (NUMBERS == 2)
    for row, column in np.ndindex(NUMBERS.shape):
        number, at = NUMBERS[row, column], (row, column)
        known = not unknown[at]
        assert found.labels[at] == ((2, 0, 1)[number] if known else UNKNOWN)
        assert found.salient[at] == (int(things[at]) if known else UNKNOWN)
        beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        beside = [one for one in beside if 0 <= one[0] < 4 and 0 <= one[1] < 5]
        assert found.edges[at] == (int(any(NUMBERS[one] != number for one in beside)) if known else UNKNOWN)
        assert found.objects[at] == things[at]
        members = np.argwhere(number == NUMBERS)
        wanted = members.mean(0) - (row, column) if things[at] else (0, 0)
        np.testing.assert_allclose(found.offsets[:, row, column], wanted, rtol=1e-6)


def test_one_segment_has_no_edge_and_nothing_to_point_at():
    found = dense_targets(SegmentMap(np.zeros((3, 2), dtype=np.int32), (Segment(0, 1),)), (True, False))
    assert not found.edges.any()
    assert not found.offsets.any()
    assert not found.objects.any()
    assert edges_of(np.zeros((0, 0), dtype=np.int32)).shape == (0, 0)
