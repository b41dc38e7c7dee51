import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data.annotation import Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.moves import Fit, Move
from synchromesh.data.regions import CompressedRuns, Polygons, RunLengths
from synchromesh.data.scene import Scene, instances, moved_instances, returned

HEIGHT, WIDTH = 20, 30


def outlined(box: tuple[float, float, float, float], label: int = 0, **more) -> Annotation:
    left, top, right, bottom = box
    region = Polygons.of([[left, top, right, top, right, bottom, left, bottom]])
    return Annotation((float(left), float(top), float(right), float(bottom)), label, region, **more)


def masked(*boxes: list[int]) -> Instances:
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(len(boxes)), masks=masks)


def test_objects_are_moved_and_cut_at_the_border() -> None:
    move = Move((HEIGHT, WIDTH), (10, 16), scale=(2.0, 1.0), offset=(-20.0, -5.0), flip=True)
    found = instances([outlined((8.0, 4.0, 16.0, 9.0), 3)], move, masks=True)
    assert found.boxes.tolist() == [[4.0, 0.0, 16.0, 4.0]]
    assert found.labels.tolist() == [3]
    assert found.masks.shape == (1, 10, 16)
    assert found.masks[0, :4, 4:].all()
    assert found.masks.sum() == 4 * 12


@pytest.mark.parametrize(("least_visible", "kept"), [(0.0, [0, 1, 2]), (0.25, [0, 1]), (0.5, [0, 1]), (0.51, [0])])
def test_what_a_crop_shows_too_little_of_is_left_out(least_visible: float, kept: list[int]) -> None:
    inside, half, sliver, gone = (10.0, 4, 14, 8), (16.0, 4, 24, 8), (19.0, 4, 29, 8), (20.0, 4, 25, 8)
    objects = [outlined(box, label) for label, box in enumerate((inside, half, sliver, gone))]
    move = Move((HEIGHT, WIDTH), (HEIGHT, 10), offset=(-10.0, 0.0))
    for masks in (False, True):
        assert instances(objects, move, masks=masks, least_visible=least_visible).labels.tolist() == kept


def test_ignored_objects_and_with_masks_those_without_a_region_are_not_learnt_from() -> None:
    box = (2.0, 3.0, 9.0, 9.0)
    objects = [
        outlined(box, 0, ignored=True),
        outlined(box, 1, ignored=True, crowd=True),
        Annotation(box, 2),
        outlined(box, 3),
    ]
    whole = Move.none(HEIGHT, WIDTH)
    assert instances(objects, whole).labels.tolist() == [2, 3]
    assert instances(objects, whole, masks=True).labels.tolist() == [3]
    none = instances(objects[:2], whole, masks=True)
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, HEIGHT, WIDTH)


def test_an_object_that_is_cut_gets_the_box_of_the_rest_of_its_pixels() -> None:
    """Of an L that is cut, the foot is gone: the box of the L, cut, would be too wide."""
    ring = [4.0, 2.0, 8.0, 2.0, 8.0, 14.0, 24.0, 14.0, 24.0, 18.0, 4.0, 18.0]
    one = Annotation((4.0, 2.0, 24.0, 18.0), 0, Polygons.of([ring]))
    top = instances([one], Move((HEIGHT, WIDTH), (12, WIDTH)), masks=True)
    assert top.boxes.tolist() == [[4.0, 2.0, 8.0, 12.0]]
    whole = instances([one], Move.none(HEIGHT, WIDTH), masks=True)
    assert whole.boxes.tolist() == [[4.0, 2.0, 24.0, 18.0]]  # as the file says
    corner = Move((HEIGHT, WIDTH), (10, 10), offset=(-14.0, 0.0))  # inside of the box, where the L is not
    assert len(instances([one], corner, masks=True)) == 0


def test_a_region_that_makes_no_sense_names_its_annotation() -> None:
    one = Annotation((1.0, 1.0, 5.0, 5.0), 0, CompressedRuns("32", HEIGHT, WIDTH), number=17)
    with pytest.raises(ValueError, match="annotation 17: runs have"):
        instances([one], Move.none(HEIGHT, WIDTH), masks=True)


@given(
    st.floats(0.3, 4.0), st.floats(-40, 40), st.floats(-40, 40), st.booleans(),
    st.tuples(st.integers(0, 25), st.integers(0, 15), st.integers(3, 9), st.integers(3, 9)),
)  # fmt: skip
def test_objects_from_an_annotation_are_those_that_are_moved_later(
    scale: float, x: float, y: float, flip: bool, place: tuple[int, int, int, int]
) -> None:
    left, top, width, height = place
    box = [left, top, min(left + width, WIDTH), min(top + height, HEIGHT)]
    whole, move = masked(box), Move((HEIGHT, WIDTH), (24, 18), (scale, scale), (x, y), flip)
    one = Annotation(tuple(map(float, box)), 0, RunLengths.of(whole.masks[0].numpy()))
    early, late = instances([one], move, masks=True), moved_instances(whole, move)
    assert torch.equal(early.masks, late.masks)
    assert torch.allclose(early.boxes, late.boxes, atol=1e-3)
    assert torch.equal(early.labels, late.labels)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_what_is_found_in_a_fitted_picture_goes_back_to_its_pixels(height: int, width: int, count: int) -> None:
    whole = masked(*([2 * n, n, 2 * n + 8, n + 6] for n in range(count)))
    move = Fit(size=(height, width)).move(HEIGHT, WIDTH)
    seen = Instances(
        move.boxes(whole.boxes), whole.labels, torch.rand(count), whole.masks[:, :1, :1].expand(-1, height, width)
    )
    back = returned(seen, move)
    assert torch.allclose(back.boxes, whole.boxes, atol=1e-3)
    assert torch.equal(back.scores, seen.scores)
    assert back.masks.shape == (count, HEIGHT, WIDTH)


def test_masks_go_back_through_a_crop_and_a_mirror_image() -> None:
    whole = masked([10, 4, 18, 12])
    move = Move((HEIGHT, WIDTH), (40, 40), scale=(2.0, 2.0), offset=(-10.0, 0.0), flip=True)
    back = returned(moved_instances(whole, move), move)
    assert torch.equal(back.masks, whole.masks)
    assert torch.equal(back.boxes, whole.boxes)


def test_a_scene_of_another_size_keeps_its_way_back() -> None:
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    first = Move((HEIGHT * 2, WIDTH * 2), (HEIGHT, WIDTH), scale=(0.5, 0.5), flip=True)
    scene = Scene(image, masked([2, 2, 12, 10]), (0.5, 0.5), None, first)
    small = scene.resized(0.5)
    assert small.image.shape == (3, 10, 15)
    assert small.truth.boxes.tolist() == [[1.0, 1.0, 6.0, 5.0]]
    assert small.truth.masks[0, 1:5, 1:6].all()
    assert small.scale == (0.25, 0.25)
    assert torch.equal(returned(small.truth, small.move).boxes, returned(scene.truth, first).boxes)
    assert scene.resized(1.0) is scene
    assert np.allclose(small.image.float().mean(), image.float().mean(), atol=4)
    assert Scene(image[:1]).resized(0.5).image.shape == (1, 10, 15)
