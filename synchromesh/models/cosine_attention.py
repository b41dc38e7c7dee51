"""Scaled cosine attention inside windows, forward and backward by hand for the CPU.

On a CPU the matrix products of small windows are fast, and what surrounds them is slow: norms, copies to heads-first
layout, bias, softmax, and fresh memory, a page fault for each 4 KiB of scores. So a block of windows is computed at a
time, whose scores stay in a core's second-level cache, in memory that the next block uses again. Backward makes the
heads-first copies again instead of keeping them, and writes one gradient tensor of queries, keys and values.
`window_attention.CosineAttention` has the definition.

Shape letters: W windows of all images, G windows of a map, N positions of a window, h heads, d width of a head,
C = h d, R = h times the windows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from synchromesh.kernels.memory import room
from synchromesh.torch_private import softmax_backward_, unseen_by_policies

BLOCK_SCORES = 2**18  # that are computed at a time: 1 MiB of float32
FEW_POSITIONS = 8  # windows of fewer are multiplied in float32: products of half precision are slower there


def cosine_attention(
    qkv: Float[Tensor, "W N QKV"], scale: Float[Tensor, " h"], bias: Float[Tensor, "G h N N"]
) -> Float[Tensor, "W N C"]:
    """Return softmax(scale cos(q, k) + bias) v, heads side by side; window w takes bias w mod G.

    Norms and softmax run in float32 (float64 for float64) whatever the dtype.
    """
    if torch.is_grad_enabled():
        return _CosineAttention.apply(qkv, scale, bias)
    with torch.autocast("cpu", enabled=False):
        return _forward(qkv, scale, bias, None)


class _CosineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        (W, N, _), h = qkv.shape, len(scale)
        # A selective checkpoint cannot save what is written to in place: it runs this again as a whole.
        with torch.autocast("cpu", enabled=False), unseen_by_policies():
            weights = _room(qkv, (W * h, N, N), _product_dtype(qkv))
            kept = _Kept(weights, qkv.new_empty(2, W * h, N, 1, dtype=_wide(qkv)))
            y = _forward(qkv, scale, bias, kept)
        ctx.save_for_backward(qkv, scale, *kept)
        ctx.bias = (len(bias), bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, scale, *kept = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            dqkv, dscale, dbias = _backward(gradients[0], qkv, scale, _Kept(*kept), ctx.bias[0])
        return dqkv, dscale.to(scale.dtype), dbias.to(ctx.bias[1])


class _Kept(NamedTuple):
    """What backward wants of all windows.

    Attributes:
        weights: [W h, N, N], the softmax, in the dtype of products.
        factors: [2, W h, N, 1], what each query and key is multiplied by.
    """

    weights: Tensor
    factors: Tensor


class _Space(NamedTuple):
    """The memory of a block. In float32 and wider, `low` is `scores` and `narrow` is `vectors`.

    Attributes:
        scores: [R, N, N], in float32 at least.
        low: [R, N, N], in the dtype of products.
        vectors: [3, R, N, d], of queries, keys and values, in float32 at least.
        narrow: [3, R, N, d], in the dtype of products.
    """

    scores: Tensor
    low: Tensor
    vectors: Tensor
    narrow: Tensor

    @staticmethod
    def of(qkv: Tensor, heads: int, windows: int) -> _Space:
        """Return memory for so many windows."""
        N, d, wide, dtype = qkv.shape[1], qkv.shape[2] // (3 * heads), _wide(qkv), _product_dtype(qkv)
        scores = qkv.new_empty(windows * heads, N, N, dtype=wide)
        vectors = qkv.new_empty(3, windows * heads, N, d, dtype=wide)
        if dtype == wide:
            return _Space(scores, scores, vectors, vectors)
        return _Space(scores, torch.empty_like(scores, dtype=dtype), vectors, torch.empty_like(vectors, dtype=dtype))

    def first(self, rows: int) -> _Space:
        """Return what a smaller block needs of it."""
        return _Space(self.scores[:rows], self.low[:rows], self.vectors[:, :rows], self.narrow[:, :rows])


def _forward(qkv: Tensor, scale: Tensor, bias: Tensor, kept: _Kept | None) -> Tensor:
    """Return the result; write what backward wants."""
    (W, N, C), h, bias = qkv.shape, len(scale), bias.to(_wide(qkv))
    y = qkv.new_empty(W, N, C // 3)
    most = _windows_of_block(qkv, h, len(bias))
    whole = _Space.of(qkv, h, most)
    for own, rows, biases in _blocks(W, h, len(bias), most):
        space = whole.first(rows.stop - rows.start)
        _heads_first(qkv[own], space.vectors)
        factors = _factors(space.vectors, scale)
        q, k, v = _scaled(space, factors)
        torch.bmm(q, k.mT, out=space.low)
        _converted(space.low, space.scores).view(-1, biases.stop - biases.start, h, N, N).add_(bias[biases])
        torch.softmax(space.scores, -1, out=space.scores)
        weights = _converted(space.scores, space.low)
        if kept is not None:
            kept.weights[rows], kept.factors[:, rows] = weights, factors
        torch.bmm(weights, v, out=q)  # nothing reads the queries any more
        _positions_first(space.narrow[:1], y[own])
    return y


def _backward(dy: Tensor, qkv: Tensor, scale: Tensor, kept: _Kept, maps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, scale and bias, the latter two in float32 at least."""
    (W, N, _), h, scale = qkv.shape, len(scale), scale.to(_wide(qkv))
    dqkv, dscale, dbias = torch.empty_like(qkv), torch.zeros_like(scale), scale.new_zeros(maps, h, N, N)
    most = _windows_of_block(qkv, h, maps)
    whole, whole_grads = _Space.of(qkv, h, most), _Space.of(qkv, h, most)
    for own, rows, biases in _blocks(W, h, maps, most):
        space, grads = (both.first(rows.stop - rows.start) for both in (whole, whole_grads))
        weights, factors = kept.weights[rows], kept.factors[:, rows]
        _heads_first(qkv[own], space.vectors)
        q, k, v = _scaled(space, factors)
        dq, dk, dv = grads.narrow.unbind()
        _heads_first(dy[own], grads.narrow[:1])  # in the place of dq, until that is written
        torch.bmm(weights.mT, dq, out=dv)
        torch.bmm(dq, v.mT, out=grads.low)
        wide = weights if weights.dtype == space.scores.dtype else space.scores.copy_(weights)
        dscores = softmax_backward_(_converted(grads.low, grads.scores), wide)
        dbias[biases] += dscores.view(-1, biases.stop - biases.start, h, N, N).sum(0)
        dlow = _converted(dscores, grads.low)
        torch.bmm(dlow, k, out=dq)
        torch.bmm(dlow.mT, q, out=dk)
        _converted(grads.narrow, grads.vectors)
        dscale += _gradient_of_vectors(space.vectors[:2], grads.vectors[:2], factors, scale)
        _positions_first(grads.vectors, dqkv[own])
    return dqkv, dscale, dbias


