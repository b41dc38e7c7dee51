"""Autocast for custom ops, which torch does not reach by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast(x: Tensor, others: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Cast to the dtype of the enclosing autocast region, as a matrix product would; outside of one, change nothing."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return _cast(x, dtype), [None if other is None else _cast(other, dtype) for other in others]


def autocast_alike(x: Tensor, others: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Do as `autocast`, and refuse what is not of one dtype then. Raises ValueError."""
    x, cast = autocast(x, others)
    strange = {other.dtype for other in cast if other is not None} - {x.dtype}
    if strange:
        raise ValueError(
            f"got an input of {x.dtype} and expert weights of {', '.join(map(str, strange))}, wanted one dtype: "
            "convert the module or the input, or use torch.autocast"
        )
    return x, cast


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
