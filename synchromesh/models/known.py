"""A tensor that is computed from small ones alone, and kept while these hold the same numbers.

Numbers are compared, not versions: a write through `.data`, or FSDP's gathering into memory used before, changes no
version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from synchromesh.torch_private import transformed


@final
class Known:
    """What was computed last, for use without gradients. It is not copied, nor pickled, with what holds it."""

    def __init__(self) -> None:
        self._last: tuple[object, list[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple[type[Known], tuple[()]]:
        return Known, ()

    def value(self, compute: Callable[[], Tensor], of: Sequence[Tensor]) -> Tensor:
        """Return what compute returns; it is called where a tensor of `of`, or autocast, is not what it was."""
        setting = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        last = self._last  # read once: other threads may write
        if last is None or last[0] != setting or not _equal(last[1], of):
            last = (setting, [tensor.detach().clone() for tensor in of], compute())
            self._last = last
        return last[2]

    def forget(self) -> None:
        """Compute at the next call."""
        self._last = None


def known_here(of: Sequence[Tensor]) -> bool:
    """Tell whether the numbers of such tensors can be compared at little cost: on a CPU, and not while tracing."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return all(type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu" for one in of)


def _equal(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    same = zip(old, new, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in same)
