"""CentrePanoptic: any head that finds masks and any head that names pixels, on one backbone, merged to segments.

The branches and their merging are those of Panoptic FPN (arXiv 1901.02446, sections 3 and 4): surer masks lie over less
sure ones, things over stuff.

Shape letters: B images, M masks, N classes, H W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from synchromesh.models.features import Backbone, Features, Place
from synchromesh.models.heads.objects import Found, ObjectHead, Objects
from synchromesh.models.heads.panoptic import PanopticHead, PanopticModel, Segments
from synchromesh.models.heads.semantic import IGNORE, SemanticFPN, SemanticHead


@final
@dataclass(frozen=True)
class CentrePanoptic(PanopticHead):
    """Settings of two branches and of their merging.

    Attributes:
        objects: finds the things; it must say masks.
        semantic: names the pixels of stuff, and those of things as one class more.
        semantic_weight: of the second branch's losses beside the first one's; 0.5 in the paper, on COCO.
        least: lowest probability of a thing.
        overlap: share of a mask that surer ones may cover; it is left out beyond that.
        least_stuff: pixels of a stuff segment, at least; 4,096 is usual for pictures of 640 x 480.
    """

    objects: ObjectHead
    semantic: SemanticHead = field(default_factory=SemanticFPN)
    semantic_weight: float = 0.5
    least: float = 0.5
    overlap: float = 0.5
    least_stuff: int = 4096

    def build(self, backbone: Backbone, things: Sequence[bool]) -> TwoBranches:
        if not self.objects.says_masks:
            raise ValueError(
                f"{type(self.objects).__name__} finds boxes without masks, wanted a head that says which pixels are an "
                "object's"
            )
        return TwoBranches(backbone, Classes(tuple(things)), self)

    def counts(
        self, truth: Objects, labels: Integer[Tensor, "B H W"], things: Sequence[bool], *, ignore: int = IGNORE
    ) -> Mapping[str, int]:
        stuff = Classes(tuple(things)).stuff_of(labels, ignore=ignore)
        return {**self.objects.counts(len(truth), len(labels)), **self.semantic.counts(stuff, ignore=ignore)}

    def weights(self) -> Mapping[str, float]:
        semantic = {name: weight * self.semantic_weight for name, weight in self.semantic.weights().items()}
        return {**self.objects.weights(), **semantic}


@dataclass(frozen=True)
class Classes:
    """How the branches number the classes: things from 0; stuff from 0, and after it one class for all things.

    Attributes:
        things: for each class, whether its segments are single objects.
    """

    things: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not any(self.things) or all(self.things):
            raise ValueError(f"things are {self.things}, wanted a class of things and one of stuff at least")

    @property
    def of_things(self) -> list[int]:
        """Return the class that each number of the first branch stands for."""
        return [label for label, thing in enumerate(self.things) if thing]

    @property
    def of_stuff(self) -> list[int]:
        """Return the class that each number of the second branch stands for, but its last one."""
        return [label for label, thing in enumerate(self.things) if not thing]

    def things_of(self, truth: Objects) -> Objects:
        """Return objects as the first branch numbers them.

        Raises:
            ValueError: an object is of a class of stuff.
        """
        table = self._table(self.of_things, truth.labels, other=-1)
        labels = table[truth.labels]
        if bool((labels < 0).any()):
            wrong = sorted({int(label) for label in truth.labels[labels < 0]})
            raise ValueError(f"got objects of the classes {wrong}, which are stuff: wanted things, stuff in `labels`")
        return Objects(truth.image, truth.boxes, labels, truth.masks)

    def stuff_of(self, labels: Integer[Tensor, "B H W"], *, ignore: int) -> Int[Tensor, "B H W"]:
        """Return labels as the second branch numbers them."""
        counted = labels != ignore
        table = self._table(self.of_stuff, labels, other=len(self.of_stuff))
        return torch.where(counted, table[labels.long().where(counted, 0)], ignore)

    def _table(self, own: list[int], like: Tensor, *, other: int) -> Int[Tensor, " N"]:
        table = torch.full((len(self.things),), other, dtype=torch.int64, device=like.device)
        table[torch.tensor(own, device=like.device)] = torch.arange(len(own), device=like.device)
        return table


@final
class TwoBranches(PanopticModel):
    """A backbone that runs once, and two models that see its features."""

    def __init__(self, backbone: Backbone, classes: Classes, settings: CentrePanoptic) -> None:
        super().__init__()
        self.backbone, self.classes, self.settings = backbone, classes, settings
        self.seen = Seen(backbone)
        self.objects = settings.objects.build(self.seen, len(classes.of_things))
        self.semantic = settings.semantic.build(self.seen, len(classes.of_stuff) + 1)

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
        self.seen.features = self.backbone(images)
        try:
            if truth is not None and labels is not None:
                stuff = self.classes.stuff_of(labels, ignore=ignore)
                sums = self.objects(images, sizes, self.classes.things_of(truth))
                return {**sums, **self.semantic(images, sizes, stuff, ignore=ignore)}
            found = self.objects(images, sizes, least=self.settings.least)
            probability = self.semantic(images, sizes).softmax(1)
            return [
                merged(one, each[:, : int(size[0]), : int(size[1])], self.classes, self.settings)
                for one, each, size in zip(found, probability, sizes, strict=True)
            ]
        finally:
            self.seen.features = None


class Seen(Backbone):
    """Stands for a backbone that has run already: it returns its features, whatever the images.

    Attributes:
        features: what it returns; None outside of a forward.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.widths, self.strides, self.init_std = backbone.widths, backbone.strides, backbone.init_std
        self.features: Features | None = None

    def forward(self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None) -> Features:
        assert self.features is not None
        return self.features

    def multiply_adds(self) -> float:
        return 0.0

    def feed_forwards(self) -> Iterator[Place]:
        return iter(())


def merged(found: Found, stuff: Float[Tensor, "N H W"], classes: Classes, settings: CentrePanoptic) -> Segments:
    """Return the segments of one image.

    Things by falling score: a mask takes its pixels that no surer one has, and is left out if it has lost more than the
    share `overlap`. Then stuff, where it is the likeliest class, by class, of `least_stuff` pixels at least.

    Args:
        found: with masks, as the first branch numbers classes.
        stuff: probability of each class, as the second branch numbers them.
        classes: the numbering.
        settings: of the merging.
    """
    assert found.masks is not None
    ids = torch.zeros(stuff.shape[1:], dtype=torch.int32, device=stuff.device)
    labels: list[int] = []
    scores: list[Tensor] = []
    for number in found.scores.argsort(descending=True, stable=True).tolist():
        mask = found.masks[number]
        free = mask & (ids == 0)
        size, left = int(mask.sum()), int(free.sum())
        if found.scores[number] < settings.least or left == 0 or size - left > settings.overlap * size:
            continue
        labels.append(classes.of_things[int(found.labels[number])])
        scores.append(found.scores[number])
        ids[free] = len(labels)
    likeliest = stuff.argmax(0)
    for number, label in enumerate(classes.of_stuff):
        free = (likeliest == number) & (ids == 0)
        if int(free.sum()) < max(1, settings.least_stuff):
            continue
        labels.append(label)
        scores.append(stuff[number][free].mean())
        ids[free] = len(labels)
    given = torch.stack(scores).float() if scores else torch.zeros(0, device=stuff.device)
    return Segments(ids, torch.tensor(labels, dtype=torch.int64, device=stuff.device), given)
