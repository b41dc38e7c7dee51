import math

import pytest
import torch

from synchromesh.models.heads.cascade.anchors import anchors_of, centred_inside

CPU = torch.device("cpu")
RATIOS = (0.5, 1.0, 2.0)


def test_every_position_has_an_anchor_of_each_ratio_row_by_row() -> None:
    found = anchors_of(2, 3, stride=4, scale=8.0, ratios=RATIOS, device=CPU)
    expected = []
    for row in range(2):
        for column in range(3):
            for ratio in RATIOS:
                width, height = 32 / math.sqrt(ratio), 32 * math.sqrt(ratio)
                x, y = 4 * column, 4 * row
                expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert found.dtype == torch.float32
    assert found.tolist() == [pytest.approx(each, abs=1e-4) for each in expected]


@pytest.mark.parametrize("size", [(40, 64), (37, 61), (64, 64), (1, 1)], ids=str)
def test_the_anchors_of_an_image_are_those_of_the_cells_that_begin_in_it(size: tuple[int, int]) -> None:
    anchors = anchors_of(16, 16, stride=4, scale=8.0, ratios=RATIOS, device=CPU)
    expected = [4 * row < size[0] and 4 * column < size[1] for row in range(16) for column in range(16) for _ in RATIOS]
    assert centred_inside(anchors, torch.tensor(size)).tolist() == expected
