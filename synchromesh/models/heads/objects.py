"""ObjectHead: the seam under everything that finds objects; the task above it knows neither anchors nor queries.

    images, sizes, truth ──> ObjectModel ──> sums of losses by name   (training)
    images, sizes        ──> ObjectModel ──> Found, one per image     (evaluation)

Shape letters: B images, M objects of all images, H W rows and columns of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.models.features import Backbone


@dataclass(frozen=True)
class Objects:
    """The objects of a batch.

    Attributes:
        image: which image each one is in.
        boxes: left, top, right and bottom, in pixels.
        labels: classes.
        masks: their pixels, in images with padding; None where nobody knows or asks.
    """

    image: Int[Tensor, " M"]
    boxes: Float[Tensor, "M 4"]
    labels: Int[Tensor, " M"]
    masks: Bool[Tensor, "M H W"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, which: Tensor) -> Objects:
        """Return some of them, by number or by a mask [M]."""
        masks = None if self.masks is None else self.masks[which]
        return Objects(self.image[which], self.boxes[which], self.labels[which], masks)


@dataclass(frozen=True)
class Found:
    """What a model finds in one image, the likeliest first.

    Attributes:
        boxes: in pixels, inside of the image.
        scores: probability of each.
        labels: class of each.
        masks: the pixels of each, in the image without its padding; None from a head that says none.
    """

    boxes: Float[Tensor, "M 4"]
    scores: Float[Tensor, " M"]
    labels: Int[Tensor, " M"]
    masks: Bool[Tensor, "M _ _"] | None = None


class ObjectModel(nn.Module, ABC):
    """A backbone, in the attribute `backbone`, and a head on it."""

    backbone: nn.Module

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        *,
        least: float = 0.0,
    ) -> Mapping[str, Tensor] | list[Found]:
        """Return sums of losses where the truth is given, else what is found.

        Args:
            images: normalised, padded with zeros at the right and at the bottom; perhaps none.
            sizes: height and width of each image without its padding.
            truth: the objects. The sums have the names of `ObjectHead.counts`, are float32, and carry gradients also
                where a batch has no image or no object.
            least: lowest probability of what is found.
        """


class ObjectHead(ABC):
    """Settings of a head that finds objects: a frozen dataclass of plain values."""

    @property
    @abstractmethod
    def says_masks(self) -> bool:
        """Whether it says which pixels are an object's; then the truth needs masks."""

    @abstractmethod
    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        """Return the model.

        Raises:
            ValueError: the settings contradict each other or the backbone.
        """

    @abstractmethod
    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        """Return what the sum of each loss is divided by, of a batch with so many objects and images.

        Counts add up over the parts of a batch and over ranks: gradients are then those of the whole batch.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Return the weight of each mean in the loss, by the names of `counts`."""
