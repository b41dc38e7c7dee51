"""Region proposals: where objects may be, whatever their class (Faster R-CNN, arXiv 1506.01497; arXiv 1612.03144).

Shape letters: B images, C channels, H W rows and columns of a map, A anchors of a position, K of a map, M objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.errors import at_least
from synchromesh.models.box_coder import BoxCoder
from synchromesh.models.boxes import inside, nms
from synchromesh.models.heads.cascade.anchors import anchors_of, centred_inside
from synchromesh.models.heads.cascade.matching import matched, sampled
from synchromesh.models.heads.objects import Objects

SMOOTH = 1 / 9  # error of a delta below which its loss is quadratic
CODER = BoxCoder()


@dataclass(frozen=True)
class RegionProposals:
    """Settings of the proposals.

    Attributes:
        scale: side of an anchor, in strides of its level.
        ratios: height over width of the anchors of a position.
        positive: IoU with an object from which an anchor stands for it.
        negative: IoU with all objects below which an anchor stands for nothing.
        least_best: IoU from which the best anchor of an object stands for it whatever the others; mmdetection's value.
            With 0 objects far smaller than every anchor are learnt too.
        sampled: anchors of an image that a step learns from.
        positive_share: of them, at most.
        of_level: proposals of a level that are compared with each other, at most.
        overlap: IoU from which the less likely of two proposals of a level is left out.
        kept: proposals of an image, at most.
    """

    scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    positive: float = 0.7
    negative: float = 0.3
    least_best: float = 0.3
    sampled: int = 256
    positive_share: float = 0.5
    of_level: int = 2000
    overlap: float = 0.7
    kept: int = 1000

    def __post_init__(self) -> None:
        at_least("proposals.", self, least_best=0, sampled=1, positive_share=0, of_level=1, overlap=0, kept=1)
        if not self.ratios or not min(self.scale, *self.ratios) > 0:
            raise ValueError(f"proposals have scale {self.scale} and ratios {self.ratios}, wanted numbers above 0")
        if not 0 < self.negative <= self.positive <= 1:
            raise ValueError(
                f"anchors stand for nothing below IoU {self.negative} and for an object from {self.positive}, "
                "wanted 0 < negative <= positive <= 1"
            )


@dataclass(frozen=True)
class AnchorLevel:
    """What the network says of the anchors of one map.

    Attributes:
        anchors: in pixels.
        logits: of there being an object.
        deltas: from the anchor to the object's box.
    """

    anchors: Float[Tensor, "K 4"]
    logits: Float[Tensor, "B K"]
    deltas: Float[Tensor, "B K 4"]


@dataclass(frozen=True)
class Regions:
    """Boxes of a batch that a head looks at, image by image.

    Attributes:
        boxes: in pixels.
        image: which image each one is in.
    """

    boxes: Float[Tensor, "R 4"]
    image: Int[Tensor, " R"]

    def __len__(self) -> int:
        return len(self.image)

    @staticmethod
    def joined(of_images: Sequence[Float[Tensor, "_ 4"]], like: Tensor) -> Regions:
        """Return the boxes of each image as one value, on the device of `like`."""
        boxes = torch.cat([torch.zeros(0, 4, device=like.device), *of_images])
        counts = torch.tensor([len(own) for own in of_images], dtype=torch.int64, device=like.device)
        return Regions(boxes, torch.arange(len(counts), device=like.device).repeat_interleave(counts))


class RegionProposalNetwork(nn.Module):
    """The branch that all levels share: of each anchor, whether an object is there and where its sides are."""

    def __init__(self, width: int, settings: RegionProposals) -> None:
        super().__init__()
        self.settings, count = settings, len(settings.ratios)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, count, 1)
        self.deltas = nn.Conv2d(width, 4 * count, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, maps: Sequence[Float[Tensor, "B C _ _"]], strides: Sequence[int]) -> list[AnchorLevel]:
        return [self._level(x, stride) for x, stride in zip(maps, strides, strict=True)]

    def _level(self, x: Float[Tensor, "B C H W"], stride: int) -> AnchorLevel:
        own, (height, width) = self.settings, x.shape[2:]
        anchors = anchors_of(height, width, stride=stride, scale=own.scale, ratios=own.ratios, device=x.device)
        x = F.relu(self.conv(x))
        logits = self.objectness(x).float().permute(0, 2, 3, 1).flatten(1)
        # Channels are anchor by anchor, four deltas each.
        deltas = self.deltas(x).float().permute(0, 2, 3, 1).reshape(len(x), len(anchors), 4)
        return AnchorLevel(anchors, logits, deltas)


def proposal_losses(
    levels: Sequence[AnchorLevel], sizes: Int[Tensor, "B 2"], truth: Objects, settings: RegionProposals
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the losses of objectness and of deltas, each summed over the sampled anchors, in float32.

    Objectness: binary cross entropy. Deltas: smooth L1, summed over the four, of anchors that stand for an object.
    """
    anchors = torch.cat([level.anchors for level in levels])
    logits = torch.cat([level.logits for level in levels], dim=1)
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    scores, boxes = [logits[:0].sum()], [deltas[:0].sum()]  # reach all parameters, with no image too
    for image, size in enumerate(sizes):
        objects = truth.boxes[truth.image == image].float()
        here = centred_inside(anchors, size).nonzero()[:, 0]
        matches = matched(
            anchors[here], objects,
            positive=settings.positive, negative=settings.negative, least_best=settings.least_best,
        )  # fmt: skip
        some, none = sampled(matches, count=settings.sampled, positives=int(settings.sampled * settings.positive_share))
        found, empty = logits[image, here[some]], logits[image, here[none]]
        scores += [F.softplus(-found).sum(), F.softplus(empty).sum()]
        wanted = CODER.encode(anchors[here[some]], objects[matches[some]])
        boxes.append(F.smooth_l1_loss(deltas[image, here[some]], wanted, beta=SMOOTH, reduction="sum"))
    return torch.stack(scores).sum(), torch.stack(boxes).sum()


@torch.no_grad()
def proposed(levels: Sequence[AnchorLevel], sizes: Int[Tensor, "B 2"], settings: RegionProposals) -> Regions:
    """Return the likeliest boxes of each image, cut off at its border; of a level those that overlap little."""
    parts = [_best_of_level(level, sizes, settings) for level in levels]
    return Regions.joined([_thinned([part[image] for part in parts], settings) for image in range(len(sizes))], sizes)


def _best_of_level(
    level: AnchorLevel, sizes: Int[Tensor, "B 2"], settings: RegionProposals
) -> list[tuple[Tensor, Tensor]]:
    """Return boxes and scores of each image, without those that have no area."""
    found = []
    for size, logits, deltas in zip(sizes, level.logits, level.deltas, strict=True):
        here = centred_inside(level.anchors, size).nonzero()[:, 0]
        scores, best = logits[here].topk(min(settings.of_level, len(here)))
        boxes = inside(CODER.decode(level.anchors[here[best]], deltas[here[best]]), size)
        good = (boxes[:, 2:] > boxes[:, :2]).all(1)
        found.append((boxes[good], scores[good]))
    return found


def _thinned(parts: Sequence[tuple[Tensor, Tensor]], settings: RegionProposals) -> Float[Tensor, "_ 4"]:
    boxes, scores = (torch.cat(each) for each in zip(*parts, strict=True))
    counts = torch.tensor([len(own) for own, _ in parts], device=boxes.device)
    level = torch.arange(len(parts), device=boxes.device).repeat_interleave(counts)
    return boxes[nms(boxes, scores, level, most=settings.overlap)[: settings.kept]]
