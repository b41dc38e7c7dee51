"""The three models of a mask transformer: it finds objects, names pixels, or gives each pixel a segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from synchromesh.compat.huggingface.heads.mask_networks import MaskNetwork, Said, Target
from synchromesh.compat.huggingface.heads.mask_results import Size, objects_of, pixels_of, segments_of
from synchromesh.compat.huggingface.heads.masks import (
    Mask2Former,
    MaskFormer,
    PanopticMasks,
    SemanticMasks,
    classes_in,
    stuff_in,
)
from synchromesh.models.features import Backbone
from synchromesh.models.heads.objects import Found, ObjectModel, Objects
from synchromesh.models.heads.panoptic import PanopticModel, Segments
from synchromesh.models.heads.semantic import IGNORE, SemanticModel


@final
class MaskDetector(ObjectModel):
    """A backbone, and queries that find objects."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: Mask2Former | MaskFormer) -> None:
        super().__init__()
        self.backbone, self.settings = backbone, settings
        self.masks = MaskNetwork(backbone, num_classes, settings)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        *,
        least: float = 0.0,
    ) -> Mapping[str, Tensor] | list[Found]:
        features = self.backbone(images)
        if not len(images):
            return [] if truth is None else self.masks.nothing(features)
        said = self.masks(features, images)
        if truth is not None:
            return self.masks.sums(said, [_things(truth, image) for image in range(len(images))])
        most, full = self.settings.most, _size(images)
        return [
            objects_of(classes, masks, full, size, most=most, least=least)
            for classes, masks, size in _each(said[-1], sizes)
        ]


@final
class MaskSegmenter(SemanticModel):
    """A backbone, and queries whose masks are classes."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: SemanticMasks) -> None:
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.masks = MaskNetwork(backbone, num_classes, settings.masks)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B _ H W"]:
        features = self.backbone(images)
        if not len(images):
            empty = torch.zeros(0, self.num_classes, *_size(images), device=images.device)
            return empty if labels is None else self.masks.nothing(features)
        said = self.masks(features, images)
        if labels is not None:
            return self.masks.sums(said, [_regions(each, classes_in(each, ignore=ignore)) for each in labels])
        return torch.stack([pixels_of(c, masks, _size(images)) for c, masks, _ in _each(said[-1], sizes)])


@final
class MaskPanoptic(PanopticModel):
    """A backbone, and queries whose masks are things and stuff."""

    def __init__(self, backbone: Backbone, things: tuple[bool, ...], settings: PanopticMasks) -> None:
        super().__init__()
        self.backbone, self.things, self.settings = backbone, things, settings
        self.masks = MaskNetwork(backbone, len(things), settings.masks)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | list[Segments]:
        if (truth is None) != (labels is None):
            raise ValueError("got one of truth and labels, wanted both of them, or none")
        features = self.backbone(images)
        if not len(images):
            return [] if truth is None else self.masks.nothing(features)
        said = self.masks(features, images)
        if truth is not None and labels is not None:
            targets = []
            for image, each in enumerate(labels):
                stuff = _regions(each, stuff_in(each, self.things, ignore=ignore))
                targets.append(_joined(_things(truth, image), stuff))
            return self.masks.sums(said, targets)
        least, overlap, full = self.settings.least, self.settings.overlap, _size(images)
        return [
            segments_of(classes, masks, full, size, self.things, least=least, overlap=overlap)
            for classes, masks, size in _each(said[-1], sizes)
        ]


def _size(images: Float[Tensor, "B C H W"]) -> Size:
    return images.shape[2], images.shape[3]


def _each(said: Said, sizes: Int[Tensor, "B 2"]) -> Iterator[tuple[Tensor, Tensor, Size]]:
    """Yield the logits of classes and of masks, in float32, and the size of each image."""
    for classes, masks, (height, width) in zip(said.classes, said.masks, sizes.tolist(), strict=True):
        yield classes.float(), masks.float(), (height, width)


def _things(truth: Objects, image: int) -> Target:
    """Return the objects of one image. Raises ValueError where they have no masks."""
    if truth.masks is None:
        raise ValueError("got objects without masks, wanted their pixels: a head that says masks learns from masks")
    own = truth.image == image
    return Target(truth.labels[own], truth.masks[own].float())


def _regions(labels: Integer[Tensor, "H W"], classes: list[int]) -> Target:
    """Return one mask for each of the classes."""
    wanted = torch.tensor(classes, dtype=torch.int64, device=labels.device)
    return Target(wanted, (labels[None] == wanted[:, None, None]).float())


def _joined(one: Target, other: Target) -> Target:
    return Target(torch.cat([one.labels, other.labels]), torch.cat([one.masks, other.masks]))
