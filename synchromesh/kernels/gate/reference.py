"""gate: the product of a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gate(x: Float[Tensor, "T D"], weight: Float[Tensor, "E D"], *, dtype: torch.dtype) -> Float[Tensor, "T E"]:
    """Return x · weightᵀ, both read in a dtype, the sums in it too."""
    return F.linear(x.to(dtype), weight.to(dtype))