def _factors(vectors: Tensor, scale: Tensor) -> Tensor:
    """Return what queries and keys [3, R, N, d] are multiplied by, [2, R, N, 1]: the scale or 1, over their norm."""
    norms = torch.linalg.vector_norm(vectors[:2], dim=-1, keepdim=True).clamp_min_(1e-12)
    factors = norms.reciprocal_()
    factors[0].view(-1, len(scale), *factors.shape[2:]).mul_(scale[:, None, None])
    return factors


def _scaled(space: _Space, factors: Tensor) -> tuple[Tensor, ...]:
    """Multiply queries and keys by their factors; return queries, keys and values in the dtype of products."""
    space.vectors[:2].mul_(factors)
    return _converted(space.vectors, space.narrow).unbind()


def _gradient_of_vectors(units: Tensor, grads: Tensor, factors: Tensor, scale: Tensor) -> Tensor:
    """Turn the gradients of scaled queries and keys into those of plain ones; return that of the scale."""
    # For u = f x / |x| with gradient du: dx = (f / |x|) (du - u <u, du> / f^2). The factor f is the scale for queries,
    # whose gradient is <u, du> / f, and 1 for keys.
    along = (units * grads).sum(-1, keepdim=True)
    of_queries = along[0].view(-1, len(scale), *along.shape[2:])
    dscale = of_queries.sum((0, 2, 3)) / scale
    of_queries /= scale.square()[:, None, None]
    grads.addcmul_(units, along, value=-1).mul_(factors)
    return dscale


def _heads_first(x: Tensor, out: Tensor) -> None:
    """Copy [n, N, P h d] to [P, n h, N, d], the layout of batched products; P is 1 to 3 of q, k, v."""
    P, _, N, d = out.shape
    out.view(P, len(x), -1, N, d).copy_(x.view(len(x), N, P, -1, d).permute(2, 0, 3, 1, 4))


def _positions_first(x: Tensor, out: Tensor) -> None:
    """Copy [P, n h, N, d] back to [n, N, P h d]."""
    P, _, N, d = x.shape
    out.view(len(out), N, P, -1, d).copy_(x.view(P, len(out), -1, N, d).permute(1, 3, 0, 2, 4))


def _windows_of_block(qkv: Tensor, heads: int, biases: int) -> int:
    """Return how many windows are computed at a time: those of whole maps, or of a part of a large one."""
    most = max(1, BLOCK_SCORES // (heads * qkv.shape[1] ** 2))
    return min(len(qkv), most // biases * biases or most)


def _blocks(windows: int, heads: int, biases: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the windows of each block; their rows, windows times heads; and the biases of each of its maps."""
    start = 0
    while start < windows:
        first = start % biases
        stop = min(start + most, windows if most >= biases else start - first + biases)
        yield slice(start, stop), slice(start * heads, stop * heads), slice(first, min(first + stop - start, biases))
        start = stop


def _converted(x: Tensor, out: Tensor) -> Tensor:
    """Return x in the dtype of out, written there; of one dtype, both are one tensor."""
    return x if x.dtype == out.dtype else out.copy_(x)


def _room(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory that is kept until backward, from the step before if it is large."""
    return room(shape, dtype) if type(like) is Tensor else like.new_empty(shape, dtype=dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product_dtype(qkv: Tensor) -> torch.dtype:
    return _wide(qkv) if qkv.shape[1] < FEW_POSITIONS else qkv.dtype
