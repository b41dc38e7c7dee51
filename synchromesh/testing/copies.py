"""Which operations outside of kernels write rows of tokens: each is a pass over memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from synchromesh.torch_private import TorchDispatchMode, tree_leaves


class RowCopies(TorchDispatchMode):
    """Counts, by name, torch's operations inside the block that write floating-point rows of a width.

    Views, fresh memory and what custom ops do inside do not count; a backward that is started inside the block does.

    Args:
        width: D.

    Attributes:
        found: how often each wrote some.

    >>> import torch
    >>> with RowCopies(4) as copies:
    ...     _ = torch.ones(3, 4)[1:].clone()
    >>> dict(copies.found)
    {'ones': 1, 'clone': 1}
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and "empty" not in name:
            self.found.update([name] * any(self._are_rows(leaf) for leaf in tree_leaves(result)))
        return result

    def _are_rows(self, result: Any) -> bool:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return False
        return result.dim() == 2 and result.shape[1] == self.width and len(result) > 0
