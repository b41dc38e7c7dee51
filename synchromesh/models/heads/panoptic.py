"""PanopticHead: the seam under everything that gives each pixel one segment, a thing or stuff (arXiv 1801.00868).

    images, sizes, truth, labels ──> PanopticModel ──> sums of losses by name    (training)
    images, sizes                ──> PanopticModel ──> Segments, one per image   (evaluation)

Classes have one numbering: `things` tells for each whether its segments are single objects; the others are stuff.

Shape letters: B images, S segments of an image, H W rows and columns of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int, Int32, Integer
from torch import Tensor, nn

from synchromesh.models.features import Backbone
from synchromesh.models.heads.objects import Objects
from synchromesh.models.heads.semantic import IGNORE


@dataclass(frozen=True)
class Segments:
    """What a model says of one image: each pixel is in one segment, or in none.

    Attributes:
        ids: the segment of each pixel, from 1, in the image without its padding; 0 for none.
        labels: class of segment 1, 2 and so on.
        scores: probability of each.
    """

    ids: Int32[Tensor, "H W"]
    labels: Int[Tensor, " S"]
    scores: Float[Tensor, " S"]

    def __len__(self) -> int:
        return len(self.labels)


class PanopticModel(nn.Module, ABC):
    """A backbone, in the attribute `backbone`, and heads on it."""

    backbone: nn.Module

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | list[Segments]:
        """Return sums of losses where the truth is given, else the segments of each image.

        Args:
            images: normalised, padded with zeros at the right and at the bottom; perhaps none.
            sizes: height and width of each image without its padding.
            truth: the things, with masks. The sums have the names of `PanopticHead.counts`, are float32, and carry
                gradients also where a batch has no image or no object.
            labels: class of each pixel, of things too; wanted where `truth` is given.
            ignore: stands in `labels` for pixels that do not count, padding among them.
        """


class PanopticHead(ABC):
    """Settings of a head that gives each pixel a segment: a frozen dataclass of plain values."""

    @abstractmethod
    def build(self, backbone: Backbone, things: Sequence[bool]) -> PanopticModel:
        """Return the model for these classes.

        Raises:
            ValueError: the settings contradict each other, the classes or the backbone.
        """

    @abstractmethod
    def counts(
        self, truth: Objects, labels: Integer[Tensor, "B H W"], things: Sequence[bool], *, ignore: int = IGNORE
    ) -> Mapping[str, int]:
        """Return what the sum of each loss is divided by, of a batch with this truth.

        Counts add up over the parts of a batch and over ranks: gradients are then those of the whole batch.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Return the weight of each mean in the loss, by the names of `counts`."""
