"""Autocast for custom ops, which torch does not reach by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synchromesh.kernels.memory import HUGE_FROM, room, room_like
from synchromesh.torch_private import transformed


def autocast(x: Tensor, others: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Cast to the dtype of the enclosing autocast region, as a matrix product would; outside of one, change nothing."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return _cast(x, dtype), [None if other is None else _cast(other, dtype) for other in others]


def autocast_alike(
    x: Tensor, others: Sequence[Tensor | None], *, narrowed: int = 0
) -> tuple[Tensor, list[Tensor | None]]:
    """Do as `autocast`, and refuse what is not of one dtype then.

    Args:
        x: the input.
        others: weights.
        narrowed: how many of these, from the first on, the kernel casts itself, an expert at a time (`narrow`): those
            that are large and float32 stay so.

    Raises:
        ValueError: they are of several dtypes.
    """
    x, _ = autocast(x, [])
    stays = [number < narrowed and _stays(other, x.dtype) for number, other in enumerate(others)]
    _, cast = autocast(x, [None if stay else other for stay, other in zip(stays, others, strict=True)])
    strange = {other.dtype for other in cast if other is not None} - {x.dtype}
    if strange:
        raise ValueError(
            f"got an input of {x.dtype} and expert weights of {', '.join(map(str, strange))}, wanted one dtype: "
            "convert the module or the input, or use torch.autocast"
        )
    return x, [wide if stay else other for stay, wide, other in zip(stays, others, cast, strict=True)]


def narrow(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices of some experts in a dtype, laid out as they are, without gradient.

    What is cast just before it is multiplied comes out of a cache; all experts together would go to memory and back.
    """
    return matrices if matrices.dtype == dtype else room_like(matrices, dtype).copy_(matrices)


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


def _stays(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Tell whether autocast would narrow a large tensor of a CPU to the dtype of the input."""
    if tensor is None or tensor.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
        return False
    return dtype.itemsize < tensor.dtype.itemsize and _large(tensor, dtype)


def _large(tensor: Tensor, dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or transformed():
        return False
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() * dtype.itemsize >= HUGE_FROM


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else cast(tensor, dtype)
