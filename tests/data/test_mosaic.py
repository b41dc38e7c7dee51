import numpy as np
import pytest
import torch

from synchromesh.data.instances import Instances
from synchromesh.data.mosaic import Mosaic
from synchromesh.data.scene import Scene


def scene(value: int, height: int, width: int, box: list[int], *, masks: bool = True) -> Scene:
    """A picture of one value, with a bright object."""
    image = torch.full((1, height, width), value, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    left, top, right, bottom = box
    mask[0, top:bottom, left:right] = True
    image[mask] = 255
    truth = Instances(torch.tensor([box], dtype=torch.float32), torch.tensor([value]), masks=mask if masks else None)
    return Scene(image, truth)


FOUR = (
    scene(10, 12, 12, [8, 8, 12, 12]),
    scene(20, 12, 12, [0, 8, 4, 12]),
    scene(30, 12, 12, [8, 0, 12, 4]),
    scene(40, 12, 12, [0, 0, 4, 4]),
)


@pytest.mark.parametrize("seed", range(5))
def test_four_scenes_meet_at_a_point_with_their_objects(seed: int) -> None:
    whole = Mosaic(1.0).joined(FOUR, (16, 20), np.random.default_rng(seed))
    assert whole.image.shape == (1, 16, 20)
    boxes = whole.truth.boxes
    assert whole.truth.labels.tolist() == [10, 20, 30, 40]
    x, y = boxes[0, 2:].tolist()  # all four objects lie in the corner at that point
    assert 5 <= x <= 15
    assert 4 <= y <= 12
    assert boxes.tolist() == [[x - 4, y - 4, x, y], [x, y - 4, x + 4, y], [x - 4, y, x, y + 4], [x, y, x + 4, y + 4]]
    for (left, top, right, bottom), mask in zip(boxes.int().tolist(), whole.truth.masks, strict=True):
        assert mask[top:bottom, left:right].all()
        assert mask.sum() == 16
        assert (whole.image[0][mask] == 255).all()
    assert {10, 20, 30, 40, 255} <= set(whole.image.unique().tolist()) <= {0, 10, 20, 30, 40, 255}
    assert whole.move is None
    assert whole.picture is None


def test_what_its_quarter_hides_is_left_out() -> None:
    far = (scene(10, 12, 12, [0, 0, 4, 4], masks=False), *FOUR[1:])
    far = (far[0], *(Scene(one.image, Instances(one.truth.boxes, one.truth.labels)) for one in far[1:]))
    whole = Mosaic(1.0, middle=(0.25, 0.25)).joined(far, (16, 20), np.random.default_rng(0), least_visible=0.5)
    assert whole.truth.labels.tolist() == [20, 30, 40]
    assert whole.truth.masks is None


def test_the_point_is_drawn() -> None:
    points = {
        tuple(Mosaic(1.0).joined(FOUR, (64, 64), np.random.default_rng(n)).truth.boxes[3, :2].tolist())
        for n in range(20)
    }
    assert len(points) > 15


@pytest.mark.parametrize(
    "wrong", [{"chance": 1.5}, {"chance": -0.1}, {"middle": (0.0, 0.5)}, {"middle": (0.6, 0.5)}, {"middle": (0.5, 1.0)}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="mosaic has"):
        Mosaic(**wrong)


def test_three_scenes_are_no_mosaic() -> None:
    with pytest.raises(ValueError, match="got 3 scenes"):
        Mosaic().joined(FOUR[:3], (16, 16), np.random.default_rng(0))
