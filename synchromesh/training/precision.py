"""The precision and memory layout that a model is called in, and the blocks of it that are compiled."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from synchromesh.training.task import Run


@dataclass(frozen=True)
class Precision:
    """How a model is called.

    Attributes:
        dtype: of autocast; None for float32 throughout.
        channels_last: keep images, and what convolutions make of them, with the channels of a pixel side by side.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = False

    def scaler(self, device: torch.device) -> GradScaler:
        """Return what keeps small gradients from vanishing in float16, and leaves others alone."""
        return GradScaler(device.type, enabled=self.dtype is torch.float16)


FULL = Precision()
Backend = str | Callable[..., Any]
"""A compiler, as torch.compile takes it."""


def in_precision(model: nn.Module, wrapped: nn.Module, device: torch.device, precision: Precision) -> Run:
    """Return a model as it is to be called: wrapped, under autocast, with images in the layout that is wanted."""

    def run(*inputs: Any, **named: Any) -> Any:
        if precision.channels_last:
            inputs = tuple(map(_channels_last, inputs))
        with torch.autocast(device.type, dtype=precision.dtype, enabled=precision.dtype is not None):
            return wrapped(*inputs, **named)

    return Run(model, run)


def compile_blocks(model: nn.Module, backend: Backend = "inductor") -> list[str]:
    """Compile the layers of a model, each by itself, where they stand; return their names.

    Layers are the innermost modules with a `layer_depth` from 1 on. Names and state dicts stay as they are. Each layer
    has graphs of its own; before torch 2.13 layers share torch's limit of 8, and what is beyond it runs as it is.

    Raises:
        ValueError: there are none.
    """
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    deep = {name: module for name, module in model.named_modules() if getattr(module, "layer_depth", 0) > 0}
    found = [name for name in deep if not any(other.startswith(f"{name}.") for other in deep)]
    for name in found:
        deep[name].compile(backend=backend, **apart)
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers to compile: its blocks need a `layer_depth`, from 1 on")
    return found


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Silence what torch's compiler says of its own look at the gradient of a block's input."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf", category=UserWarning
        )
        yield


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
