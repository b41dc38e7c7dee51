"""transformers' UperNet as a value: it names pixels, on any backbone of ours.

Nothing here imports transformers before a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import final

from jaxtyping import Integer
from torch import Tensor

from synchromesh.models.features import Backbone
from synchromesh.models.heads.semantic import IGNORE, SemanticHead, SemanticModel


class Norms(Enum):
    """What normalises inside of a head."""

    BATCH = "batch"  # as published; statistics of a rank's images, two at least
    GROUP = "group"  # of one image alone


@final
@dataclass(frozen=True)
class UperNet(SemanticHead):
    """UperNet (arXiv 1807.10221): the last map pooled to several sizes, and a pyramid of all maps.

    Padding is not told: an image with padding does not get quite the logits that it gets alone.

    Attributes:
        width: of all parts.
        pool_scales: sides of the grids that the last map is pooled to.
        levels: maps of the backbone that it sees, the coarsest ones; fewer where there are not so many.
        auxiliary_width: of a second head on the third map, for training alone; there is none with fewer maps.
        auxiliary_weight: of its loss.
        norms: what normalises. With batch norms training wants two images on each rank.
    """

    width: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    levels: int = 4
    auxiliary_width: int = 256
    auxiliary_weight: float = 0.4
    norms: Norms = Norms.GROUP

    def build(self, backbone: Backbone, num_classes: int) -> SemanticModel:
        from synchromesh.compat.huggingface.heads.upernet_model import UperNetSegmenter

        return UperNetSegmenter(backbone, num_classes, self)

    def counts(self, labels: Integer[Tensor, "B H W"], *, ignore: int = IGNORE) -> Mapping[str, int]:
        pixels = int((labels != ignore).sum())
        return {"cross_entropy": pixels, "auxiliary_cross_entropy": pixels}

    def weights(self) -> Mapping[str, float]:
        return {"cross_entropy": 1.0, "auxiliary_cross_entropy": self.auxiliary_weight}
