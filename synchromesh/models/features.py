"""Features: what every backbone sees in images and every head reads; and what a backbone tells of itself.

A new backbone is one file: a config, which is all that recipes, files and the planner know of it, and a module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import tyro
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.export import register_dataclass

from synchromesh.models.initialize import initialize
from synchromesh.models.mixtures import ExpertsConfig, FeedForwardFactory

FromData = tyro.conf.Suppress
"""Marks what a task sets in a backbone's settings, so that the command line does not ask for it."""
Settings = TypeVar("Settings", bound="BackboneConfig")


@dataclass(frozen=True)
class Features:
    """What a backbone sees in the images.

    Attributes:
        pooled: mean of `last` over the positions, or the class token of a backbone that has one.
        last: the last stage's map after the final normalisation, channels last.
        maps: each stage's map before merging and without normalisation, channels first (views, for dense tasks).
    """

    pooled: Float[Tensor, "B D"]
    last: Float[Tensor, "B H W D"]
    maps: tuple[Float[Tensor, "B _ _ _"], ...]


register_dataclass(Features)


@dataclass(frozen=True)
class Place:
    """A feed-forward of a backbone.

    Attributes:
        stage: from 0.
        ffn: the module.
        positions: tokens that it sees of one image of the configured size.
        width: channels of a token.
    """

    stage: int
    ffn: nn.Module
    positions: int
    width: int


class Backbone(nn.Module, ABC):
    """Images of any size to `Features`.

    Attributes:
        widths: channels of each map.
        strides: pixels of the image, along one side, for a position of each map.
        init_std: standard deviation of the first weights, for heads too.
        optional: names of tensors that weights from elsewhere may lack.
    """

    optional: ClassVar[frozenset[str]] = frozenset()

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    init_std: float

    @abstractmethod
    def forward(self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None) -> Features:
        """Return the features of normalised pixels; the mask token stands for hidden patches, counted row by row."""

    def reset_parameters(self) -> None:
        """Initialise all weights and buffers again; here those of torch's layers and the library's."""
        initialize(self, self.init_std)

    @abstractmethod
    def multiply_adds(self) -> float:
        """Return the multiplications of one image of the configured size, counted as in the tables of papers."""

    @abstractmethod
    def feed_forwards(self) -> Iterator[Place]:
        """Yield the feed-forward of every block."""


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """All that a backbone is made of: plain values, which go to disk as JSON.

    Attributes:
        experts: which feed-forwards become mixtures of experts, and of what kind; none for a dense model.
    """

    experts: ExpertsConfig | None = None

    @abstractmethod
    def build(self, *, ffn: FeedForwardFactory | None = None) -> Backbone:
        """Return the backbone; `ffn` makes its feed-forwards, instead of what these settings say.

        Raises:
            ValueError: the settings contradict each other.
        """

    @abstractmethod
    def sized(self: Settings, *, image_size: int, channels: int) -> Settings:
        """Return these settings for images of this side, in pixels, and this many channels."""

    def hiding(self: Settings) -> Settings:
        """Return these settings with a mask token for hidden patches.

        Raises:
            ValueError: such a backbone has none.
        """
        raise ValueError(f"a {type(self).__name__} has no mask token: wanted a backbone that has, such as SwinV2Config")
