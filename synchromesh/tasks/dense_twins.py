"""Two crops of a picture, of which cells that show the same are to agree: PixPro (arXiv 2011.10043). Needs no labels.

A model is scored by whether it finds the cells of one view again in another one. Any other task can start from the
backbone's weights: give the run's folder to its `--start.weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.data.augment import normalize
from synchromesh.data.crop_views import matching
from synchromesh.data.match_picture import match_picture
from synchromesh.data.photographs import PhotographFolder, Photographs
from synchromesh.data.pictures import captioned, png
from synchromesh.data.scores.cells import found_again, raw_cells
from synchromesh.data.view_pairs import ViewData, ViewPair, ViewPairs
from synchromesh.errors import InputError
from synchromesh.models.features import Backbone, BackboneConfig
from synchromesh.models.heads.dense_agreement import AgreementConfig, Propagation
from synchromesh.models.heads.dense_twins import DenseTwins, Siamese
from synchromesh.training.mean_scorer import MeanScorer
from synchromesh.training.task import Answer, Ask, Batch, Facts, Number, Run, Scorer, Split, Splits, Task, Term


@dataclass(frozen=True)
class TwoViews(Batch):
    """Two views of each picture, of one size.

    Attributes:
        first: normalised.
        second: normalised.
        first_view: `CropView.numbers` of each.
        second_view: likewise.
        places: x and y in the second view of each pixel of the first; NaN where it is not known.
    """

    first: Float[Tensor, "B C S S"]
    second: Float[Tensor, "B C S S"]
    first_view: Float[Tensor, "B 5"]
    second_view: Float[Tensor, "B 5"]
    places: Float[Tensor, "B 2 S S"]


@final
@dataclass(frozen=True)
class ViewTwins(Task):
    """Agree with a twin that sees another crop. A sample is a `ViewPair`.

    Attributes:
        data: which pictures, and how they are cut.
        siamese: projector, and how the twin moves.
        agreement: how cells are to agree.
        radius: between cells that show the same, in diagonals of the larger cell.
    """

    data: ViewData = field(default_factory=ViewData)
    siamese: Siamese = field(default_factory=Siamese)
    agreement: AgreementConfig = field(default_factory=Propagation)
    radius: float = 0.7

    unit = "pairs of crops"
    numbers = (
        Number("found_again", "cells found again", "{:.1%}"),
        Number("by_raw_pixels", "by raw pixels", "{:.1%}"),
        Number("by_chance", "by chance", "{:.1%}"),
        Number("cosine_gap", "cosine of matched cells over others", "{:.3f}"),
    )
    watched = (Number("spread", "spread of cells, 0 where all are alike", "{:.3f}"),)

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius is {self.radius}, wanted above 0")

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.source.load(self.data.preprocess.channels)
        return Splits(ViewPairs(self.data, train, self.data.train), ViewPairs(self.data, test, self.data.test))

    def reading(self, folder: Path) -> ViewTwins:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=PhotographFolder(folder)))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        """Return pairs of crops of all photographs of a folder."""
        train, test = PhotographFolder(folder).load(self.data.preprocess.channels)
        both = dataclasses.replace(train, paths=(*train.paths, *test.paths))
        return ViewPairs(self.data, both, self.data.test)

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        built = backbone.build()
        side, stride = self.data.preprocess.image_size, cast(Backbone, built).strides[-1]
        if side % stride:
            raise InputError(
                f"data.preprocess.image_size is {side}, wanted a multiple of {stride}, the pixels of a cell's side: "
                "the cells of two crops can be matched only where they fill these"
            )
        return DenseTwins(built, self.siamese, self.agreement)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> TwoViews:
        size = self.data.preprocess
        side = size.image_size
        if not samples:
            blank, views = torch.zeros(0, size.channels, side, side), torch.zeros(0, 5)
            return TwoViews(blank, blank, views, views, torch.zeros(0, 2, side, side)).to(device)
        pairs = cast(Sequence[ViewPair], samples)
        first, second = torch.stack([pair.first for pair in pairs]), torch.stack([pair.second for pair in pairs])
        return TwoViews(
            normalize(first.to(device), size),
            normalize(second.to(device), size),
            torch.tensor([pair.first_view.numbers for pair in pairs], device=device),
            torch.tensor([pair.second_view.numbers for pair in pairs], device=device),
            torch.stack([pair.places for pair in pairs]).to(device),
        )

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"disagreement": len(batch), "spread": len(batch)}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the disagreement of all pictures; the spread of what the model says is only watched."""
        assert isinstance(batch, TwoViews)
        side = -(-batch.first.shape[2] // cast(Backbone, run.model.get_submodule("backbone")).strides[-1])
        near = matching(batch.first_view, batch.second_view, side, side, radius=self.radius)
        found = run(batch.first, batch.second, near)
        return {"disagreement": Term(found["disagreement"]), "spread": Term(found["spread"] * len(batch), 0.0)}

    def after_step(self, model: nn.Module) -> None:
        assert isinstance(model, DenseTwins)
        model.after_step()

    def scorer(self, facts: Facts) -> Scorer:
        return MeanScorer(self.numbers, self._measured)

    def _measured(self, run: Run, batch: Batch) -> Mapping[str, Tensor]:
        """Return how many cells are found again by the backbone's features, by raw pixels, and by chance."""
        assert isinstance(batch, TwoViews)
        one, other = (_last(run, images) for images in (batch.first, batch.second))
        own = found_again(one, other, batch.places, radius=self.radius)
        pixels, others = (raw_cells(images, one.shape[1]) for images in (batch.first, batch.second))
        raw = found_again(pixels, others, batch.places, radius=self.radius)
        return {
            "found_again": own.share,
            "by_raw_pixels": raw.share,
            "by_chance": own.chance,
            "cosine_gap": own.gap,
        }

    def open(self, path: Path) -> ViewPair:
        """Read a picture, and cut two views of it, the same ones every time."""
        return ViewPairs(self.data, Photographs((path,), self.data.preprocess.channels), 1).read(0)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Find the cells of each first view again in the second one."""
        assert isinstance(batch, TwoViews)
        one, other = (_last(run, images) for images in (batch.first, batch.second))
        found = found_again(one, other, batch.places, radius=self.radius)
        each = zip(
            found.share.tolist(),
            found.cells.tolist(),
            found.best.cpu(),
            found.right.cpu(),
            found.known.cpu(),
            strict=True,
        )
        return [
            Answer({"found_again": round(share, 4), "cells": int(cells)}, (best, right, known))
            for share, cells, best, right, known in each
        ]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {"cells found again": f"{answer.said['found_again']:.0%} of {answer.said['cells']}"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw both views, and a line from each cell to the one that it was taken for."""
        best, right, known = (values.numpy() for values in answer.seen)
        side = sample.first.shape[-1]
        count = round(len(best) ** 0.5)
        cells = (np.stack([np.arange(len(best)) % count, np.arange(len(best)) // count], 1) + 0.5) * (side / count)
        ends = np.concatenate([cells, cells[best]], 1)[known]
        picture = match_picture(sample.first.numpy(), sample.second.numpy(), ends, right[known])
        said = answer.said
        return png(captioned(picture, f"{said['found_again']:.0%} of {said['cells']} cells found again"))

    def pictures_by_default(self) -> bool:
        return True


def _last(run: Run, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B H W D"]:
    return run.model.get_submodule("backbone")(images).last.float()
