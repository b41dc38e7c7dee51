"""Attention of every position to every other, or to those of a second sequence; with 2-D rotary positions if wanted.

Shape letters: B images, N M positions, C channels, h heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.models.linear import apply
from synchromesh.torch_private import transformed


def dot_product_attention(
    q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h M d"], v: Float[Tensor, "B h M d"], *, dropout: float = 0.0
) -> Float[Tensor, "B N C"]:
    """Return softmax(q k^T / sqrt(d)) v, heads side by side; `dropout` is the rate on the softmax."""
    if transformed() or q.shape[0] == 0:  # no fused kernel has a forward-mode derivative
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        y = F.dropout(weights, dropout, dropout > 0) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def rotation_of(
    places: Float[Tensor, "*B N 2"] | Int[Tensor, "*B N 2"],
    head_width: int,
    base: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "2 *B 1 N d"]:
    """Return cosines and sines that turn a head's channels by row and column (2-D rotary positions, arXiv 2104.09864).

    The first half of the channels turns with the row, the second with the column; in a half of D channels, i and
    i + D / 2 make a pair that turns by place * base^(-2 i / D). So products of queries and keys depend on differences
    of places alone.

    Args:
        places: row and column of each position.
        head_width: d, a multiple of 4.
        base: of the slowest turns.
        dtype: of angles and result.
    """
    half = head_width // 2
    rates = base ** (-torch.arange(0, half, 2, device=places.device, dtype=dtype) / half)
    angles = places[..., None].to(dtype) * rates  # [..., N, 2, d/4]
    angles = torch.cat((angles, angles), -1).flatten(-2)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(-3)


def rotated(x: Float[Tensor, "B h N d"], rotation: Float[Tensor, "2 *B 1 N d"]) -> Float[Tensor, "B h N d"]:
    """Turn the channels of each position as `rotation_of` says."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # of each pair, [B, h, N, 2, d/4]
    turned = torch.stack((-second, first), -2).flatten(-3)
    return x * cos + turned * sin


def grid_places(height: int, width: int, *, device: torch.device | None = None) -> Int[Tensor, "N 2"]:
    """Return row and column of each position of a map, row by row."""
    return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself.

    Args:
        width: C.
        num_heads: h.
        qkv_bias: whether queries, keys and values have biases.
        dropout: on attention weights.
        output_dropout: on what it returns.
    """

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool = True, dropout: float = 0.0, output_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(
        self, x: Float[Tensor, "B N C"], rotation: Float[Tensor, "2 *B 1 N d"] | None = None
    ) -> Float[Tensor, "B N C"]:
        q, k, v = apply(self.qkv, x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        y = dot_product_attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.output_dropout(apply(self.proj, y))

    def multiply_adds(self, positions: int) -> float:
        """Return those of one sequence: four projections and the two products of attention."""
        width = self.proj.in_features
        return 4.0 * positions * width**2 + 2.0 * positions**2 * width


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to a second one, whose width is the same; arguments as `SelfAttention`."""

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool = True, dropout: float = 0.0, output_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        second: Float[Tensor, "B M C"],
        rotation: Float[Tensor, "2 *B 1 N d"] | None = None,
        second_rotation: Float[Tensor, "2 *B2 1 M d"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Return what each position of x takes from the second sequence; both or neither have a rotation."""
        q = apply(self.q, x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = apply(self.kv, second).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if rotation is not None and second_rotation is not None:
            q, k = rotated(q, rotation), rotated(k, second_rotation)
        y = dot_product_attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.output_dropout(apply(self.proj, y))

    def multiply_adds(self, positions: int, others: int) -> float:
        """Return those of one sequence of `positions` that attends to one of `others`."""
        width = self.proj.in_features
        return 2.0 * (positions + others) * width**2 + 2.0 * positions * others * width
