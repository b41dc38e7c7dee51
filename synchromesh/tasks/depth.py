"""Depth: the distance of every pixel, in metres, from one picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.data.annotated_split import AnnotatedSplit, DepthScenes
from synchromesh.data.depth_maps import DepthFolders, DepthMap, DepthPicture
from synchromesh.data.map_scenes import DepthScene
from synchromesh.data.moves import Move, Size
from synchromesh.data.overlays import shaded
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.data.pixel_sources import AnnotatedFiles, ReaderPair
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.depth import DepthErrors
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.data.value_files import UNKNOWN, depth_png
from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.depth import DepthFPN, DepthHead
from synchromesh.tasks.pixels import (
    PixelData,
    as_given,
    check_kind,
    large_map,
    opened,
    original,
    padded,
    sizes_beside,
)
from synchromesh.training.panels import Panel, Sheet
from synchromesh.training.task import (
    Answer,
    Ask,
    Batch,
    Facts,
    Number,
    Run,
    Scorer,
    Scores,
    Split,
    Splits,
    Task,
    Term,
)

WANTED = "a depth map of each picture"
TITLES = {
    "abs_rel": "AbsRel: mean |d - d'| / d",
    "sq_rel": "SqRel: mean (d - d')² / d, m",
    "rmse": "RMSE, m",
    "rmse_log": "RMSE of log d",
    "delta1": "share off by less than a factor of 1.25",
    "delta2": "of 1.25²",
    "delta3": "of 1.25³",
}


def stereo_pair() -> PixelData:
    """Return the motorcycle of scikit-image: its left part to learn from, its right part to score on."""
    return PixelData(ReaderPair(StereoPair("train"), StereoPair("test")))


@dataclass(frozen=True)
class DepthBatch(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and the distances of their pixels.

    Attributes:
        images: normalised.
        depth: metres; 0 where nobody knows, and in padding.
        sizes: height and width of each picture without its padding.
        moves: from each picture as it was.
        wholes: the distances of all its pixels as it was, to score on; None where nobody knows, or while one learns.
    """

    images: Float[Tensor, "B C H W"]
    depth: Float[Tensor, "B H W"]
    sizes: tuple[Size, ...]
    moves: tuple[Move | None, ...]
    wholes: tuple[DepthMap | None, ...]


