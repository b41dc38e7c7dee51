"""Attention against its definition as loops; rotary positions against turns written out, and their invariance."""

import math

import pytest
import torch
from torch import Tensor

from synchromesh.models.attention import (
    CrossAttention,
    SelfAttention,
    dot_product_attention,
    grid_places,
    rotated,
    rotation_of,
)
from synchromesh.testing.compare import assert_close, check


def by_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each image, head and query by itself, heads side by side."""
    images = []
    for image in range(q.shape[0]):
        rows = []
        for at in range(q.shape[2]):
            heads = []
            for head in range(q.shape[1]):
                scores = torch.stack([q[image, head, at] @ key for key in k[image, head]]) / math.sqrt(q.shape[3])
                heads.append(scores.softmax(0) @ v[image, head])
            rows.append(torch.cat(heads))
        images.append(torch.stack(rows))
    return torch.stack(images)


def test_attention_and_its_gradients_are_those_of_the_loops() -> None:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 5, 8), "v": (2, 3, 5, 8)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    check(dot_product_attention, by_loops, inputs)


def test_attention_of_no_image_is_empty_and_a_transform_sees_the_same_numbers() -> None:
    q, k = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    assert dot_product_attention(q[:0], k[:0], k[:0]).shape == (0, 3, 8)
    _, slope = torch.func.jvp(lambda x: dot_product_attention(x, k, k), (q,), (q,))
    small = 1e-6 * q
    assert torch.allclose(
        slope, (dot_product_attention(q + small, k, k) - dot_product_attention(q - small, k, k)) / 2e-6, atol=1e-7
    )


@pytest.mark.parametrize("width", [4, 16])
def test_a_rotation_turns_each_pair_by_its_own_angle(width: int) -> None:
    place, x = (3, 5), torch.randn(width, dtype=torch.float64)
    turned = rotated(
        x.view(1, 1, 1, -1), rotation_of(torch.tensor([place]), width, base=100.0, dtype=torch.float64)
    ).view(-1)
    half = width // 2
    for part, at in enumerate(place):  # rows turn the first half of the channels, columns the second
        for i in range(half // 2):
            one, other = part * half + i, part * half + i + half // 2
            angle = at * 100.0 ** (-2 * i / half)
            wanted = complex(x[one], x[other]) * complex(math.cos(angle), math.sin(angle))
            assert complex(turned[one], turned[other]) == pytest.approx(wanted, abs=1e-12)


def test_products_of_turned_queries_and_keys_depend_on_differences_of_places_alone() -> None:
    q, k = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64)
    places = grid_places(2, 3)
    scores = []
    for moved in (0, 7):
        rotation = rotation_of(places + moved, 8, base=100.0, dtype=torch.float64)
        scores.append(rotated(q, rotation) @ rotated(k, rotation).mT)
    assert_close("scores", scores[1], scores[0])
    plain = q @ k.mT
    assert not torch.allclose(scores[0], plain)
    assert torch.allclose(scores[0].diagonal(dim1=-2, dim2=-1), plain.diagonal(dim1=-2, dim2=-1))


def test_a_self_attention_without_places_treats_positions_alike() -> None:
    layer, x, order = SelfAttention(16, 2).double(), torch.randn(2, 5, 16).double(), torch.randperm(5)
    assert_close("permuted", layer(x[:, order]), layer(x)[:, order])
    rotation = rotation_of(grid_places(1, 5), 8, base=100.0, dtype=torch.float64)
    assert not torch.allclose(layer(x[:, order], rotation), layer(x, rotation)[:, order])


def test_cross_attention_to_itself_is_self_attention() -> None:
    own, cross = SelfAttention(16, 2).double(), CrossAttention(16, 2).double()
    q, kv = own.qkv.weight.split((16, 32)), own.qkv.bias.split((16, 32))
    state = {"q.weight": q[0], "kv.weight": q[1], "q.bias": kv[0], "kv.bias": kv[1]}
    cross.load_state_dict({**state, "proj.weight": own.proj.weight, "proj.bias": own.proj.bias})
    x = torch.randn(2, 6, 16).double()
    rotation = rotation_of(grid_places(2, 3), 8, base=100.0, dtype=torch.float64)
    assert_close("plain", cross(x, x), own(x))
    assert_close("turned", cross(x, x, rotation, rotation), own(x, rotation))


def test_dropout_of_attention_weights_is_of_training_alone() -> None:
    layer, x = SelfAttention(8, 2, dropout=0.9), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
