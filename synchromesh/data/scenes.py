"""Scenes composed of real digits on real photographs, with exact boxes and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.images import Preprocess
from synchromesh.data.instances import Instances
from synchromesh.data.photographs import PackagePhotographs, Photographs, PhotographSource
from synchromesh.data.scene import Scene
from synchromesh.data.sources import MnistDigits
from synchromesh.errors import at_least

LEAST_INK = 64  # of 255, from which a pixel belongs to a digit
BACKGROUND_BRIGHTNESS = 0.45  # of the photograph's own, so that white ink stands out
MOST_OVERLAP = 0.1  # common area of two boxes over the smaller one's area
PLACES_TRIED = 8  # for a digit, before it is left out
BACKGROUND_SCALE = (0.15, 0.6)  # least and most side of a background over its photograph's shorter side


@dataclass(frozen=True)
class ComposedScenes:
    """Digits of MNIST pasted on crops of photographs: every training scene is a new one, unless they are few.

    Scenes to learn from and scenes to score on share neither digits nor photographs.

    Attributes:
        photographs: of the backgrounds.
        train: scenes of an epoch.
        test: scenes to score on, the same ones always.
        fewest: digits of a scene, at least.
        most: digits of a scene, at most.
        smallest: side of a digit, pixels, at least.
        largest: side of a digit, pixels, at most.
        fixed: seed of the scenes to learn from, which then are the same ones in every epoch, as where few were
            annotated; none for new ones.
    """

    photographs: PhotographSource = field(default_factory=PackagePhotographs)
    train: int = 2048
    test: int = 200
    fewest: int = 2
    most: int = 5
    smallest: int = 16
    largest: int = 39
    fixed: int | None = None

    def __post_init__(self) -> None:
        at_least("data.source.", self, train=1, test=1, fewest=0, most=0, smallest=4)
        if self.most < self.fewest or self.largest < self.smallest:
            raise ValueError(
                f"data.source has {self.fewest} to {self.most} digits of {self.smallest} to {self.largest} pixels, "
                "wanted the smaller number first"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def load(self, preprocess: Preprocess) -> tuple[SceneSet, SceneSet]:
        """Return the scenes to learn from and those to score on. Raises InputError where a package is missing."""
        digits = MnistDigits().load(Preprocess(image_size=28))
        photographs = self.photographs.load(preprocess.channels)
        sets = []
        for images, own, count in zip((digits.train, digits.test), photographs, (self.train, self.test), strict=True):
            pixels = torch.stack([images.read(i)[0] for i in range(len(images))])
            sets.append(SceneSet(self, preprocess.image_size, pixels, images.labels, own, count))
        return dataclasses.replace(sets[0], fixed=self.fixed), sets[1]


@dataclass(frozen=True)
class SceneSet:
    """Scenes by number, composed when they are read.

    Attributes:
        settings: how they are composed.
        size: side of a scene, pixels.
        digits: the ink of each digit.
        labels: its class.
        photographs: of the backgrounds.
        count: scenes in all.
        fixed: seed of scenes that are never new; none for new ones where one learns.
    """

    settings: ComposedScenes
    size: int
    digits: UInt8[Tensor, "N 28 28"]
    labels: Tensor
    photographs: Photographs
    count: int
    fixed: int | None = None

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Callable[[], np.random.Generator] | None = None) -> Scene:
        """Return a scene: a new one where `draw` is given, else the fixed one of this number."""
        fresh = draw if self.fixed is None else None
        return self._composed(seeds.numpy_generator(self.fixed or 0, seeds.SPLIT, index) if fresh is None else fresh())

    def _composed(self, rng: np.random.Generator) -> Scene:
        ground = self.photographs.crop(self.size, rng, scale=BACKGROUND_SCALE).float() * BACKGROUND_BRIGHTNESS
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        masks: list[Tensor] = []
        for _ in range(int(rng.integers(self.settings.fewest, self.settings.most + 1))):
            number = int(rng.integers(len(self.digits)))
            side = int(rng.integers(self.settings.smallest, self.settings.largest + 1))
            ink = _resized(self.digits[number], min(side, self.size))
            place = self._free_place(ink, boxes, rng)
            if place is None:
                continue
            top, left, box = place
            spot = ground[:, top : top + ink.shape[0], left : left + ink.shape[1]]
            alpha = ink.float() / 255
            spot.copy_(spot * (1 - alpha) + 255 * alpha)
            mask = torch.zeros(self.size, self.size, dtype=torch.bool)
            mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink > LEAST_INK
            boxes.append(box)
            labels.append(int(self.labels[number]))
            masks.append(mask)
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        stacked = torch.stack(masks) if masks else torch.zeros(0, self.size, self.size, dtype=torch.bool)
        truth = Instances(found, torch.tensor(labels, dtype=torch.int64), masks=stacked)
        return Scene(ground.round().clamp(0, 255).to(torch.uint8), truth)

    def _free_place(
        self, ink: Tensor, boxes: list[tuple[int, int, int, int]], rng: np.random.Generator
    ) -> tuple[int, int, tuple[int, int, int, int]] | None:
        """Draw a place that shares little with other boxes; return top, left, and the tight box of the ink there."""
        rows, columns = (ink > LEAST_INK).any(1).nonzero()[:, 0], (ink > LEAST_INK).any(0).nonzero()[:, 0]
        if not len(rows):
            return None
        # The tight box around the ink, inside the digit's square.
        inner = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        for _ in range(PLACES_TRIED):
            top, left = (int(rng.integers(self.size - side + 1)) for side in ink.shape)
            box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
            if all(_shared(box, other) <= MOST_OVERLAP for other in boxes):
                return top, left, box
        return None


def _resized(ink: UInt8[Tensor, "28 28"], side: int) -> UInt8[Tensor, "S S"]:
    picture = Image.fromarray(ink.numpy()).resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture, dtype=np.uint8))


def _shared(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Return the common area over that of the smaller box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(0, width) * max(0, height) / min(areas)
