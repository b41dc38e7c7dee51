import numpy as np
import torch

from synchromesh.data.images import Preprocess
from synchromesh.data.instances import Instances
from synchromesh.data.moves import Move
from synchromesh.data.scene import Scene
from synchromesh.data.scene_maps import SceneLabels, SceneSegments, segments_of
from synchromesh.data.scenes import ComposedScenes

TRAIN, TEST = ComposedScenes(train=3, test=3).load(Preprocess(image_size=64))


def test_what_is_pasted_later_lies_over_what_was_before() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :3, :3], masks[1, 2:, 2:] = True, True
    truth = Instances(torch.zeros(2, 4), torch.tensor([7, 3]), masks=masks)
    found = segments_of(Scene(torch.zeros(1, 4, 4, dtype=torch.uint8), truth), 10)
    assert found.numbers.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 2, 2], [0, 0, 2, 2]]
    assert [one.label for one in found.segments] == [10, 7, 3]
    assert not any(one.crowd for one in found.segments)


def test_a_scene_without_objects_is_background_all_over() -> None:
    found = segments_of(Scene(torch.zeros(1, 3, 5, dtype=torch.uint8), Instances.none()), 10)
    assert found.labels().tolist() == [[10] * 5] * 3


def test_labels_and_segments_are_those_of_the_scene_with_its_boxes() -> None:
    labels, segments = SceneLabels(TEST), SceneSegments(TEST)
    assert labels.classes == segments.classes == (*"0123456789", "background")
    assert segments.things == (True,) * 10 + (False,)
    assert (len(labels), len(segments)) == (3, 3)
    for number in range(3):
        scene, one, other = TEST.read(number), labels.read(number), segments.read(number)
        assert torch.equal(one.image, scene.image)
        assert torch.equal(other.image, scene.image)
        assert np.array_equal(other.truth.labels(), one.truth.values)
        assert [found.label for found in other.truth.segments[1:]] == scene.truth.labels.tolist()
        assert np.array_equal(one.truth.values != 10, scene.truth.masks.any(0).numpy())
        assert one.move == other.move == Move.none(64, 64)
        assert one.whole is one.truth
        assert other.whole is other.truth


def test_training_scenes_are_new_ones_and_are_not_scored_on() -> None:
    one, other = (SceneLabels(TRAIN).read(0, lambda seed=seed: np.random.default_rng(seed)) for seed in range(2))
    assert not torch.equal(one.image, other.image)
    assert one.whole is None
    assert SceneSegments(TRAIN).read(0, lambda: np.random.default_rng(0)).whole is None
