"""grouped_mm for groups of equal size: one batched product. It reads nothing from the device, on any device."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Compute the reference's rows where every expert has R / E of them; ends are not read.

    Raises ValueError where R is no multiple of E.
    """
    if len(rows) % len(weight):
        raise ValueError(f"got {len(rows)} rows for {len(weight)} experts, wanted equal groups: take grouped_mm")
    rows, (weight_, bias_) = autocast(rows, [weight, bias])
    assert weight_ is not None
    rows_ERI = rows.unflatten(0, (len(weight), -1)) if len(rows) else rows.new_zeros(len(weight), 0, rows.shape[1])
    out = torch.bmm(rows_ERI, weight_) if bias_ is None else torch.baddbmm(bias_[:, None], rows_ERI, weight_)
    return out.flatten(0, 1)
