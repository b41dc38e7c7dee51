"""CascadeMaskRCNN: boxes and masks by proposals and three stages, the head of SwinV2-MoE's paper, in plain torch.

    images ── backbone ── pyramid ──┬── proposals ── stage 1 ── stage 2 ── stage 3 ── classes, boxes
                                    └── RoIAlign ──────┴───────────┴───────────┴───── masks

Cascade R-CNN (arXiv 1712.00726, 1906.09756) with the pyramid of arXiv 1612.03144 and the masks of arXiv 1703.06870, in
the settings of Swin's detectors; no compiled operator is needed. Boxes, and losses, are float32 under autocast too.

Shape letters: B images, C channels, H W rows and columns, R regions, S side of their squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.errors import at_least
from synchromesh.models.box_coder import BoxCoder
from synchromesh.models.boxes import wide
from synchromesh.models.features import Backbone
from synchromesh.models.heads.cascade.box_stage import (
    BoxHead,
    BoxStages,
    Said,
    Sample,
    box_losses,
    boxes_of_classes,
    next_regions,
    refined,
    sample_regions,
)
from synchromesh.models.heads.cascade.found import found_boxes
from synchromesh.models.heads.cascade.mask_branch import MaskHead, mask_loss, mask_targets, pasted
from synchromesh.models.heads.cascade.region_proposals import (
    RegionProposalNetwork,
    RegionProposals,
    Regions,
    proposal_losses,
    proposed,
)
from synchromesh.models.heads.cascade.roi_align import pyramid_roi_align
from synchromesh.models.heads.objects import Found, ObjectHead, ObjectModel, Objects
from synchromesh.models.heads.pyramid import FeaturePyramid, PositionNorm

REGIONS_AT_ONCE = 2048  # whose squares are in memory at a time, in evaluation
MASKS_AT_ONCE = 128  # regions whose masks of all classes are in memory at a time, in evaluation


@dataclass(frozen=True)
class CascadeMaskRCNN(ObjectHead):
    """Settings of the head.

    Which anchors and regions a step learns from is drawn from torch's generator of the process, as dropout is, where
    there are more than wanted; else training is deterministic.

    Attributes:
        masks: whether it says masks too; then the truth needs them.
        width: channels of the pyramid and of what stands on it.
        samples: points of a RoIAlign's bin along each side (mmdetection by default: as many as the bin has cells).
        proposals: of regions.
        boxes: the stages.
        mask_side: of the squares that masks are made of, which have twice that side.
        mask_convs: convolutions of a mask head.
        least: lowest probability of what is found, where nobody asks for a higher one.
        overlap: IoU from which the less likely of two boxes of a class is left out.
        most: boxes of an image, at most.
    """

    masks: bool = True
    width: int = 256
    samples: int = 2
    proposals: RegionProposals = field(default_factory=RegionProposals)
    boxes: BoxStages = field(default_factory=BoxStages)
    mask_side: int = 14
    mask_convs: int = 4
    least: float = 0.05
    overlap: float = 0.5
    most: int = 100

    def __post_init__(self) -> None:
        at_least("head.", self, width=1, samples=1, mask_side=1, mask_convs=0, least=0, overlap=0, most=1)

    @property
    def says_masks(self) -> bool:
        return self.masks

    def build(self, backbone: Backbone, num_classes: int) -> CascadeDetector:
        return CascadeDetector(backbone, num_classes, self)

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        """Return what the sum of each loss is divided by.

        Anchors and regions: as many as a step samples of these images, found or not, as in mmdetection where there are
        enough of them. Masks: the objects. How many regions stand for an object is the model's doing, so that it cannot
        be agreed on before; `mask_loss` says what that changes.
        """
        anchors, regions = images * self.proposals.sampled, images * self.boxes.sampled
        found = {"proposal_score_loss": anchors, "proposal_box_loss": anchors}
        for stage in range(1, len(self.boxes) + 1):
            found |= {f"score_loss_{stage}": regions, f"box_loss_{stage}": regions}
            found |= {f"mask_loss_{stage}": objects} if self.masks else {}
        return found

    def weights(self) -> Mapping[str, float]:
        found = {"proposal_score_loss": 1.0, "proposal_box_loss": 1.0}
        for stage, weight in enumerate(self.boxes.weights, start=1):
            found |= {f"score_loss_{stage}": weight, f"box_loss_{stage}": weight * self.boxes.loss_weight}
            found |= {f"mask_loss_{stage}": weight} if self.masks else {}
        return found


class CascadeDetector(ObjectModel):
    """A backbone, a pyramid, proposals, and a head of boxes and one of masks for each stage."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: CascadeMaskRCNN) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, wanted an integer >= 1")
        if any(coarse != 2 * fine for fine, coarse in zip(backbone.strides, backbone.strides[1:], strict=False)):
            raise ValueError(f"the backbone has strides {backbone.strides}, wanted each twice the one before")
        self.backbone, self.settings, width, boxes = backbone, settings, settings.width, settings.boxes
        self.strides = backbone.strides
        self.pyramid = FeaturePyramid(backbone.widths, width, norm=PositionNorm)
        self.proposals = RegionProposalNetwork(width, settings.proposals)
        self.boxes = nn.ModuleList(BoxHead(width, num_classes, boxes) for _ in boxes.overlaps)
        stages = len(boxes) if settings.masks else 0
        self.masks = nn.ModuleList(MaskHead(width, num_classes, settings.mask_convs) for _ in range(stages))
        self.coders = [BoxCoder(std) for std in boxes.std]
        for layer in (*self.pyramid.sides, *self.pyramid.smooth):
            nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        *,
        least: float = 0.0,
    ) -> Mapping[str, Tensor] | list[Found]:
        maps = self.pyramid(self.backbone(images))
        # One level more for proposals of large objects: every second position of the last (arXiv 1612.03144, 4.1).
        levels = self.proposals([*maps, maps[-1][:, :, ::2, ::2]], [*self.strides, 2 * self.strides[-1]])
        regions = proposed(levels, sizes, self.settings.proposals)
        maps = [wide(x) for x in maps]  # once, since every stage reads them so
        if truth is None:
            return self._found(maps, regions, sizes, max(least, self.settings.least))
        if self.masks and truth.masks is None:
            raise ValueError(
                "the truth has no masks, which CascadeMaskRCNN learns: give them, or build it with masks=False"
            )
        scores, boxes = proposal_losses(levels, sizes, truth, self.settings.proposals)
        return {"proposal_score_loss": scores, "proposal_box_loss": boxes, **self._losses(maps, regions, sizes, truth)}

    def _losses(
        self, maps: Sequence[Tensor], regions: Regions, sizes: Int[Tensor, "B 2"], truth: Objects
    ) -> dict[str, Tensor]:
        """Run the stages, each on the regions as the one before sees them better."""
        own, sums = self.settings.boxes, {}
        for number, (head, coder, overlap) in enumerate(zip(self.boxes, self.coders, own.overlaps, strict=True)):
            sample = sample_regions(regions, truth, len(sizes), overlap=overlap, settings=own)
            said = head(self._squares(maps, sample.regions, own.side))
            stage = number + 1
            sums[f"score_loss_{stage}"], sums[f"box_loss_{stage}"] = box_losses(said, sample, truth, coder, own.loss)
            if self.masks:
                sums[f"mask_loss_{stage}"] = self._mask_loss(self.masks[number], maps, sample, truth)
            regions = next_regions(said, sample, truth, sizes, coder)
        return sums

    def _mask_loss(self, head: nn.Module, maps: Sequence[Tensor], sample: Sample, truth: Objects) -> Tensor:
        assert truth.masks is not None
        there = (sample.objects >= 0).nonzero()[:, 0]
        regions, objects = Regions(sample.regions.boxes[there], sample.regions.image[there]), sample.objects[there]
        logits = head(self._squares(maps, regions, self.settings.mask_side))
        targets = mask_targets(truth.masks, regions.boxes, objects, side=logits.shape[-1])
        return mask_loss(logits, truth.labels[objects], objects, targets)

    def _found(self, maps: Sequence[Tensor], regions: Regions, sizes: Int[Tensor, "B 2"], least: float) -> list[Found]:
        own, scores, of_class = self.settings, [], None
        for head, coder in zip(self.boxes, self.coders, strict=True):
            said = self._said(head, maps, regions)
            scores.append(said.logits.softmax(1))
            before = regions
            regions = refined(before, said.deltas_of(said.likeliest()), sizes, coder)
            of_class = None if own.boxes.class_agnostic else boxes_of_classes(before, said, sizes, coder)
        found = found_boxes(
            regions, scores, len(sizes), least=least, overlap=own.overlap, most=own.most, of_class=of_class
        )
        return self._with_masks(maps, found, sizes) if self.masks else found

    def _said(self, head: nn.Module, maps: Sequence[Tensor], regions: Regions) -> Said:
        parts = []
        for some in torch.arange(len(regions), device=regions.image.device).split(REGIONS_AT_ONCE):
            own = Regions(regions.boxes[some], regions.image[some])
            parts.append(head(self._squares(maps, own, self.settings.boxes.side)))
        return Said(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _with_masks(self, maps: Sequence[Tensor], found: Sequence[Found], sizes: Int[Tensor, "B 2"]) -> list[Found]:
        regions = Regions.joined([one.boxes for one in found], maps[0])
        labels = torch.cat([regions.image[:0], *(one.labels for one in found)])
        side = self.settings.mask_side
        drawn = [maps[0].new_zeros(0, 2 * side, 2 * side)]
        for some in torch.arange(len(labels), device=labels.device).split(MASKS_AT_ONCE):
            squares = self._squares(maps, Regions(regions.boxes[some], regions.image[some]), side)
            own = torch.arange(len(some), device=labels.device)
            drawn.append(torch.stack([head(squares)[own, labels[some]].sigmoid() for head in self.masks]).mean(0))
        parts = torch.cat(drawn).split([len(one.boxes) for one in found])
        return [
            Found(one.boxes, one.scores, one.labels, pasted(own, one.boxes, height=height, width=width))
            for one, own, (height, width) in zip(found, parts, sizes.tolist(), strict=True)
        ]

    def _squares(self, maps: Sequence[Tensor], regions: Regions, side: int) -> Float[Tensor, "R C S S"]:
        return pyramid_roi_align(
            maps, self.strides, regions.boxes, regions.image, side=side, samples=self.settings.samples
        )
