"""mark: tokens with a weight that is no number show it."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor


def mark(
    y: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return y, NaN for tokens with a NaN weight of a present pair, whether or not a capacity dropped the pair.

    y may be written to.
    """
    return y.masked_fill(broken(weights, expert_ids), math.nan)


def unmarked(
    grad: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return the gradient of what `mark` was given: nothing flows back from broken tokens."""
    return grad.masked_fill(broken(weights, expert_ids), 0)


def broken(weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]) -> Bool[Tensor, "T 1"]:
    """Tell which tokens have a NaN weight of a present pair."""
    return (weights.isnan() & (expert_ids >= 0)).any(dim=1, keepdim=True)
