import dataclasses

import numpy as np
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.data.scenes import MOST_OVERLAP, ComposedScenes, Scene, SceneSet
from synchromesh.models.boxes import area

SIZE = 64


@pytest.fixture(scope="module")
def sets() -> tuple[SceneSet, SceneSet]:
    return ComposedScenes(train=8, test=4).load(Preprocess(image_size=SIZE, channels=1))


def same(one: Scene, two: Scene) -> bool:
    assert one.truth is not None
    assert two.truth is not None
    return torch.equal(one.image, two.image) and torch.equal(one.truth.boxes, two.truth.boxes)


def test_scenes_to_score_on_share_neither_digits_nor_photographs_with_those_to_learn_from(sets) -> None:
    train, test = sets
    both = torch.cat([train.digits, test.digits]).flatten(1)
    assert len(both) == 5000
    assert len(both.unique(dim=0)) == len(both)
    assert not set(train.photographs.paths) & set(test.photographs.paths)


def test_a_numbered_scene_is_always_the_same_and_a_drawn_one_new(sets) -> None:
    train, test = sets
    assert same(test.read(2), test.read(2))
    assert not same(test.read(2), test.read(3))
    rng = np.random.default_rng(0)
    assert not same(train.read(2, lambda: rng), train.read(2, lambda: rng))


def test_few_scenes_are_the_same_in_every_epoch_and_others_by_another_seed(sets) -> None:
    size = Preprocess(image_size=SIZE, channels=1)
    (few, scored), (others, _) = (ComposedScenes(train=8, test=4, fixed=seed).load(size) for seed in (0, 1))
    rng = np.random.default_rng(0)
    assert same(few.read(2, lambda: rng), few.read(2, lambda: rng))
    assert not same(few.read(2, lambda: rng), few.read(3, lambda: rng))
    assert not same(few.read(2, lambda: rng), others.read(2, lambda: rng))
    assert same(scored.read(1), sets[1].read(1))


def test_boxes_are_tight_around_the_ink_and_share_little(sets) -> None:
    _, test = sets
    objects = 0
    for number in range(40):
        scene = test.read(number)
        truth = scene.truth
        assert truth.masks is not None
        objects += len(truth)
        for box, mask in zip(truth.boxes.tolist(), truth.masks, strict=True):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert scene.image[:, mask].float().mean() > 0.45 * 255  # white ink on a darkened photograph
        for i, one in enumerate(truth.boxes):
            for other in truth.boxes[:i]:
                corners = torch.cat([torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])])
                assert area(corners) <= MOST_OVERLAP * min(area(one), area(other)) + 1e-6
    assert 40 * 2 < objects < 40 * 5


def test_a_mask_is_the_digit_of_its_class(sets) -> None:
    _, test = sets
    scene, digits = test.read(0), {}
    for digit, label in zip(test.digits, test.labels.tolist(), strict=True):
        digits.setdefault(label, []).append(digit > 64)
    for box, label, mask in zip(
        scene.truth.boxes.int().tolist(), scene.truth.labels.tolist(), scene.truth.masks, strict=True
    ):
        left, top, right, bottom = box
        found = mask[top:bottom, left:right][None, None].float()

        def likeness(shape, found=found):
            rows, columns = shape.any(1).nonzero()[:, 0], shape.any(0).nonzero()[:, 0]
            tight = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][None, None].float()
            other = torch.nn.functional.interpolate(tight, found.shape[-2:], mode="bilinear") > 0.5
            return float((other == (found > 0.5)).float().mean())

        best = {name: max(likeness(shape) for shape in shapes) for name, shapes in digits.items()}
        assert max(best, key=best.get) == label


def test_a_scene_may_be_empty(sets) -> None:
    _, test = sets
    empty = dataclasses.replace(test, settings=dataclasses.replace(test.settings, fewest=0, most=0)).read(0)
    assert len(empty.truth) == 0
    assert empty.truth.boxes.shape == (0, 4)
    assert empty.truth.masks.shape == (0, SIZE, SIZE)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fewest": 6}, "6 to 5 digits"),
        ({"largest": 10}, "16 to 10 pixels"),
        ({"train": 0}, r"data\.source\.train"),
        ({"smallest": 1}, "smallest"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, says) -> None:
    with pytest.raises(ValueError, match=says):
        ComposedScenes(**wrong)
