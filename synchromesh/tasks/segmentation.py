"""Segmentation: the class of every pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from synchromesh.data.annotated_split import AnnotatedSplit, LabelScenes
from synchromesh.data.label_maps import LabelledPicture, LabelMap
from synchromesh.data.map_scenes import LabelledScene
from synchromesh.data.moves import Move, Size
from synchromesh.data.overlays import class_colors, legend, overlaid
from synchromesh.data.pictures import enlarged, png, side_by_side
from synchromesh.data.pixel_sources import AnnotatedFiles
from synchromesh.data.scene_maps import SceneLabels
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.labels import LabelNumbers, LabelScores
from synchromesh.data.value_files import indices_png
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.semantic import SemanticFPN, SemanticHead
from synchromesh.tasks.pixels import (
    UNKNOWN,
    PixelData,
    check_kind,
    large_map,
    opened,
    original,
    padded,
    sizes_beside,
)
from synchromesh.tasks.viewed import seen_by_pixels
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
from synchromesh.training.views import Views

WANTED = "a label map of each picture"
CLASSES_AT_ONCE = 16  # whose logits are in memory at a picture's own size at a time


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and the classes of their pixels.

    Attributes:
        images: normalised.
        labels: classes; `UNKNOWN` where nobody knows, and in padding.
        sizes: height and width of each picture without its padding.
        moves: from each picture as it was.
        wholes: the classes of all its pixels as it was, to score on; None where nobody knows, or while one learns.
    """

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B H W"]
    sizes: tuple[Size, ...]
    moves: tuple[Move | None, ...]
    wholes: tuple[LabelMap | None, ...]


@final
@dataclass(frozen=True)
class Segmentation(Task):
    """Name the class of every pixel. A sample is a `LabelledScene`.

    Attributes:
        data: which pictures.
        head: names pixels by the maps of the backbone.
    """

    data: PixelData = field(default_factory=PixelData)
    head: SemanticHead = field(default_factory=SemanticFPN)

    unit = "pictures"
    pipeline = "image-segmentation"
    values_folder = "predicted_labels"
    numbers = (
        Number("mIoU", "mIoU", "{:.3f}"),
        Number("mean_accuracy", "mean accuracy", "{:.3f}"),
        Number("pixel_accuracy", "pixel accuracy", "{:.3f}"),
    )

    def splits(self, *, seed: int) -> Splits:
        source = self.data.source
        if isinstance(source, ComposedScenes):
            train, test = (SceneLabels(own) for own in source.load(self.data.preprocess))
            return Splits(train, test, {"classes": list(train.classes)})
        train, test = self.data.parts(LabelledPicture, WANTED)
        learnt, scored = (AnnotatedSplit(part, LabelScenes(), self.data.reading()) for part in (train, test))
        return Splits(learnt, scored, {"classes": list(train.classes)}, (*train.notes(), *test.notes()))

    def reading(self, folder: Path) -> Segmentation:
        """Return this task on a folder of any layout with label maps (`data.layouts`)."""
        return dataclasses.replace(self, data=self.data.of_files(folder))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        found = AnnotatedFiles(folder).all_to_score(tuple(facts["classes"]))
        check_kind(found, LabelledPicture, WANTED)
        return AnnotatedSplit(found, LabelScenes(), self.data.reading())

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return self.head.build(backbone.build(), len(facts["classes"]))

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> LabelledBatch:
        """Put pictures together; in training all at one of the sizes of crops, which is drawn."""
        size = self.data.size_of_batch(rng)
        scenes: Sequence[LabelledScene] = self.data.at_size(samples, size)
        found = padded(scenes, self.data.preprocess, device, size)
        labels = found.maps([None if one.truth is None else _known(one.truth) for one in scenes], UNKNOWN, torch.int64)
        moves, wholes = (tuple(getattr(one, name) for one in scenes) for name in ("move", "whole"))
        return LabelledBatch(found.images, labels, found.sizes, moves, wholes)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, LabelledBatch)
        return self.head.counts(batch.labels, ignore=UNKNOWN)

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the losses of the head, each a sum over what `counts` says."""
        assert isinstance(batch, LabelledBatch)
        sums = run(batch.images, sizes_beside(batch.images, batch.sizes), batch.labels, ignore=UNKNOWN)
        weights = self.head.weights()
        return {name: Term(total, weights[name]) for name, total in sums.items()}

    def viewed(self, run: Run, views: Views) -> Run:
        return seen_by_pixels(run, views)

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self, tuple(facts["classes"]))

    def found(self, run: Run, batch: Batch) -> list[Int[Tensor, "H W"]]:
        """Run the model and return the classes of each picture's pixels, at the size that it had."""
        assert isinstance(batch, LabelledBatch)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        logits = run(batch.images, sizes_beside(batch.images, batch.sizes))
        found = []
        for own, size, move in zip(logits, batch.sizes, batch.moves, strict=True):
            found.append(likeliest(own[:, : size[0], : size[1]], size if move is None else move.source).cpu())
        return found

    def open(self, path: Path) -> LabelledScene:
        """Read a picture of any size, scaled as those that are scored on."""
        return opened(LabelledScene, path, self.data)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say which share of each picture's pixels every class has, the largest first."""
        return [
            Answer(_said(one, facts["classes"], ask), (one, tuple(facts["classes"]))) for one in self.found(run, batch)
        ]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        shares = [f"{one['class']} {one['share']:.1%}" for one in answer.said["classes"]]
        return {"most": shares[0] if shares else "-", "then": ", ".join(shares[1:]) or "-"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the picture at its own size with the classes that were found; beside it, where known, the true ones."""
        labels, classes = answer.seen
        colors, picture = class_colors(len(classes)), original(sample, self.data.preprocess.channels)
        maps = [labels.numpy()] + ([] if sample.whole is None else [_known(sample.whole)])
        shown = side_by_side([overlaid(enlarged(picture), large_map(one), colors) for one in maps])
        there = sorted({label for one in maps for label in np.unique(one).tolist() if label != UNKNOWN})
        names = legend([classes[label] for label in there], colors[there], shown.shape[1])
        return png(np.concatenate([shown, names]))

    def values(self, answer: Answer, facts: Facts) -> bytes:
        """Return the class of every pixel: its place among the classes, from 0."""
        labels, classes = answer.seen
        return indices_png(labels.numpy(), len(classes))

    def values_about(self, facts: Facts) -> Mapping[str, Any]:
        return {"classes": list(facts["classes"])}

    def pictures_by_default(self) -> bool:
        return True

    def about(self, facts: Facts) -> str:
        return f"{len(facts['classes']):,} classes"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        """Show each class, the worst first, and which classes are taken for which."""
        return label_panels(scores.details)


class _Scorer(Scorer):
    """Counts pixels by their class and the one they were given, at each picture's own size."""

    def __init__(self, task: Segmentation, classes: tuple[str, ...]) -> None:
        self._task, self._scores = task, LabelScores(classes, ignore=UNKNOWN)

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, LabelledBatch)
        own = []
        for found, whole in zip(self._task.found(run, batch), batch.wholes, strict=True):
            assert whole is not None
            own.append(self._scores.add(torch.from_numpy(_known(whole)), found))
        return own

    def state(self) -> Int[Tensor, "N N"]:
        return self._scores.state()

    def scores(self, states: Sequence[Int[Tensor, "N N"]]) -> Scores:
        found = self._scores.numbers(states)
        three = (found.miou, found.mean_accuracy, found.pixel_accuracy)
        named = zip(self._task.numbers, three, strict=True)
        return Scores({number.name: value or 0.0 for number, value in named}, label_details(found))


