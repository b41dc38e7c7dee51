import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from synchromesh.models.features import Backbone, BackboneConfig, Features, Place


@dataclasses.dataclass(frozen=True)
class Smallest(BackboneConfig):
    """The least that a backbone's settings say."""

    def build(self, *, ffn: Any = None) -> Backbone:
        return Linear()

    def sized(self, *, image_size: int, channels: int) -> "Smallest":
        return self


class Linear(Backbone):
    """The least that a backbone does."""

    widths, strides, init_std = (256,), (1,), 0.5

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(256), nn.Linear(256, 256)

    def forward(self, images: Any, hidden: Any = None) -> Features:
        raise NotImplementedError  # only its initialisation is looked at

    def multiply_adds(self) -> float:
        return 0.0

    def feed_forwards(self) -> Iterator[Place]:
        return iter(())


def test_settings_without_a_mask_token_say_so_by_their_name() -> None:
    with pytest.raises(ValueError, match="a Smallest has no mask token: wanted a backbone that has"):
        Smallest().hiding()


def test_a_backbone_draws_its_weights_by_its_own_deviation_also_into_fresh_memory() -> None:
    with torch.device("meta"):
        backbone = Smallest().build()
    backbone.to_empty(device="cpu").reset_parameters()
    assert 0.4 < backbone.proj.weight.std().item() < 0.5  # truncated at two deviations
    assert not backbone.proj.bias.any()
    assert torch.equal(backbone.norm.weight, torch.ones(256))
