"""DenseKind: the dense tasks that one model may do at once, what each learns from and is scored by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.data.dense_targets import UNKNOWN, DenseTargets
from synchromesh.data.scores.labels import LabelScores
from synchromesh.data.scores.thresholds import ThresholdScores, best_f, best_iou
from synchromesh.models.heads.multi_task import balanced_cross_entropy
from synchromesh.models.heads.semantic import summed_cross_entropy
from synchromesh.training.task import Number

PIXELS = 10.0  # of an offset that the head says as 1


class DenseKind(Enum):
    """A dense task of `MultiTask`."""

    SEMANTIC = "semantic"  # the class of each pixel
    SALIENCY = "saliency"  # whether it is of an object
    EDGES = "edges"  # whether a neighbour is in another segment
    OFFSETS = "offsets"  # where the middle of its object is
    NORMALS = "normals"  # of surfaces
    PARTS = "parts"  # of objects


class DenseWork(ABC):
    """What a dense task is made of.

    Attributes:
        number: that it is scored by.
        beside: name of the field of a batch that it learns from.
    """

    number: Number
    beside: str

    @abstractmethod
    def channels(self, classes: int) -> int:
        """Return the channels of its map."""

    @abstractmethod
    def truth(self, targets: DenseTargets) -> Tensor:
        """Return what it learns from: [H, W], or [3, H, W]; `UNKNOWN` in the last where nobody knows."""

    @abstractmethod
    def count(self, truth: Tensor) -> int:
        """Return what the loss of a batch is divided by."""

    @abstractmethod
    def loss(self, said: Float[Tensor, "B N H W"], truth: Tensor) -> Float[Tensor, ""]:
        """Return the sum of the loss over a batch."""

    @abstractmethod
    def scored(self, said: Float[Tensor, "N H W"], truth: Tensor, classes: int) -> Tensor:
        """Return what a picture adds to the score; offsets are said in pixels."""

    @abstractmethod
    def score(self, states: Tensor) -> float:
        """Return the score of sums of these."""


class _Semantic(DenseWork):
    """Classes."""

    number = Number("mIoU", "mIoU of classes", "{:.3f}")
    beside = "labels"

    def channels(self, classes: int) -> int:
        return classes

    def truth(self, targets: DenseTargets) -> Tensor:
        return torch.from_numpy(targets.labels).long()

    def count(self, truth: Tensor) -> int:
        return int((truth != UNKNOWN).sum())

    def loss(self, said: Float[Tensor, "B N H W"], truth: Tensor) -> Float[Tensor, ""]:
        return summed_cross_entropy(said, truth, ignore=UNKNOWN)

    def scored(self, said: Float[Tensor, "N H W"], truth: Tensor, classes: int) -> Tensor:
        scores = LabelScores([str(label) for label in range(classes)], ignore=UNKNOWN)
        scores.add(truth, said.argmax(0))
        return scores.state()

    def score(self, states: Int[Tensor, "N N"]) -> float:
        scores = LabelScores([str(label) for label in range(len(states))], ignore=UNKNOWN)
        return scores.numbers([states]).miou or 0.0


class _Yes(DenseWork):
    """A probability of each pixel."""

    def channels(self, classes: int) -> int:
        return 1

    def count(self, truth: Tensor) -> int:
        return int((truth != UNKNOWN).sum())

    def loss(self, said: Float[Tensor, "B N H W"], truth: Tensor) -> Float[Tensor, ""]:
        return balanced_cross_entropy(said[:, 0], truth)

    def scored(self, said: Float[Tensor, "N H W"], truth: Tensor, classes: int) -> Tensor:
        return ThresholdScores().add(truth > 0, said[0].sigmoid(), truth != UNKNOWN)


class _Saliency(_Yes):
    """Objects, against all else."""

    number = Number("saliency_IoU", "IoU of saliency", "{:.3f}")
    beside = "salient"

    def truth(self, targets: DenseTargets) -> Tensor:
        return torch.from_numpy(targets.salient).long()

    def score(self, states: Tensor) -> float:
        return best_iou([states])


class _Edges(_Yes):
    """Where segments meet."""

    number = Number("edge_F", "F of edges", "{:.3f}")
    beside = "edges"

    def truth(self, targets: DenseTargets) -> Tensor:
        return torch.from_numpy(targets.edges).long()

    def score(self, states: Tensor) -> float:
        return best_f([states])


class _Offsets(DenseWork):
    """The way to the middle of an object, in its pixels."""

    number = Number("offset_error", "error of centres", "{:.2f}", "px", more_is_better=False)
    beside = "offsets"

    def channels(self, classes: int) -> int:
        return 2

    def truth(self, targets: DenseTargets) -> Tensor:
        here = torch.from_numpy(targets.objects)
        known = torch.where(here, 1.0, float(UNKNOWN))
        return torch.cat([torch.from_numpy(targets.offsets), known[None]])

    def count(self, truth: Tensor) -> int:
        return int((truth[:, 2] > 0).sum())

    def loss(self, said: Float[Tensor, "B N H W"], truth: Tensor) -> Float[Tensor, ""]:
        return ((said.float() - truth[:, :2] / PIXELS).abs() * (truth[:, 2:] > 0)).sum()

    def scored(self, said: Float[Tensor, "N H W"], truth: Tensor, classes: int) -> Tensor:
        here = truth[2] > 0
        off = torch.linalg.vector_norm(said.double() - truth[:2], dim=0)[here]
        return torch.stack([off.sum(), here.sum().double()])

    def score(self, states: Float[Tensor, " 2"]) -> float:
        return float(states[0] / states[1].clamp(min=1))


WORKS: Mapping[DenseKind, DenseWork] = MappingProxyType(
    {
        DenseKind.SEMANTIC: _Semantic(),
        DenseKind.SALIENCY: _Saliency(),
        DenseKind.EDGES: _Edges(),
        DenseKind.OFFSETS: _Offsets(),
    }
)
