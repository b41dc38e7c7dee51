"""One stage of a cascade: classes of regions, and better boxes for them (Cascade R-CNN, arXiv 1712.00726, 1906.09756).

Shape letters: B images, C channels, R regions, S side of their squares, N classes, M objects.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from synchromesh.errors import at_least
from synchromesh.models.box_coder import BoxCoder
from synchromesh.models.boxes import area, giou, inside
from synchromesh.models.heads.cascade.matching import NOTHING, matched, sampled
from synchromesh.models.heads.cascade.region_proposals import Regions
from synchromesh.models.heads.objects import Objects


class Norm(Enum):
    """What stands behind each convolution of a box head."""

    GROUP = "group"  # sees one region: good for batches of any size
    SYNC_BATCH = "sync_batch"  # sees those of all ranks: Swin's configuration, for batches of 16 images
    NONE = "none"


class BoxLoss(Enum):
    """What the boxes of a stage are taught by."""

    GIOU = "giou"  # 1 - GIoU of the boxes: Swin's configuration, with weight 10
    SMOOTH_L1 = "smooth_l1"  # of the deltas, quadratic below 1: the paper's, with weight 1


@dataclass(frozen=True)
class BoxStages:
    """Settings of the stages, each with a head of its own.

    Attributes:
        overlaps: of each stage, IoU from which a region stands for an object; below, for nothing.
        weights: of the losses of each stage.
        std: of each stage, what deltas are divided by.
        sampled: regions of an image that a stage learns from.
        positive_share: of them that stand for an object, at most.
        side: positions along each side of a region, S.
        convs: convolutions of a head.
        linears: linear layers behind them. Four and one are mmdetection's `4conv1fc`, none and two its `Shared2FC`.
        hidden: numbers between these.
        class_agnostic: one box of a region for all classes; else each class has its own, mmdetection's
            `reg_class_agnostic=False`, which Swin's detectors and Faster R-CNN have.
        norm: behind the convolutions.
        loss: of boxes.
        loss_weight: of boxes beside classes.
    """

    overlaps: tuple[float, ...] = (0.5, 0.6, 0.7)
    weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    std: tuple[tuple[float, float, float, float], ...] = (
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    sampled: int = 512
    positive_share: float = 0.25
    side: int = 7
    convs: int = 4
    linears: int = 1
    hidden: int = 1024
    class_agnostic: bool = True
    norm: Norm = Norm.GROUP
    loss: BoxLoss = BoxLoss.GIOU
    loss_weight: float = 10.0

    def __post_init__(self) -> None:
        at_least("boxes.", self, sampled=1, positive_share=0, side=1, convs=0, linears=1, hidden=1, loss_weight=0)
        if not self.overlaps or not len(self.overlaps) == len(self.weights) == len(self.std):
            raise ValueError(
                f"stages have overlaps {self.overlaps}, weights {self.weights} and std {self.std}, "
                "wanted one of each for every stage"
            )
        if not all(0 < overlap <= 1 for overlap in self.overlaps):
            raise ValueError(f"stages have overlaps {self.overlaps}, wanted IoUs above 0 and up to 1")

    def __len__(self) -> int:
        return len(self.overlaps)


@dataclass(frozen=True)
class Sample:
    """Regions that a stage learns from.

    Attributes:
        regions: boxes and images.
        objects: number of the object that each one stands for, in those of the batch; `NOTHING`.
        true: whether it is an object's own box, which was put beside the proposals.
    """

    regions: Regions
    objects: Int[Tensor, " R"]
    true: Bool[Tensor, " R"]


class Said(NamedTuple):
    """What a head says of regions, in float32.

    Attributes:
        logits: of the classes, and of nothing at the end.
        deltas: from the region to the object's box, four for all classes or, class by class, four for each.
    """

    logits: Float[Tensor, "R N1"]
    deltas: Float[Tensor, "R D"]

    def likeliest(self) -> Int[Tensor, " R"]:
        """Return the class of each region, whatever the probability of nothing."""
        return self.logits[:, :-1].argmax(1)

    def chosen(self, regions: Shaped[Tensor, " _"]) -> Said:
        """Return what is said of some regions: their numbers, or whether each is among them."""
        return Said(self.logits[regions], self.deltas[regions])

    def deltas_of(self, labels: Int[Tensor, " R"]) -> Float[Tensor, "R 4"]:
        """Return the deltas of each region that are for its class."""
        if self.deltas.shape[1] == 4:
            return self.deltas
        return self.deltas.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]


class BoxHead(nn.Module):
    """Squares of features to classes and deltas."""

    def __init__(self, width: int, num_classes: int, settings: BoxStages) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_Conv(width, settings.norm) for _ in range(settings.convs))
        widths = [width * settings.side**2, *[settings.hidden] * settings.linears]
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.scores = nn.Linear(settings.hidden, num_classes + 1)
        self.deltas = nn.Linear(settings.hidden, 4 if settings.class_agnostic else 4 * num_classes)
        for layer in self.linears:
            nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        # To begin with, all classes are alike and no box moves.
        for layer, std in ((self.scores, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "R C S S"]) -> Said:
        for conv in self.convs:
            x = conv(x)
        x = x.flatten(1)
        for linear in self.linears:
            x = F.relu(linear(x))
        return Said(self.scores(x).float(), self.deltas(x).float())


class _Conv(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=norm is Norm.NONE)
        self.norm = _norm(norm, width)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "R C S S"]) -> Float[Tensor, "R C S S"]:
        return F.relu(self.norm(self.conv(x)))


def _norm(norm: Norm, width: int) -> nn.Module:
    if norm is Norm.GROUP:
        return nn.GroupNorm(math.gcd(32, width), width)
    return nn.SyncBatchNorm(width) if norm is Norm.SYNC_BATCH else nn.Identity()


@torch.no_grad()
def sample_regions(regions: Regions, truth: Objects, images: int, *, overlap: float, settings: BoxStages) -> Sample:
    """Return what a stage learns from: of each image its objects' own boxes and the regions, no more than wanted.

    An object's own box stands for it whatever overlaps it; one without area is left out. Where there are too many, some
    are drawn, as in `matching.sampled`.
    """
    boxes, objects, true = [], [], []
    for number in range(images):
        own = ((truth.image == number) & (area(truth.boxes) > 0)).nonzero()[:, 0]
        theirs = truth.boxes[own].float()
        here = regions.boxes[regions.image == number]
        matches = matched(here, theirs, positive=overlap, negative=overlap)
        matches = torch.cat([torch.arange(len(own), device=own.device), matches])
        some, none = sampled(matches, count=settings.sampled, positives=int(settings.sampled * settings.positive_share))
        chosen = torch.cat([some, none])
        boxes.append(torch.cat([theirs, here])[chosen])
        objects.append(torch.cat([own[matches[some]], torch.full_like(none, NOTHING)]))
        true.append(chosen < len(own))
    nothing = regions.image[:0]
    return Sample(
        Regions.joined(boxes, regions.boxes), torch.cat([nothing, *objects]), torch.cat([nothing.bool(), *true])
    )


def box_losses(
    said: Said, sample: Sample, truth: Objects, coder: BoxCoder, loss: BoxLoss
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the sum of the classes' cross entropy, and that of the box loss of regions that stand for an object."""
    there = (sample.objects >= 0).nonzero()[:, 0]
    objects = sample.objects[there]
    labels = torch.full_like(sample.objects, said.logits.shape[1] - 1)
    labels[there] = truth.labels[objects]
    scores = F.cross_entropy(said.logits, labels, reduction="sum")
    boxes, wanted = sample.regions.boxes[there], truth.boxes[objects].float()
    deltas = said.chosen(there).deltas_of(truth.labels[objects])
    if loss is BoxLoss.GIOU:
        return scores, (1 - giou(coder.decode(boxes, deltas), wanted)).sum()
    return scores, F.smooth_l1_loss(deltas, coder.encode(boxes, wanted), reduction="sum")


