"""Composed scenes with a value for every pixel: the digit it is of, or the background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from synchromesh.data.instances import Instances
from synchromesh.data.label_maps import LabelMap
from synchromesh.data.map_scenes import LabelledScene, PanopticScene
from synchromesh.data.moves import Move
from synchromesh.data.panoptic import Segment, SegmentMap
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import SceneSet

BACKGROUND = "background"
"""The class of the photograph under the objects: the last one, so that objects keep their labels."""

Draw = Callable[[], np.random.Generator]


@dataclass(frozen=True)
class SceneLabels:
    """Composed scenes by number, with the class of every pixel.

    Attributes:
        scenes: with masks.
    """

    scenes: SceneSet

    @property
    def classes(self) -> tuple[str, ...]:
        return (*self.scenes.settings.classes, BACKGROUND)

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int, draw: Draw | None = None) -> LabelledScene:
        """Return a scene: a new one where `draw` is given, else the fixed one of this number."""
        scene = self.scenes.read(index, draw)
        truth = LabelMap(segments_of(scene, len(self.classes) - 1).labels().astype(np.uint8))
        return LabelledScene(scene.image, truth, None if draw else truth, move=_unmoved(scene))


@dataclass(frozen=True)
class SceneSegments:
    """Composed scenes by number, with the segment of every pixel: each digit is a thing, the background is stuff.

    Attributes:
        scenes: with masks.
    """

    scenes: SceneSet

    @property
    def classes(self) -> tuple[str, ...]:
        return (*self.scenes.settings.classes, BACKGROUND)

    @property
    def things(self) -> tuple[bool, ...]:
        return (*(True for _ in self.scenes.settings.classes), False)

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int, draw: Draw | None = None) -> PanopticScene:
        """Return a scene: a new one where `draw` is given, else the fixed one of this number."""
        scene = self.scenes.read(index, draw)
        truth = segments_of(scene, len(self.classes) - 1)
        return PanopticScene(scene.image, truth, None if draw else truth, move=_unmoved(scene))


def segments_of(scene: Scene, background: int) -> SegmentMap:
    """Return the segments of a scene whose objects have masks: later ones lie over earlier ones, as they are pasted.

    Args:
        scene: with its truth.
        background: class of what no object covers, which is segment 0 of the map.
    """
    truth = scene.truth or Instances.none()
    numbers = np.zeros(tuple(scene.image.shape[1:]), dtype=np.int32)
    segments = [Segment(0, background)]
    for number, label in enumerate(truth.labels.tolist(), start=1):
        assert truth.masks is not None
        numbers[truth.masks[number - 1].numpy()] = number
        segments.append(Segment(number, label))
    return SegmentMap(numbers, tuple(segments))


def _unmoved(scene: Scene) -> Move:
    return Move.none(scene.image.shape[1], scene.image.shape[2])
