"""transformers' mask transformers as values: Mask2Former and MaskFormer on any backbone of ours.

Each query is a class and a mask. By itself such a value finds objects; `SemanticMasks` names pixels by it, and
`PanopticMasks` gives each pixel a segment: the three models hold the same tensors under the same names. Nothing here
imports transformers before a model is built. Defaults are those of the papers' models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Integer
from torch import Tensor

from synchromesh.compat.huggingface.heads.boxes import query_weight
from synchromesh.models.features import Backbone
from synchromesh.models.heads.objects import ObjectHead, ObjectModel, Objects
from synchromesh.models.heads.panoptic import PanopticHead, PanopticModel
from synchromesh.models.heads.semantic import IGNORE, SemanticHead, SemanticModel


class _Masks(ObjectHead):
    """What settings of heads that find masks by queries have in common."""

    queries: int
    no_object_weight: float

    @property
    def says_masks(self) -> bool:
        return True

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        weight = query_weight(objects, images, queries=self.queries, no_object=self.no_object_weight)
        return {"class_loss": weight, "mask_loss": objects}

    def weights(self) -> Mapping[str, float]:
        return {"class_loss": 1.0, "mask_loss": 1.0}


@final
@dataclass(frozen=True)
class Mask2Former(_Masks):
    """Mask2Former (arXiv 2112.01527): queries look inside of the masks that they said one layer before.

    Padding is not told: an image with padding does not get quite the masks that it gets alone. Losses of masks are
    taken at points, which are drawn by torch's random generator.

    Attributes:
        queries: most objects of an image.
        width: of all parts; a multiple of 32.
        heads: of the attention.
        encoder_layers: of the pixel decoder, across the three coarsest maps.
        decoder_layers: of the queries.
        encoder_ffn: hidden width of the pixel decoder's feed-forwards.
        ffn: hidden width of the queries' feed-forwards.
        dropout: in the decoder.
        levels: maps of the backbone that it sees, the coarsest ones; three at least.
        points: at which a mask is compared.
        class_weight: of the cross entropy of classes, in losses and in matching.
        mask_weight: of the binary cross entropy of masks, in losses and in matching.
        dice_weight: of the dice loss of masks, in losses and in matching.
        no_object_weight: of queries without an object in the cross entropy of classes.
        most: masks of an image, at most.
    """

    queries: int = 100
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 9
    encoder_ffn: int = 1024
    ffn: int = 2048
    dropout: float = 0.0
    levels: int = 4
    points: int = 12544
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    most: int = 100

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.mask_models import MaskDetector

        return MaskDetector(backbone, num_classes, self)


@final
@dataclass(frozen=True)
class MaskFormer(_Masks):
    """MaskFormer (arXiv 2107.06278): queries look at the last map, their masks lie on a pyramid of all maps.

    Padding is not told: an image with padding does not get quite the masks that it gets alone.

    Attributes:
        queries: most objects of an image.
        width: of all parts; a multiple of 32.
        heads: of the attention.
        decoder_layers: of the queries.
        ffn: hidden width of the queries' feed-forwards.
        dropout: in the decoder.
        levels: maps of the backbone that it sees, the coarsest ones; two at least.
        class_weight: of the cross entropy of classes.
        mask_weight: of the focal loss of masks, in losses and in matching.
        dice_weight: of the dice loss of masks, in losses and in matching.
        no_object_weight: of queries without an object in the cross entropy of classes.
        most: masks of an image, at most.
    """

    queries: int = 100
    width: int = 256
    heads: int = 8
    decoder_layers: int = 6
    ffn: int = 2048
    dropout: float = 0.1
    levels: int = 4
    class_weight: float = 1.0
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    most: int = 100

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.mask_models import MaskDetector

        return MaskDetector(backbone, num_classes, self)


@final
@dataclass(frozen=True)
class SemanticMasks(SemanticHead):
    """Names pixels by masks: a class is as likely as the sum of its queries' probabilities times their masks.

    The truth is one mask for each class of an image. The logits are logarithms of the sums, so that their softmax is
    the sums' share.

    Attributes:
        masks: the head.
    """

    masks: Mask2Former | MaskFormer = field(default_factory=Mask2Former)

    def build(self, backbone: Backbone, num_classes: int) -> SemanticModel:
        from synchromesh.compat.huggingface.heads.mask_models import MaskSegmenter

        return MaskSegmenter(backbone, num_classes, self)

    def counts(self, labels: Integer[Tensor, "B H W"], *, ignore: int = IGNORE) -> Mapping[str, int]:
        return self.masks.counts(sum(len(classes_in(each, ignore=ignore)) for each in labels), len(labels))

    def weights(self) -> Mapping[str, float]:
        return self.masks.weights()


@final
@dataclass(frozen=True)
class PanopticMasks(PanopticHead):
    """Gives each pixel a segment by masks: it belongs to the query whose probability times mask is largest there.

    The truth is one mask for each thing, and one for each class of stuff of an image.

    Attributes:
        masks: the head.
        least: lowest probability of a segment.
        overlap: a segment that is left less than this share of its mask is left out.
    """

    masks: Mask2Former | MaskFormer = field(default_factory=Mask2Former)
    least: float = 0.5
    overlap: float = 0.8

    def build(self, backbone: Backbone, things: Sequence[bool]) -> PanopticModel:
        from synchromesh.compat.huggingface.heads.mask_models import MaskPanoptic

        return MaskPanoptic(backbone, tuple(things), self)

    def counts(
        self, truth: Objects, labels: Integer[Tensor, "B H W"], things: Sequence[bool], *, ignore: int = IGNORE
    ) -> Mapping[str, int]:
        stuff = sum(len(stuff_in(each, things, ignore=ignore)) for each in labels)
        return self.masks.counts(len(truth) + stuff, len(labels))

    def weights(self) -> Mapping[str, float]:
        return self.masks.weights()


def classes_in(labels: Integer[Tensor, "H W"], *, ignore: int) -> list[int]:
    """Return the classes of an image's pixels."""
    return [label for label in labels.unique().tolist() if label != ignore]


def stuff_in(labels: Integer[Tensor, "H W"], things: Sequence[bool], *, ignore: int) -> list[int]:
    """Return the classes of stuff of an image's pixels."""
    return [label for label in classes_in(labels, ignore=ignore) if not things[label]]
