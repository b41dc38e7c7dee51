"""Annotated pictures as samples of a task: read, moved, recoloured; the same way for objects and for every pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, final

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from synchromesh.data.annotated import Annotated
from synchromesh.data.annotation import AnnotatedPicture, Annotation
from synchromesh.data.colors import RandomColors
from synchromesh.data.depth_maps import DepthMap, DepthPicture
from synchromesh.data.files import read_picture
from synchromesh.data.label_maps import LabelledPicture, LabelMap
from synchromesh.data.map_scenes import DepthScene, LabelledScene, MapScene, PanopticScene
from synchromesh.data.mosaic import SCENES, Mosaic
from synchromesh.data.moves import Fit, Move, RandomMoves
from synchromesh.data.panoptic import PanopticPicture, SegmentMap
from synchromesh.data.scene import Scene, instances
from synchromesh.errors import UnreadableError

P = TypeVar("P", AnnotatedPicture, LabelledPicture, PanopticPicture, DepthPicture)
S = TypeVar("S", Scene, LabelledScene, PanopticScene, DepthScene)
Draw = Callable[[], np.random.Generator]


@dataclass(frozen=True)
class Reading:
    """How pictures become images of a model.

    Attributes:
        channels: 1 for grey, 3 for colour.
        fit: how a whole picture is scaled to be scored on or predicted.
        moves: what is drawn for each training crop; None for whole pictures.
        colors: other colours in training; None for their own.
        mosaic: four samples as one in training, of objects only.
    """

    channels: int = 3
    fit: Fit = field(default_factory=lambda: Fit(shorter=800, longer=1333))
    moves: RandomMoves | None = field(default_factory=RandomMoves)
    colors: RandomColors | None = None
    mosaic: Mosaic = field(default_factory=Mosaic)

    def move(self, image: Image.Image, rng: np.random.Generator | None) -> Move:
        """Return the move of a picture; a random one where there is a generator."""
        if rng is None or self.moves is None:
            return self.fit.move(image.height, image.width)
        return self.moves.draw(image.height, image.width, rng)

    def pixels(self, image: Image.Image, move: Move, rng: np.random.Generator | None) -> UInt8[Tensor, "C H W"]:
        """Return the pixels of a crop; recoloured where there is a generator."""
        found = move.pixels(image)
        return found if rng is None or self.colors is None else self.colors(found, rng)

    def unknown(self, path: Path) -> Scene:
        """Read a file that nobody has annotated, upright, as it is scored. Raises UnreadableError."""
        image = read_picture(path, self.channels)
        move = self.move(image, None)
        picture = AnnotatedPicture(path, 0, image.height, image.width)
        return Scene(move.pixels(image), None, move.scale, picture, move)


@dataclass(frozen=True)
class Cut:
    """A crop of a picture.

    Attributes:
        image: its pixels.
        move: from the picture.
        learning: whether it is learnt from; else it is scored on.
    """

    image: UInt8[Tensor, "C H W"]
    move: Move
    learning: bool


class Kind(ABC, Generic[P, S]):
    """What is made of a picture and its truth."""

    @abstractmethod
    def sample(self, picture: P, truth: Any, cut: Cut, least_visible: float) -> S:
        """Return the sample of a crop. Raises UnreadableError."""


@final
@dataclass(frozen=True)
class ObjectScenes(Kind[AnnotatedPicture, Scene]):
    """Objects with boxes.

    Attributes:
        masks: and with their pixels; what has no region is then left out.
    """

    masks: bool = False

    def sample(self, picture: AnnotatedPicture, truth: Sequence[Annotation], cut: Cut, least_visible: float) -> Scene:
        least = least_visible if cut.learning else 0.0
        try:
            found = instances(truth, cut.move, masks=self.masks, least_visible=least)
        except ValueError as error:
            raise UnreadableError(picture.path, str(error)) from error
        return Scene(cut.image, found, cut.move.scale, picture, cut.move)


@final
@dataclass(frozen=True)
class LabelScenes(Kind[LabelledPicture, LabelledScene]):
    """The class of every pixel."""

    def sample(self, picture: LabelledPicture, truth: LabelMap, cut: Cut, least_visible: float) -> LabelledScene:
        return _map_scene(LabelledScene, picture, truth, cut)


@final
@dataclass(frozen=True)
class PanopticScenes(Kind[PanopticPicture, PanopticScene]):
    """The segment of every pixel."""

    def sample(self, picture: PanopticPicture, truth: SegmentMap, cut: Cut, least_visible: float) -> PanopticScene:
        return _map_scene(PanopticScene, picture, truth, cut)


@final
@dataclass(frozen=True)
class DepthScenes(Kind[DepthPicture, DepthScene]):
    """The distance of every pixel."""

    def sample(self, picture: DepthPicture, truth: DepthMap, cut: Cut, least_visible: float) -> DepthScene:
        return _map_scene(DepthScene, picture, truth, cut)


@final
@dataclass(frozen=True)
class AnnotatedSplit(Generic[P, S]):
    """Annotated pictures by number, as a `Split` of a task.

    Attributes:
        annotated: the pictures.
        kind: what is made of them.
        reading: how.
    """

    annotated: Annotated[P]
    kind: Kind[P, S]
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if self.reading.mosaic.chance > 0 and not isinstance(self.kind, ObjectScenes):
            raise ValueError(f"a mosaic is made of objects, and not of {type(self.kind).__name__}: set its chance to 0")
        if self.reading.mosaic.chance > 0 and self.reading.moves is None:
            raise ValueError("a mosaic has the size of training crops: give moves, or set its chance to 0")

    def __len__(self) -> int:
        return len(self.annotated)

    def read(self, index: int, draw: Draw | None = None) -> S:
        """Return a sample: a random crop where `draw` is given, else the whole picture, to be scored on.

        Raises:
            UnreadableError: a file is not readable, or an annotation makes no sense.
        """
        rng = None if draw is None else draw()
        sample = self._sample(index, rng)
        mosaic, moves = self.reading.mosaic, self.reading.moves
        if rng is None or moves is None or mosaic.chance == 0 or rng.random() >= mosaic.chance:
            return sample
        four: list[Any] = [sample]
        four += [self._sample(int(rng.integers(len(self))), rng) for _ in range(SCENES - 1)]
        return cast(S, mosaic.joined(four, moves.largest(), rng, moves.least_visible))

    def _sample(self, index: int, rng: np.random.Generator | None) -> S:
        picture, reading = self.annotated.pictures[index], self.reading
        image, truth = picture.opened(reading.channels)
        move = reading.move(image, rng)
        cut = Cut(reading.pixels(image, move, rng), move, learning=rng is not None)
        least_visible = reading.moves.least_visible if reading.moves is not None else 0.0
        return self.kind.sample(picture, truth, cut, least_visible)


M = TypeVar("M", bound=MapScene[Any, Any])


def _map_scene(scene: type[M], picture: Any, truth: Any, cut: Cut) -> M:
    return scene(cut.image, truth.moved(cut.move), None if cut.learning else truth, picture, cut.move)
