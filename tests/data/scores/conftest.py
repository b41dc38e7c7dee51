from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from synchromesh.data.annotation import Annotation
from synchromesh.data.instances import Instances

HEIGHT, WIDTH = 160, 200


@dataclass(frozen=True)
class Pixels:
    """A region that is known by its pixels."""

    pixels: np.ndarray

    def mask(self, height: int, width: int) -> np.ndarray:
        assert self.pixels.shape == (height, width)
        return self.pixels

    def moved(self, move: object) -> np.ndarray:
        raise AssertionError("scores are of whole pictures")


@dataclass(frozen=True)
class Looked:
    """A picture, what is in it, and what somebody says is in it."""

    number: int
    truth: tuple[Annotation, ...]
    found: Instances
    height: int = HEIGHT
    width: int = WIDTH


def ellipse(box: list[int]) -> np.ndarray:
    left, top, right, bottom = box
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    x = (columns + 0.5 - (left + right) / 2) / (right - left) * 2
    y = (rows + 0.5 - (top + bottom) / 2) / (bottom - top) * 2
    return x**2 + y**2 <= 1


def random_box(rng: np.random.Generator) -> list[int]:
    width, height = (int(side) for side in rng.choice([6, 20, 60, 120, 140], 2))
    left, top = int(rng.integers(0, WIDTH - width + 1)), int(rng.integers(0, HEIGHT - height + 1))
    return [left, top, left + width, top + height]


def moved(box: list[int], rng: np.random.Generator) -> list[int]:
    left, top, right, bottom = (side + int(step) for side, step in zip(box, rng.integers(-3, 4, 4), strict=True))
    left, top = max(0, left), max(0, top)
    return [left, top, min(WIDTH, max(left + 2, right)), min(HEIGHT, max(top + 2, bottom))]


def looked_at(number: int, rng: np.random.Generator) -> Looked:
    """A picture of all that makes scores hard: crowds, what is to be ignored, all sizes, equal scores, nothing."""
    truth, boxes, labels = [], [], []
    for n in range(int(rng.integers(0, 6))):
        box, label, fate = random_box(rng), int(rng.integers(0, 3)), rng.random()
        mask = ellipse(box)
        crowd, ignored = fate < 0.2, fate < 0.4
        sides = tuple(float(side) for side in box)
        truth.append(Annotation(sides, label, Pixels(mask), float(mask.sum()), ignored, crowd, 100 * number + n))
        copies = int(rng.integers(0, 3)) + 2 * crowd
        boxes += [moved(box, rng) for _ in range(copies)]
        labels += [label if rng.random() < 0.9 else 3 - label - (label > 1) for _ in range(copies)]
    for _ in range(int(rng.integers(0, 3))):
        boxes.append(random_box(rng))
        labels.append(int(rng.integers(0, 4)))
    masks = [torch.from_numpy(ellipse(box)) for box in boxes]
    found = Instances(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.from_numpy(rng.integers(1, 10, len(boxes)) / 10).float(),
        torch.stack(masks) if masks else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool),
    )
    return Looked(number, tuple(truth), found)


@pytest.fixture(scope="session")
def pictures() -> Callable[..., list[Looked]]:
    """Make random pictures with classes 0 to 3, of which class 3 is only ever found."""

    def make(count: int, seed: int) -> list[Looked]:
        rng = np.random.default_rng(seed)
        return [looked_at(number, rng) for number in range(count)]

    return make
