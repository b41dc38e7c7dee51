"""Launching: on the device where the tensors are, which need not be the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Run an op with the device of its first tensor as the current one: Triton launches there."""

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return op(*args, **kwargs)

    return run


def given_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return the tensor, or another one to pass as the pointer of an argument that the kernel does not read."""
    return other if tensor is None else tensor