@final
@dataclass(frozen=True)
class Depth(Task):
    """Measure the distance of every pixel. A sample is a `DepthScene`.

    Attributes:
        data: which pictures.
        head: measures by the maps of the backbone.
        nearest: least distance that is scored, metres.
        farthest: most distance that is scored, metres; None for any.
    """

    data: PixelData = field(default_factory=stereo_pair)
    head: DepthHead = field(default_factory=DepthFPN)
    nearest: float = 1e-3
    farthest: float | None = None

    unit = "pictures"
    pipeline = "depth-estimation"
    values_folder = "predicted_depth"
    numbers = (
        Number("abs_rel", "AbsRel", "{:.4f}", more_is_better=False),
        Number("rmse", "RMSE", "{:.3f}", "m", more_is_better=False),
        Number("delta1", "delta1", "{:.3f}"),
    )

    def __post_init__(self) -> None:
        if isinstance(self.data.source, ComposedScenes):
            raise ValueError("composed scenes have no distances: give files with depth, or the stereo pair")
        self.errors()  # which refuses a range that is none

    def errors(self) -> DepthErrors:
        """Return what measures errors. Raises ValueError where the range of distances is none."""
        return DepthErrors(least=self.nearest, most=math.inf if self.farthest is None else self.farthest)

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.parts(DepthPicture, WANTED)
        learnt, scored = (AnnotatedSplit(part, DepthScenes(), self.data.reading()) for part in (train, test))
        return Splits(learnt, scored, {}, (*train.notes(), *test.notes()))

    def reading(self, folder: Path) -> Depth:
        """Return this task on a folder with images/ and depth/ (`data.layouts`); millimetres, 0 unknown."""
        return dataclasses.replace(self, data=self.data.of_files(folder))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        found = AnnotatedFiles(folder).all_to_score(())
        check_kind(found, DepthPicture, WANTED)
        return AnnotatedSplit(found, DepthScenes(), self.data.reading())

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return self.head.build(backbone.build())

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> DepthBatch:
        """Put pictures together; in training all at one of the sizes of crops, which is drawn."""
        size = self.data.size_of_batch(rng)
        scenes: Sequence[DepthScene] = self.data.at_size(samples, size)
        found = padded(scenes, self.data.preprocess, device, size)
        depth = found.maps([None if one.truth is None else one.truth.metres for one in scenes], 0.0, torch.float32)
        moves, wholes = (tuple(getattr(one, name) for one in scenes) for name in ("move", "whole"))
        return DepthBatch(found.images, depth, found.sizes, moves, wholes)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, DepthBatch)
        return self.head.counts(batch.depth)

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the losses of the head, each a sum over what `counts` says."""
        assert isinstance(batch, DepthBatch)
        sums, weights = run(batch.images, sizes_beside(batch.images, batch.sizes), batch.depth), self.head.weights()
        return {name: Term(total, weights[name]) for name, total in sums.items()}

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self)

    def found(self, run: Run, batch: Batch) -> list[Float[Tensor, "H W"]]:
        """Run the model and return the distance of each picture's pixels, at the size that it had."""
        assert isinstance(batch, DepthBatch)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        metres = run(batch.images, sizes_beside(batch.images, batch.sizes)).float()
        each = zip(metres, batch.sizes, batch.moves, strict=True)
        return [as_given(own[None], size, move or Move.none(*size))[0].cpu() for own, size, move in each]

    def open(self, path: Path) -> DepthScene:
        """Read a picture of any size, scaled as those that are scored on."""
        return opened(DepthScene, path, self.data)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say the nearest, the median and the farthest distance of each picture."""
        return [Answer(_said(one), one) for one in self.found(run, batch)]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {f"{name}, m": f"{answer.said[name]:.2f}" for name in ("nearest", "median", "farthest")}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the picture, what was found and, where it is known, what is true: near is bright, far is dark."""
        maps = [answer.seen.numpy()] + ([] if sample.whole is None else [sample.whole.metres])
        known = np.concatenate([one[one > 0] for one in maps])
        near, far = (float(known.min()), float(known.max())) if len(known) else (1.0, 1.0)
        picture = enlarged(original(sample, self.data.preprocess.channels))
        row = side_by_side([picture, *(shaded(large_map(one), near, far) for one in maps)])
        said = f"{near:.2f} (bright) to {far:.2f} m (dark)"
        if sample.whole is not None:
            error = self.errors().add(torch.from_numpy(sample.whole.metres), answer.seen)
            said += f"; found, true: AbsRel {error['abs_rel']:.3f}" if error else ""
        return png(captioned(row, said))

    def values(self, answer: Answer, facts: Facts) -> bytes:
        """Return distances in units of the files that were learnt from; 0 for those too far away for 16 bits."""
        return depth_png(answer.seen.numpy(), self._unit())

    def values_about(self, facts: Facts) -> Mapping[str, Any]:
        return {"metres_of_one": self._unit(), "unknown": UNKNOWN}

    def _unit(self) -> float:
        """Return the metres of one unit in files of depth."""
        train = self.data.source.train if isinstance(self.data.source, ReaderPair) else None
        return train.scale if isinstance(train, DepthFolders) else DepthFolders.scale

    def pictures_by_default(self) -> bool:
        return True

    def panels(self, scores: Scores) -> Sequence[Panel]:
        """Show all numbers."""
        rows = [(TITLES[name], f"{value:.4f}") for name, value in scores.details["errors"].items()]
        return (Sheet("Errors of depth", ("number", "mean over pictures"), tuple(rows)),)


class _Scorer(Scorer):
    """Adds up errors of pictures at their own size."""

    def __init__(self, task: Depth) -> None:
        self._task, self._errors = task, task.errors()

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, DepthBatch)
        own = []
        for found, whole in zip(self._task.found(run, batch), batch.wholes, strict=True):
            assert whole is not None
            error = self._errors.add(torch.from_numpy(whole.metres), found)
            own.append(-error.get("abs_rel", 0.0))
        return own

    def state(self) -> Any:
        return self._errors.state()

    def scores(self, states: Sequence[Any]) -> Scores:
        """Return the means over pictures. Raises InputError where no pixel of them has a known distance."""
        found = {name: value for name, value in self._errors.numbers(states).items() if value is not None}
        if not found:
            raise InputError("no picture to score on has a pixel of known depth in the range that is scored")
        return Scores({number.name: found[number.name] for number in self._task.numbers}, {"errors": found})


def _said(metres: Float[Tensor, "H W"]) -> dict[str, Any]:
    values = {"nearest": metres.min(), "median": metres.median(), "farthest": metres.max()}
    size = {"height": metres.shape[0], "width": metres.shape[1]}
    return {**size, **{name: round(float(value), 4) for name, value in values.items()}}
