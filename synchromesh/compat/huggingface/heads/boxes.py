"""transformers' detectors as values: DETR, Deformable DETR, RT-DETRv2 and D-FINE on any backbone of ours.

Losses are transformers' own, of all decoder layers, as sums: matching and losses run in float32. Nothing here imports
transformers before a model is built. Defaults are those of the papers' models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from synchromesh.models.features import Backbone
from synchromesh.models.heads.objects import ObjectHead, ObjectModel

HUNDREDTHS = 100  # counts are whole numbers, the weight of a query is none


def query_weight(objects: int, images: int, *, queries: int, no_object: float) -> int:
    """Return the sum of the weights of all queries in a cross entropy, in hundredths.

    A query that stands for an object weighs 1, any other one `no_object`: what a weighted mean divides by.
    """
    asked = images * queries
    matched = min(objects, asked)
    return round(HUNDREDTHS * (matched + no_object * (asked - matched)))


class _Boxes(ObjectHead):
    """What settings of DETR's family have in common: losses of classes and of boxes, and no masks."""

    @property
    def says_masks(self) -> bool:
        return False

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        return {"class_loss": objects, "box_loss": objects}

    def weights(self) -> Mapping[str, float]:
        return {"class_loss": 1.0, "box_loss": 1.0}


@final
@dataclass(frozen=True)
class Detr(_Boxes):
    """DETR (arXiv 2005.12872): each query is an object or none, on the last map alone.

    Padding is told: an image gets the same boxes with padding as without, if the backbone sees no padding.

    Attributes:
        queries: most objects of an image.
        width: of the transformer.
        heads: of its attention.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        ffn: hidden width of the feed-forwards.
        dropout: in the transformer.
        no_object_weight: of queries without an object in the cross entropy.
    """

    queries: int = 100
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 2048
    dropout: float = 0.1
    no_object_weight: float = 0.1

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.box_networks import detr

        return detr(self, backbone, num_classes)

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        weight = query_weight(objects, images, queries=self.queries, no_object=self.no_object_weight)
        return {"class_loss": weight, "box_loss": objects}


@final
@dataclass(frozen=True)
class DeformableDetr(_Boxes):
    """Deformable DETR (arXiv 2010.04159): queries look at a few points of several maps.

    Padding is told, but group norms take their statistics over it: an image with padding does not get quite the boxes
    that it gets alone. transformers has no loss on the first of two stages: its proposals stay as they are drawn.

    Attributes:
        queries: most objects of an image.
        width: of the transformer; a multiple of 32.
        heads: of its attention.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        ffn: hidden width of the feed-forwards.
        dropout: in the transformer.
        levels: maps of the backbone that it sees, the coarsest ones; fewer where there are not so many.
        extra_levels: maps that it makes itself, each half of the one before.
        points: that a head looks at on each map.
        box_refine: whether each layer of the decoder corrects the boxes of the one before.
        two_stage: whether the encoder proposes the first boxes; it wants `box_refine`.
        most: boxes of an image, at most.
    """

    queries: int = 300
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 1024
    dropout: float = 0.1
    levels: int = 3
    extra_levels: int = 1
    points: int = 4
    box_refine: bool = False
    two_stage: bool = False
    most: int = 100

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.box_networks import deformable_detr

        return deformable_detr(self, backbone, num_classes)


@final
@dataclass(frozen=True)
class RTDetrV2(_Boxes):
    """RT-DETRv2 (arXiv 2407.17140): a small encoder across the maps, and queries that it proposes.

    Padding is not told: an image with padding does not get the boxes that it gets alone. It has batch norms, whose
    statistics are each rank's own.

    Attributes:
        queries: most objects of an image; its maps must have as many positions.
        width: of encoder and decoder.
        heads: of their attention.
        encoder_layers: of the encoder, on the last map.
        decoder_layers: of the decoder.
        ffn: hidden width of the feed-forwards.
        levels: maps of the backbone that it sees, the coarsest ones; fewer where there are not so many.
        points: that a head of the decoder looks at on each map.
        denoising: queries more in training, which are noisy copies of the truth; 0 for none.
        most: boxes of an image, at most.
    """

    queries: int = 300
    width: int = 256
    heads: int = 8
    encoder_layers: int = 1
    decoder_layers: int = 6
    ffn: int = 1024
    levels: int = 3
    points: int = 4
    denoising: int = 100
    most: int = 300

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.box_networks import rt_detr_v2

        return rt_detr_v2(self, backbone, num_classes)


@final
@dataclass(frozen=True)
class DFine(_Boxes):
    """D-FINE (arXiv 2410.13842): RT-DETR whose layers refine distributions of the sides, and learn from the last one.

    Padding is not told: an image with padding does not get the boxes that it gets alone. It has batch norms, whose
    statistics are each rank's own. The loss by which layers learn from the last one is a mean over queries, which adds
    up over images alone.

    Attributes:
        queries: most objects of an image; its maps must have as many positions.
        width: of encoder and decoder.
        heads: of their attention.
        encoder_layers: of the encoder, on the last map.
        decoder_layers: of the decoder.
        ffn: hidden width of the feed-forwards.
        levels: maps of the backbone that it sees, the coarsest ones; fewer where there are not so many.
        points: that a head of the decoder looks at on each map.
        denoising: queries more in training, which are noisy copies of the truth; 0 for none.
        bins: of a side's distribution.
        most: boxes of an image, at most.
    """

    queries: int = 300
    width: int = 256
    heads: int = 8
    encoder_layers: int = 1
    decoder_layers: int = 6
    ffn: int = 1024
    levels: int = 3
    points: int = 4
    denoising: int = 100
    bins: int = 32
    most: int = 300

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        from synchromesh.compat.huggingface.heads.box_networks import d_fine

        return d_fine(self, backbone, num_classes)

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        return {"class_loss": objects, "box_loss": objects, "distillation_loss": images}

    def weights(self) -> Mapping[str, float]:
        return {"class_loss": 1.0, "box_loss": 1.0, "distillation_loss": 1.0}
