"""Kernels of plain operations alone, without a look at numbers on the host: what torch can transform in any way.

They serve under vmap (and jacrev, jacfwd, hessian, which use it), where no number can be read, and in a backward that
is to be differentiated again. Every expert sees every row, which costs E times the products. Other transforms of
torch.func, and forward-mode differentiation, take the reference: a kernel with a backward by hand would give them no
value, or a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synchromesh.kernels.fused_mlp.reference import compose_mlp, widened
from synchromesh.kernels.mlp import Activation, MLPWeights
from synchromesh.kernels.permute.reference import combine, gather
from synchromesh.kernels.scaled_mm.reference import Products
from synchromesh.types import RowMap


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Compute the reference's products; rows of the tail are 0."""
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for expert, (matrix, own) in enumerate(zip(weight.unbind(0), _owned(rows, ends), strict=True)):
        # Rows of others are made 0 first: what is infinite in them would be NaN in a gradient that nobody wants.
        product = rows.where(own, 0) @ matrix
        out = out + (product if bias is None else (product + bias[expert]).where(own, 0))
    return out


def outer_products(
    rows: Float[Tensor, "R I"], others: Float[Tensor, "R O"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "E I O"]:
    """Return the sum over each expert's rows of rows[r]^T others[r]: the gradient of its matrix."""
    return torch.stack([rows.where(own, 0).mT @ others.where(own, 0) for own in _owned(rows, ends)])


def sums(rows: Float[Tensor, "R O"], ends: Int[Tensor, " E"]) -> Float[Tensor, "E O"]:
    """Return the sum of each expert's rows: the gradient of its bias."""
    return torch.stack([rows.where(own, 0).sum(0) for own in _owned(rows, ends)])


def spread(grad: Float[Tensor, "T D"], pairs: Int[Tensor, " R"], choices: int) -> Float[Tensor, "R D"]:
    """Return each row's token of grad; 0 in the tail."""
    return grad[(pairs // choices).clamp(min=0)].where((pairs >= 0)[:, None], 0)


def added(rows: Float[Tensor, "R D"], pairs: Int[Tensor, " R"], shape: tuple[int, int]) -> Float[Tensor, "T D"]:
    """Return the sum of each token's rows, T and K being `shape`: the gradient of gather."""
    tokens, choices = shape
    kept = rows.where((pairs >= 0)[:, None], 0)
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, (pairs // choices).clamp(min=0), kept)


def combine_gradients(
    grad: Float[Tensor, "T D"], buffer: Float[Tensor, "R D"], weights: Float[Tensor, "T K"], pairs: Int[Tensor, " R"]
) -> tuple[Float[Tensor, "R D"], Float[Tensor, "T K"]]:
    """Return the gradients of combine's rows and weights."""
    kept, at = (pairs >= 0)[:, None], pairs.clamp(min=0)
    rows = spread(grad, pairs, weights.shape[1])
    d_buffer = rows * weights.reshape(-1)[at][:, None].to(rows.dtype)
    each = (rows * buffer.where(kept, 0)).sum(1).to(weights.dtype)  # 0 in the tail: pair 0 gets nothing from there
    return d_buffer, torch.zeros_like(weights).reshape(-1).index_add(0, at, each).view(weights.shape)


def members_of(num_rows: int, ends: Int[Tensor, " E"]) -> list[Bool[Tensor, " R"]]:
    """Return, for each expert, which rows are its own."""
    number = torch.arange(num_rows, device=ends.device)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return [(number >= start) & (number < end) for start, end in zip(starts.unbind(), ends.unbind(), strict=True)]


def _owned(rows: Tensor, ends: Int[Tensor, " E"]) -> list[Bool[Tensor, "R 1"]]:
    return [own[:, None] for own in members_of(rows.shape[0], ends)]


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y."""
    x, mlp = widened(x, mlp)
    return compose_mlp(x, weights, rowmap, mlp, activation, pieces=(gather, grouped_mm, combine))


def scaled_mm(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None, *, products: Products) -> Tensor:
    """Refuse: products of 8-bit numbers are rounded, and their gradient is one of another function's.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"got {products} inside torch.func or forward-mode differentiation, wanted products of the weights: "
        "call set_products(model, None) first"
    )


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of a function that a backward wants and will itself be differentiated by.

    Args:
        function: of plain operations.
        inputs: as they were saved for backward.
        needs: which of them want a gradient.
        grad: of the function's output; both it and the inputs may have a history.
    """
    # Aliases, because one input may have come from another (weights from tokens): each wants its own share alone.
    inputs = [None if part is None else part.view_as(part) for part in inputs]
    wanted = [part for part, need in zip(inputs, needs, strict=True) if need and part is not None]
    y = function(*inputs)
    made = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(made) if need and part is not None else None for part, need in zip(inputs, needs, strict=True)]
