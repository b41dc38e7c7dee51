"""Uninitialised memory that shows: fresh tensors hold NaN, so that a kernel which skips a row is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point() and not fresh.is_meta:
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return allocate_poisoned


def _on_default_device(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Heed `with torch.device(...)`, which knows functions by identity and so would miss the patched one."""

    def allocate_there(*args: object, device: torch.device | str | None = None, **kwargs: object) -> Tensor:
        return allocate(*args, device=torch.get_default_device() if device is None else device, **kwargs)

    return allocate_there


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return with NaN.

    >>> with poisoned_memory():
    ...     bool(torch.empty(3).isnan().all())
    True
    """
    with torch.device("cpu"):
        torch.empty(0)  # torch lists its constructors at the first use of a default device: not the patched ones
    with (
        patch.object(torch, "empty", _poisoned(_on_default_device(torch.empty))),
        patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
    ):
        yield
