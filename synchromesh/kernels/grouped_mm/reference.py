"""grouped_mm: one matrix product per expert over its range of rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply each expert's rows by its matrix: out[r] = rows[r] · weight[e] + bias[e] for ends[e-1] <= r < ends[e].

    Groups may have any size. The tail of the output may hold anything, and what flows back into it reaches nobody.
    """
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    *groups, tail = rows.split([*sizes, rows.shape[0] - sum(sizes)])
    if bias is None:
        out = [group @ w for group, w in zip(groups, weight.unbind(), strict=True)]
    else:
        out = [torch.addmm(b, group, w) for group, w, b in zip(groups, weight.unbind(), bias.unbind(), strict=True)]
    return torch.cat([*out, out[0].new_zeros(tail.shape[0], weight.shape[2])])
