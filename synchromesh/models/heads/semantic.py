"""SemanticHead: the seam under everything that names each pixel's class; and SemanticFPN, a head of our own.

    images, sizes, labels ──> SemanticModel ──> sums of losses by name   (training)
    images, sizes         ──> SemanticModel ──> logits of each pixel     (evaluation)

Shape letters: B images, N classes, H W rows and columns of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from synchromesh.models.features import Backbone
from synchromesh.models.heads.joined import JoinedPyramid

IGNORE = 255
"""Stands in a label map where nobody knows, and in padding."""


class SemanticModel(nn.Module, ABC):
    """A backbone, in the attribute `backbone`, and a head on it."""

    backbone: nn.Module

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B _ H W"]:
        """Return sums of losses where labels are given, else logits [B, N, H, W] at the images' size, in float32.

        Args:
            images: normalised, padded with zeros at the right and at the bottom; perhaps none.
            sizes: height and width of each image without its padding.
            labels: classes. The sums have the names of `SemanticHead.counts`, are float32, and carry gradients also
                where a batch has no image or no pixel that counts.
            ignore: stands in `labels` for pixels that do not count, padding among them.
        """


class SemanticHead(ABC):
    """Settings of a head that names each pixel's class: a frozen dataclass of plain values."""

    @abstractmethod
    def build(self, backbone: Backbone, num_classes: int) -> SemanticModel:
        """Return the model.

        Raises:
            ValueError: the settings contradict each other or the backbone.
        """

    @abstractmethod
    def counts(self, labels: Integer[Tensor, "B H W"], *, ignore: int = IGNORE) -> Mapping[str, int]:
        """Return what the sum of each loss is divided by, of a batch with these labels.

        Counts add up over the parts of a batch and over ranks: gradients are then those of the whole batch.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Return the weight of each mean in the loss, by the names of `counts`."""


@final
@dataclass(frozen=True)
class SemanticFPN(SemanticHead):
    """Settings of the semantic branch of Panoptic FPN (arXiv 1901.02446, section 3).

    Attributes:
        width: channels of the branches; 128 in the paper.
        pyramid_width: channels of the pyramid, 256 in the paper; none for that of the branches.
    """

    width: int = 128
    pyramid_width: int | None = None

    def build(self, backbone: Backbone, num_classes: int) -> PyramidSegmenter:
        return PyramidSegmenter(backbone, num_classes, self)

    def counts(self, labels: Integer[Tensor, "B H W"], *, ignore: int = IGNORE) -> Mapping[str, int]:
        return {"cross_entropy": int((labels != ignore).sum())}

    def weights(self) -> Mapping[str, float]:
        return {"cross_entropy": 1.0}


@final
class PyramidSegmenter(SemanticModel):
    """A backbone, a pyramid whose levels are summed at the finest stride, and a linear layer at each position.

    Norms of the pyramid take their statistics over a whole map: an image with padding does not get quite the logits
    that it gets alone.
    """

    def __init__(self, backbone: Backbone, num_classes: int, settings: SemanticFPN) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, wanted an integer >= 1")
        self.backbone = backbone
        self.joined = JoinedPyramid(backbone.widths, settings.width, pyramid_width=settings.pyramid_width)
        self.classes = nn.Conv2d(settings.width, num_classes, 1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.zeros_(self.classes.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B _ H W"]:
        logits = enlarged(self.classes(self.joined(self.backbone(images))), images)
        return logits if labels is None else {"cross_entropy": summed_cross_entropy(logits, labels, ignore=ignore)}


def enlarged(x: Float[Tensor, "B N _ _"], images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N H W"]:
    """Return a map at the images' size, bilinear, in float32."""
    return F.interpolate(x.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


def summed_cross_entropy(
    logits: Float[Tensor, "B N H W"], labels: Integer[Tensor, "B H W"], *, ignore: int
) -> Float[Tensor, ""]:
    """Return the sum of -log p(label) over the pixels that count, in float32; 0 with gradients where none does."""
    return F.cross_entropy(logits.float(), labels.long(), ignore_index=ignore, reduction="sum")
