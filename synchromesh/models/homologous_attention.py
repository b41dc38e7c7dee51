"""Homologous attention: each position attends to the few that it agrees with most (MixedAE, CVPR 2023).

After the paper, whose formula is recalled: the top share of keys of each query and head, softmax over these alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.attention import SelfAttention, dot_product_attention, rotated
from synchromesh.models.linear import apply


def homologous_attention(
    q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h M d"], v: Float[Tensor, "B h M d"], kept: int
) -> Float[Tensor, "B N C"]:
    """Return softmax(q k^T / sqrt(d)) v over the `kept` best keys of each query, heads side by side."""
    if kept >= k.shape[2]:
        return dot_product_attention(q, k, v)
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    best = logits.topk(kept, -1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    y = logits.masked_fill(~chosen, -math.inf).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


class HomologousAttention(nn.Module):
    """Self-attention to the best share of the keys, with the weights of a plain one, under the same names.

    Args:
        plain: whose layers it takes over.
        ratio: share of the keys, rounded up; with 1 it is the plain one.

    Raises:
        ValueError: a ratio that is no share, or dropout on attention weights.
    """

    def __init__(self, plain: SelfAttention, ratio: float) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}, wanted a share of the keys, above 0 and at most 1")
        if plain.dropout:
            raise ValueError("attention weights have dropout, which homologous attention has not: set it to 0")
        self.num_heads, self.ratio = plain.num_heads, ratio
        self.qkv, self.proj, self.output_dropout = plain.qkv, plain.proj, plain.output_dropout

    def forward(
        self, x: Float[Tensor, "B N C"], rotation: Float[Tensor, "2 *B 1 N d"] | None = None
    ) -> Float[Tensor, "B N C"]:
        q, k, v = apply(self.qkv, x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        y = homologous_attention(q, k, v, math.ceil(self.ratio * x.shape[1]))
        return self.output_dropout(apply(self.proj, y))

    def multiply_adds(self, positions: int) -> float:
        """Return those of one sequence, as of plain attention: all products are computed before some are left out."""
        width = self.proj.in_features
        return 4.0 * positions * width**2 + 2.0 * positions**2 * width


def homologous_contrast(
    z: Float[Tensor, "B L D"], same: Bool[Tensor, "B L L"], temperature: float
) -> Float[Tensor, " B"]:
    """Return the sum over positions i of -mean over j of log(exp(z_i z_j / t) / sum over k != i of exp(z_i z_k / t)).

    j runs through the other positions of the same source; a position without any counts 0. Rows of z are normalised
    here; sums are in float32 or wider.

    Args:
        z: one row for each position of a mixture.
        same: [B, L, L], which positions have the same source.
        temperature: t.
    """
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    logits = (z @ z.mT / temperature).masked_fill(itself, -math.inf)
    logs = logits - logits.logsumexp(-1, keepdim=True)
    positive = same & ~itself
    of_each = torch.where(positive, logs, 0).sum(-1) / positive.sum(-1).clamp(min=1)
    return -of_each.sum(1)


def nearest_of_same_source(z: Float[Tensor, "B L D"], same: Bool[Tensor, "B L L"]) -> Float[Tensor, " B"]:
    """Return the share of positions whose nearest other one, by cosine, has the same source."""
    z = F.normalize(z.float(), dim=-1)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    nearest = (z @ z.mT).masked_fill(itself, -math.inf).argmax(-1, keepdim=True)
    return same.gather(2, nearest)[..., 0].float().mean(1)