def likeliest(logits: Float[Tensor, "N _ _"], size: Size) -> Int[Tensor, "H W"]:
    """Return the class with the largest logit of each pixel, once the logits are brought to a size, bilinear.

    Some classes at a time: 150 classes of a picture of 12 million pixels would take 7 GB.
    """
    best = labels = None
    for start in range(0, len(logits), CLASSES_AT_ONCE):
        part = logits[None, start : start + CLASSES_AT_ONCE].float()
        if tuple(part.shape[2:]) != size:
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        value, label = part[0].max(0)
        if best is None or labels is None:
            best, labels = value, label
        else:
            better = value > best
            best, labels = torch.where(better, value, best), torch.where(better, label + start, labels)
    assert labels is not None
    return labels


def label_details(numbers: LabelNumbers) -> dict[str, Any]:
    """Return numbers as plain JSON values.

    classes    of each class IoU, accuracy and pixels; None where there was nothing to label
    confused   the pairs of classes with the most pixels: truth, found, pixels, share of the true class
    """
    classes = {
        name: {"IoU": iou, "accuracy": numbers.accuracy[name], "pixels": numbers.pixels[name]}
        for name, iou in numbers.iou.items()
    }
    return {"classes": classes, "confused": [dataclasses.asdict(pair) for pair in numbers.confused]}


def label_panels(details: Mapping[str, Any]) -> Sequence[Panel]:
    """Return the panels of what `label_details` made."""
    classes = details["classes"]
    total = max(1, sum(own["pixels"] for own in classes.values()))
    worst = sorted(classes, key=lambda name: (classes[name]["IoU"] is None, classes[name]["IoU"] or 0.0))
    rows = [
        (name, _cell(own["IoU"]), _cell(own["accuracy"]), f"{own['pixels']:,}", f"{own['pixels'] / total:.2%}")
        for name, own in ((name, classes[name]) for name in worst)
    ]
    pairs = [
        (pair["truth"], pair["found"], f"{pair['pixels']:,}", f"{pair['share']:.1%}") for pair in details["confused"]
    ]
    return (
        Sheet("Classes, the worst first", ("class", "IoU", "accuracy", "pixels", "share"), tuple(rows)),
        Sheet("Most confused", ("truth", "found", "pixels", "of the true class"), tuple(pairs)),
    )


def _known(labels: LabelMap) -> Integer[np.ndarray, "H W"]:
    """Return labels with `UNKNOWN` in place of what the files have for it."""
    values = labels.values.astype(np.int32)
    return np.where(values == labels.ignore, np.int32(UNKNOWN), values)


def _said(found: Int[Tensor, "H W"], classes: Sequence[str], ask: Ask) -> dict[str, Any]:
    shares = found.flatten().bincount(minlength=len(classes)).double() / max(1, found.numel())
    order = [label for label in shares.argsort(descending=True, stable=True).tolist() if shares[label] > 0]
    told = [{"class": classes[label], "share": round(float(shares[label]), 6)} for label in order]
    told = [one for one in told if one["share"] >= (ask.least or 0)]
    return {"height": found.shape[0], "width": found.shape[1], "classes": told[: ask.top]}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
