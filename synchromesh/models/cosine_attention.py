"""Scaled cosine attention inside windows, forward and backward by hand for the CPU.

On a CPU the matrix products of small windows are fast, and what surrounds them is slow: norms, copies to heads-first
layout, bias, softmax. So each of these is done once, in place where possible, and backward writes one gradient tensor
of queries, keys and values. `window_attention.CosineAttention` has the definition.

Shape letters: W windows of all images, G windows of a map, N positions of a window, T = W N, h heads, d width of a
head, C = h d.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from synchromesh.torch_private import softmax_backward, unseen_by_policies

VECTOR_NUMBERS = 32  # of half precision in a vector register; torch does not vectorise loops over fewer


def cosine_attention(
    qkv: Float[Tensor, "W N QKV"], scale: Float[Tensor, " h"], bias: Float[Tensor, "G h N N"]
) -> Float[Tensor, "W N C"]:
    """Return softmax(scale cos(q, k) + bias) v, heads side by side; window w takes bias w mod G.

    Softmax runs in float32 (float64 for float64) whatever the dtype.
    """
    return _CosineAttention.apply(qkv, scale, bias)


class _CosineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        (W, N, C), h = qkv.shape, scale.shape[0]
        C = C // 3
        # A selective checkpoint cannot save what is written to in place: it runs this again as a whole.
        with torch.autocast("cpu", enabled=False), unseen_by_policies():
            # Queries are divided by their norm and multiplied by the scale, keys divided by their norm: one factor for
            # each position and head of both.
            factors = torch.cat((scale, torch.ones_like(scale))).to(qkv.dtype)
            qk = qkv.view(-1, 3, h, C // h)[:, :2].flatten(1, 2)
            factors_Th = _sum_heads(qk.square()).sqrt_().clamp_min_(1e-12).reciprocal_().mul_(factors)
            unit = _scale_heads(qk, factors_Th)
            q, k = _heads_first(unit.view(W, N, 2, h, C // h))
            (v,) = _heads_first(qkv.view(W, N, 3, h, C // h)[:, :, 2:])
            weights = _softmax(torch.bmm(q, k.mT), bias)
            y = _positions_first(torch.bmm(weights, v)[None], h)
        ctx.save_for_backward(unit, q, k, v, weights, factors_Th, scale)
        ctx.bias = (bias.shape[0], bias.dtype)
        return y.view(W, N, C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = gradients
        unit, q, k, v, weights, factors_Th, scale = ctx.saved_tensors
        G, bias_dtype = ctx.bias
        (W, N, C), h = dy.shape, scale.shape[0]
        with torch.autocast("cpu", enabled=False):
            (dy,) = _heads_first(dy.to(q.dtype).reshape(W, N, 1, h, C // h))
            dqk = q.new_empty(2, *q.shape)
            dqkv = q.new_empty(W, N, 3, h, C // h)
            dqkv[:, :, 2:] = _positions_first(torch.bmm(weights.mT, dy)[None], h)
            dscores = _softmax_backward(torch.bmm(dy, v.mT), weights)
            dbias = dscores.view(-1, G, h, N, N).sum(0, dtype=bias_dtype)
            dscores = dscores.to(q.dtype)
            torch.bmm(dscores, k, out=dqk[0])
            torch.bmm(dscores.mT, q, out=dqk[1])
            # Positions first from here on. For u = f x / |x| with gradient du: dx = (f / |x|) (du - u <u, du> / f^2).
            # The factor f is the scale for queries, whose gradient is <u, du> / f, and 1 for keys.
            dunit = _positions_first(dqk, h).view(-1, 2 * h, C // h)
            along_Th = _sum_heads(unit * dunit)
            dscale = along_Th[:, :h].sum(0, dtype=scale.dtype) / scale
            along_Th[:, :h] /= scale.to(q.dtype).square()
            dunit -= _scale_heads(unit, along_Th)
            dqkv.view(-1, 3, h, C // h)[:, :2].flatten(1, 2).copy_(_scale_heads(dunit, factors_Th))
        return dqkv.view(W, N, 3 * C), dscale, dbias


def _sum_heads(x: Tensor) -> Tensor:
    """Sum over the width of heads: [T, heads, d] to [T, heads]."""
    if not _slow(x):
        return x.sum(-1)
    return x.flatten(1) @ _spread(x).T


def _scale_heads(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the vectors of heads by their factors: [T, heads, d] times [T, heads]."""
    if not _slow(x):
        return x * factors[..., None]
    return (factors @ _spread(x)).view(x.shape).mul_(x)


def _slow(x: Tensor) -> bool:
    """Tell whether a product with a 0/1 matrix is faster than a loop over the width of a head."""
    return x.dtype.itemsize == 2 and x.shape[2] < VECTOR_NUMBERS


def _spread(x: Tensor) -> Tensor:
    """Return the 0/1 matrix [heads, heads * d] that repeats each head's number over its width; its transpose sums."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).repeat_interleave(x.shape[2], 1)


def _heads_first(x: Tensor) -> Tensor:
    """Copy [W, N, P, h, d] to [P, W * h, N, d], the layout of batched products; P is 1 to 3 of q, k, v."""
    W, N, P, h, d = x.shape
    y = x.new_empty(P, W, h, N, d)
    y.copy_(x.permute(2, 0, 3, 1, 4))
    return y.view(P, W * h, N, d)


def _positions_first(x: Tensor, h: int) -> Tensor:
    """Copy [P, W * h, N, d] back to [W, N, P, h, d]."""
    P, _, N, d = x.shape
    y = x.new_empty(x.shape[1] // h, N, P, h, d)
    y.copy_(x.view(P, -1, h, N, d).permute(1, 3, 0, 2, 4))
    return y


def _softmax(scores: Tensor, bias: Tensor) -> Tensor:
    G, h, N, _ = bias.shape
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide.view(-1, G, h, N, N).add_(bias)
    return torch.softmax(wide, -1, out=wide).to(scores.dtype)


def _softmax_backward(dweights: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(weights.dtype, torch.float32)
    return softmax_backward(dweights.to(wide), weights.to(wide))
