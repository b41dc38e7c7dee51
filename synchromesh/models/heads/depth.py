"""DepthHead: the seam under everything that measures each pixel's distance; and DepthFPN, a head of our own.

    images, sizes, depth ──> DepthModel ──> sums of losses by name   (training)
    images, sizes        ──> DepthModel ──> metres of each pixel     (evaluation)

Shape letters: B images, H W rows and columns of an image, P pixels of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.models.features import Backbone
from synchromesh.models.heads.joined import JoinedPyramid
from synchromesh.models.heads.semantic import enlarged


class DepthModel(nn.Module, ABC):
    """A backbone, in the attribute `backbone`, and a head on it."""

    backbone: nn.Module

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        depth: Float[Tensor, "B H W"] | None = None,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B H W"]:
        """Return sums of losses where the depth is given, else the depth in metres, in float32.

        Args:
            images: normalised, padded with zeros at the right and at the bottom; perhaps none.
            sizes: height and width of each image without its padding.
            depth: metres; 0, or what is not finite, where nobody knows, and in padding. The sums have the names of
                `DepthHead.counts`, are float32, and carry gradients also where a batch has no image or no known pixel.
        """


class DepthHead(ABC):
    """Settings of a head that measures distances: a frozen dataclass of plain values."""

    @abstractmethod
    def build(self, backbone: Backbone) -> DepthModel:
        """Return the model.

        Raises:
            ValueError: the settings contradict each other or the backbone.
        """

    @abstractmethod
    def counts(self, depth: Float[Tensor, "B H W"]) -> Mapping[str, int]:
        """Return what the sum of each loss is divided by, of a batch with this depth.

        Counts add up over the parts of a batch and over ranks: gradients are then those of the whole batch.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Return the weight of each mean in the loss, by the names of `counts`."""


def known(depth: Float[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Tell where a depth is known: finite and above 0."""
    return depth.isfinite() & (depth > 0)


@final
@dataclass(frozen=True)
class ScaleInvariantLog:
    """The scale-invariant log loss (SILog, arXiv 1406.2283, equation 4), as a sum over known pixels.

    With d = log found - log true, an image of n known pixels has the paper's loss (1/n) Σ d² - λ (1/n Σ d)², and adds n
    times this to the sum: Σ d² - λ (Σ d)² / n. The second term is of each image alone, so that sums of parts of a batch
    add up; divided by all known pixels, the sum is the mean of the images' losses, weighted by their known pixels.

    Attributes:
        share: λ. 0 minds the scale as much as all else, 1 not at all; 0.5 in the paper.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share is {self.share}, wanted a number in [0, 1]")

    @property
    def name(self) -> str:
        return "silog"

    def __call__(self, off: Float[Tensor, "B P"], here: Bool[Tensor, "B P"]) -> Float[Tensor, ""]:
        """Return the sum, of differences of logarithms that are 0 where nobody knows."""
        of_images = off.sum(1).square() / here.sum(1).clamp(min=1)
        return off.square().sum() - self.share * of_images.sum()


@final
@dataclass(frozen=True)
class LogDifference:
    """The sum of |log found - log true| over known pixels."""

    @property
    def name(self) -> str:
        return "log_difference"

    def __call__(self, off: Float[Tensor, "B P"], here: Bool[Tensor, "B P"]) -> Float[Tensor, ""]:
        """Return the sum, of differences of logarithms that are 0 where nobody knows."""
        return off.abs().sum()


@final
@dataclass(frozen=True)
class DepthFPN(DepthHead):
    """Settings of a head that says the logarithm of the depth, from a pyramid summed at the finest stride.

    Attributes:
        width: channels of the pyramid and the branches.
        nearest: least depth that can be said, metres.
        farthest: most depth that can be said, metres; the depth is then nearest^(1 - s) farthest^s with a sigmoid s.
            None for no limit: nearest + softplus.
        loss: what training minimises.
    """

    width: int = 128
    nearest: float = 0.1
    farthest: float | None = 100.0
    loss: ScaleInvariantLog | LogDifference = field(default_factory=ScaleInvariantLog)

    def __post_init__(self) -> None:
        if not 0.0 < self.nearest < (math.inf if self.farthest is None else self.farthest):
            raise ValueError(
                f"depth from {self.nearest} to {self.farthest} metres, wanted nearest above 0 and farthest above it"
            )

    def build(self, backbone: Backbone) -> PyramidDepth:
        return PyramidDepth(backbone, self)

    def counts(self, depth: Float[Tensor, "B H W"]) -> Mapping[str, int]:
        return {self.loss.name: int(known(depth).sum())}

    def weights(self) -> Mapping[str, float]:
        return {self.loss.name: 1.0}


@final
class PyramidDepth(DepthModel):
    """A backbone, a pyramid whose levels are summed at the finest stride, and two convolutions.

    Norms of the pyramid take their statistics over a whole map: an image with padding does not get quite the depth
    that it gets alone.
    """

    def __init__(self, backbone: Backbone, settings: DepthFPN) -> None:
        super().__init__()
        self.backbone, self.settings, width = backbone, settings, settings.width
        self.joined = JoinedPyramid(backbone.widths, width)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.depth = nn.Conv2d(width, 1, 1)
        nn.init.normal_(self.depth.weight, std=0.01)
        nn.init.zeros_(self.depth.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        depth: Float[Tensor, "B H W"] | None = None,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B H W"]:
        said = self.depth(self.smooth(self.joined(self.backbone(images))))
        log = log_depth(enlarged(said, images)[:, 0], self.settings)
        if depth is None:
            return log.exp()
        here = known(depth)
        off = torch.where(here, log - depth.float().where(here, 1).log(), 0)
        return {self.settings.loss.name: self.settings.loss(off.flatten(1), here.flatten(1))}


def log_depth(said: Float[Tensor, "*S"], settings: DepthFPN) -> Float[Tensor, "*S"]:
    """Return the logarithm of the depth in metres, of any number that a head says."""
    near = math.log(settings.nearest)
    if settings.farthest is None:
        return (F.softplus(said) + settings.nearest).log()
    return near + said.sigmoid() * (math.log(settings.farthest) - near)
