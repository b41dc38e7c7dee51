"""Pairs of views as samples: what tasks that see a scene twice share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.augment import normalize
from synchromesh.data.colors import RandomColors
from synchromesh.data.images import Preprocess
from synchromesh.data.scene_pairs import Pairs, PairSource, PhotographCrops, ScenePair, StereoCrops
from synchromesh.errors import at_least
from synchromesh.training.task import Draw

LEARNT_SHARE = 0.7  # of a stereo scene's width; the rest is scored on


def gentle_colors() -> RandomColors:
    """Return changes of colour as of another camera: no negatives, no channels that change places."""
    return RandomColors(contrast=(0.7, 1.3), brightness=0.1, invert=0.0, permute=0.0)


@dataclass(frozen=True)
class PairData:
    """Which pairs of views, and how they become the model's input.

    Attributes:
        learnt: pairs to learn from.
        also: more of them, from photographs; none for no such.
        also_share: of the pairs to learn from that are of these.
        scored: pairs to score on.
        wrong: scenes whose second views stand for a wrong one.
        preprocess: size, channels, normalisation.
        train: pairs of an epoch.
        test: pairs to score on, the same ones always.
        colors: random changes of colour, the same of both views; none for their own.
    """

    learnt: PairSource = field(default_factory=lambda: StereoCrops(stop=LEARNT_SHARE))
    also: PhotographCrops | None = field(default_factory=PhotographCrops)
    also_share: float = 0.5
    scored: PairSource = field(default_factory=lambda: StereoCrops(start=LEARNT_SHARE))
    wrong: PhotographCrops = field(default_factory=lambda: PhotographCrops(held_out=True))
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    train: int = 1024
    test: int = 128
    colors: RandomColors | None = field(default_factory=gentle_colors)

    def __post_init__(self) -> None:
        at_least("data.", self, train=1, test=1)
        if not 0 <= self.also_share <= 1:
            raise ValueError(f"also_share is {self.also_share}, wanted a share of the pairs to learn from")

    def of_folder(self, folder: Path) -> PairData:
        """Return pairs of a folder's photographs, a fixed fifth of which is scored on; wrong views are of others."""
        crops = self.also or PhotographCrops()
        learnt, held = (crops.of_folder(folder, held_out=out) for out in (False, True))
        return dataclasses.replace(self, learnt=learnt, also=None, scored=held, wrong=learnt)

    def splits(self) -> tuple[PairSet, PairSet]:
        """Return the pairs to learn from and those to score on. Raises InputError where they are not there."""
        channels = self.preprocess.channels
        also = None if self.also is None or not self.also_share else self.also.load(channels)
        learnt = PairSet(self, self.learnt.load(channels), also, None, self.train)
        scored = PairSet(self, self.scored.load(channels), None, self.wrong.load(channels), self.test)
        return learnt, scored

    def one_of(self, path: Path) -> ScenePair:
        """Return two crops of a file's picture, the same ones every time. Raises UnreadableError."""
        crops = self.also or PhotographCrops()
        rng = seeds.numpy_generator(0, seeds.SPLIT)
        return crops.of(path, self.preprocess.channels).cut(self.preprocess.image_size, rng)

    def normalized(self, views: list[UInt8[Tensor, "C S S"]], device: torch.device) -> Float[Tensor, "B C S S"]:
        """Return views, perhaps none, as the model sees them."""
        size = self.preprocess
        if not views:
            return torch.zeros(0, size.channels, size.image_size, size.image_size, device=device)
        return normalize(torch.stack(views).to(device), size)


@dataclass(frozen=True)
class DrawnPair:
    """A pair, and what else is drawn with it.

    Attributes:
        pair: two views.
        wrong: a view of another scene; None where one learns.
        rng: for what else a task draws.
    """

    pair: ScenePair
    wrong: UInt8[Tensor, "C S S"] | None
    rng: np.random.Generator


@dataclass(frozen=True)
class PairSet:
    """Pairs by number, cut when they are read.

    Attributes:
        data: says how.
        pairs: to cut from.
        also: more of them; none for no such.
        wrong: of other scenes; none where one learns.
        count: pairs in all.
    """

    data: PairData
    pairs: Pairs
    also: Pairs | None
    wrong: Pairs | None
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Draw | None = None) -> DrawnPair:
        """Return a pair: a new one where `draw` is given, else the fixed one of this number."""
        rng = seeds.numpy_generator(0, seeds.SPLIT, index) if draw is None else draw()
        side, source = self.data.preprocess.image_size, self.pairs
        if self.also is not None and rng.random() < self.data.also_share:
            source = self.also
        pair = source.cut(side, rng)
        if draw is not None and self.data.colors is not None:
            both = self.data.colors(torch.cat((pair.first, pair.second), 1), rng)
            pair = ScenePair(both[:, :side], both[:, side:], pair.disparity)
        wrong = None if self.wrong is None else self.wrong.cut(side, rng).second
        return DrawnPair(pair, wrong, rng)
