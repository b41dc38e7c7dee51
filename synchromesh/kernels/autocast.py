"""Autocast for custom ops, which torch does not reach by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synchromesh.kernels.memory import HUGE_FROM, room
from synchromesh.torch_private import transformed


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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor.to(dtype), with gradient; large weights of a CPU go where those of the step before went."""
    if tensor.dtype == dtype or not _large(tensor, dtype):
        return tensor.to(dtype)
    return _Cast.apply(tensor, dtype)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = tensor.dtype
        return room(tensor.shape, dtype).copy_(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast(gradients[0], ctx.dtype), None


def _large(tensor: Tensor, dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or transformed():
        return False
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() * dtype.itemsize >= HUGE_FROM


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else cast(tensor, dtype)
