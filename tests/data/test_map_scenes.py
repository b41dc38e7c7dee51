import numpy as np
import torch

from synchromesh.data.depth_maps import DepthMap
from synchromesh.data.label_maps import LabelMap
from synchromesh.data.map_scenes import DepthScene, LabelledScene, PanopticScene
from synchromesh.data.moves import Move
from synchromesh.data.panoptic import Segment, SegmentMap

IMAGE = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
VALUES = np.repeat(np.repeat(np.array([[0, 1, 2], [3, 4, 255]]), 2, 0), 2, 1)


def test_what_is_true_of_pixels_stays_with_them_in_another_size() -> None:
    scenes = (
        LabelledScene(IMAGE, LabelMap(VALUES.astype(np.uint8))),
        PanopticScene(IMAGE, SegmentMap.of(VALUES, [Segment(n, n) for n in range(5)])),
        DepthScene(IMAGE, DepthMap(VALUES.astype(np.float32))),
    )
    labelled, panoptic, depth = (scene.resized(0.5) for scene in scenes)
    assert labelled.labels.tolist() == [[0, 1, 2], [3, 4, 255]]
    assert labelled.labels.dtype == torch.int64
    assert panoptic.truth.numbers.tolist() == [[0, 1, 2], [3, 4, -1]]
    assert depth.depth.tolist() == [[0.0, 1, 2], [3, 4, 255]]
    assert labelled.image.shape == (3, 2, 3)
    assert all(scene.resized(1.0) is scene for scene in scenes)


def test_the_way_back_and_what_is_scored_on_are_kept() -> None:
    whole, first = LabelMap(VALUES), Move((4, 6), (4, 6), flip=True)
    scene = LabelledScene(IMAGE, whole.moved(first), whole, None, first).resized(0.5)
    assert scene.whole is whole
    assert scene.move == first.then(Move((4, 6), (2, 3), (0.5, 0.5)))
    assert scene.labels.tolist() == [[2, 1, 0], [255, 4, 3]]
    unknown = LabelledScene(IMAGE).resized(0.5)
    assert unknown.truth is None
