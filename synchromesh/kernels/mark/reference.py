"""mark: tokens with a weight that is no number show it."""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor


def mark(
    y: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return y, NaN for tokens with a NaN weight of a present pair, whether or not a capacity dropped the pair.

    y may be written to.
    """
    broken = (weights.isnan() & (expert_ids >= 0)).any(dim=1, keepdim=True)
    return y.masked_fill(broken, math.nan)
