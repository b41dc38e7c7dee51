import math

import pytest
import torch
from torch import nn
from transformers import AutoBackbone

from synchromesh.compat.huggingface.heads.adapter import (
    FeatureMaps,
    asked,
    features_config,
    in_float32,
    is_picture,
    place_of,
    touched,
)
from synchromesh.compat.huggingface.heads.fields import levels_of


@pytest.mark.parametrize("count", [1, 3, 4])
def test_maps_are_the_last_ones_normalised_at_each_position(count, tiny) -> None:
    backbone, images = tiny.build(), torch.randn(2, 3, 64, 48)
    features = backbone(images)
    maps = AutoBackbone.from_config(features_config(levels_of(backbone).last(count)))
    assert isinstance(maps, FeatureMaps)
    assert maps.channels == list(backbone.widths[-count:])
    network = nn.Sequential()
    network.inner = maps
    assert place_of(network) == "inner"
    with maps.showing(features):
        shown = maps(images).feature_maps
    assert torch.equal(shown[-1], features.last.permute(0, 3, 1, 2))
    for got, own in zip(shown[:-1], features.maps[-count:], strict=False):
        mean, spread = own.mean(1, keepdim=True), own.var(1, keepdim=True, unbiased=False)
        assert torch.allclose(got, (own - mean) / (spread + 1e-5).sqrt(), atol=1e-5)


def test_features_are_shown_inside_of_a_call_alone_even_where_it_fails(tiny) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = FeatureMaps(features_config(levels_of(tiny.build())))

        def forward(self, x):
            assert self.maps.features is not None
            raise KeyError(x)

    network = Failing()
    with pytest.raises(KeyError):
        asked(network, "maps", tiny.build()(torch.randn(1, 3, 64, 64)), x=1)
    assert network.maps.features is None


def test_pixels_of_a_picture_are_told_from_padding() -> None:
    sizes = torch.tensor([[2, 3], [4, 1]])
    found = is_picture(torch.zeros(2, 3, 4, 5), sizes)
    assert found.tolist() == [
        [[row < height and column < width for column in range(5)] for row in range(4)]
        for height, width in sizes.tolist()
    ]


def test_a_touch_is_a_gradient_of_zero_for_all_that_trains() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1), nn.LayerNorm(4)).bfloat16()
    network[1].weight.requires_grad_(False)
    zero = touched(network)
    assert zero == 0
    assert zero.dtype == torch.float32
    zero.backward()
    trains = [p for p in network.parameters() if p.requires_grad]
    assert len(trains) == 5
    assert all(p.grad is not None and not p.grad.any() for p in trains)
    assert network[1].weight.grad is None
    assert touched(nn.ReLU()) == 0


def test_numbers_of_half_precision_become_float32_wherever_they_stand() -> None:
    half, whole = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([2])
    double = torch.tensor([math.pi], dtype=torch.float64)
    got = in_float32({"a": [half, whole], "b": (double, None, {"c": half})})
    assert got["a"][0].dtype == torch.float32
    assert got["a"][1] is whole
    assert got["b"][0] is double
    assert got["b"][2]["c"].dtype == torch.float32
