"""permute: tokens to expert-sorted rows, and the weighted sum of rows back to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from synchromesh.types import RowMap


def gather(x: Float[Tensor, "T D"], rowmap: RowMap) -> Float[Tensor, "R D"]:
    """Copy each token to the rows of its kept pairs: row[r] = x[pairs[r] // K].

    The tail may hold anything, and what flows back into it reaches nobody.
    """
    tokens = rowmap.pairs // rowmap.rows.shape[1]
    return F.pad(x, (0, 0, 0, 1))[torch.where(tokens >= 0, tokens, x.shape[0])]  # no pair: the zero row


def combine(buffer: Float[Tensor, "R D"], weights: Float[Tensor, "T K"], rowmap: RowMap) -> Float[Tensor, "T D"]:
    """Sum each token's rows: y[t] = Σ_k weights[t, k] · buffer[rows[t, k]] over its kept pairs.

    Summed in float32 at least, returned in the buffer's dtype. Weights of absent or dropped pairs and the tail are
    not read; a NaN reaches its own token only.
    """
    sum_dtype = torch.promote_types(buffer.dtype, torch.float32)
    picked_TKD = F.pad(buffer, (0, 0, 0, 1))[rowmap.rows]  # row -1 is the zero one
    weights_TK = torch.where(rowmap.rows >= 0, weights, 0)
    return (weights_TK[..., None].to(sum_dtype) * picked_TKD.to(sum_dtype)).sum(1).to(buffer.dtype)