@torch.no_grad()
def next_regions(said: Said, sample: Sample, truth: Objects, sizes: Int[Tensor, "B 2"], coder: BoxCoder) -> Regions:
    """Return what the next stage learns from: the regions as this one sees them better.

    Objects' own boxes are left out, since they are put beside the regions again. Where each class has a box, a region
    that stands for an object moves as that object's class says, another one as its likeliest class (mmdetection's
    `refine_bboxes`).
    """
    labels, there = said.likeliest(), (sample.objects >= 0).nonzero()[:, 0]
    labels[there] = truth.labels[sample.objects[there]]
    rest = ~sample.true
    regions = Regions(sample.regions.boxes[rest], sample.regions.image[rest])
    return refined(regions, said.chosen(rest).deltas_of(labels[rest]), sizes, coder)


@torch.no_grad()
def refined(regions: Regions, deltas: Float[Tensor, "R 4"], sizes: Int[Tensor, "B 2"], coder: BoxCoder) -> Regions:
    """Return the regions as a stage sees them better, cut off at the border of their image."""
    return Regions(inside(coder.decode(regions.boxes, deltas), sizes[regions.image]), regions.image)


@torch.no_grad()
def boxes_of_classes(
    regions: Regions, said: Said, sizes: Int[Tensor, "B 2"], coder: BoxCoder
) -> Float[Tensor, "R N 4"]:
    """Return the box that each class has of each region, cut off at the border of its image."""
    deltas = said.deltas.unflatten(1, (-1, 4))
    each = [refined(regions, deltas[:, label], sizes, coder).boxes for label in range(deltas.shape[1])]
    return torch.stack(each, dim=1)
