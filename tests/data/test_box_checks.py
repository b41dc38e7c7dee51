import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data.box_checks import check_boxes

sides = st.sampled_from(
    [-50.0, -1.0, -0.5, 0.0, 3.0, 9.5, 10.0, 10.5, 12.0, 20.0, 21.0, 22.0, 99.0, math.nan, math.inf]
)
NO_BOX, FLAT, OUTSIDE, CUT = (
    "annotations without a box of four finite numbers, left out",
    "boxes without area, left out",
    "boxes outside of their picture, left out",
    "boxes that reach out of their picture, cut at its border",
)


def by_rule(box: tuple[float, ...], height: int, width: int) -> tuple[str, tuple[float, ...]]:
    """The definition: what is wrong with a box, "" for nothing, and the box that is used."""
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        return NO_BOX, box
    if right <= left or bottom <= top:
        return FLAT, box
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return OUTSIDE, box
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
        return CUT, (max(0, left), max(0, top), min(width, right), min(height, bottom))
    return "", box


@given(st.lists(st.tuples(sides, sides, sides, sides), max_size=30))
def test_each_box_has_the_fault_that_the_rule_says(boxes: list[tuple[float, ...]]) -> None:
    sizes = np.array([[20, 10], [10, 20]] * 15)[: len(boxes)]
    checked = check_boxes(np.array(boxes).reshape(-1, 4), sizes)
    for place, box in enumerate(boxes):
        what, used = by_rule(box, *sizes[place].tolist())
        said = [name for name, which in (checked.left_out | checked.mended).items() if which[place]]
        assert said == ([what] if what else [])
        if what in ("", CUT):
            assert tuple(checked.boxes[place].tolist()) == used
