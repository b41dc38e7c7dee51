"""What the host reads of a step's tensors, or sends to them: what no CUDA graph can hold."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jaxtyping
import torch
from torch import Tensor

from synchromesh.torch_private import CUSTOM_OPS, INDEX_PUT, TO_COPY, TorchDispatchMode, tree_leaves

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, INDEX_PUT}
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UNDISPATCHED = (  # on the CPU or the meta device these do not go through the dispatcher
    *((Tensor, name) for name in ("tolist", "numpy", "new_tensor")),
    *((torch, name) for name in ("tensor", "as_tensor")),
)
MACHINERY = tuple(Path(module.__file__ or "").parent for module in (torch, jaxtyping))


class HostReads(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold of all that runs inside the block, in the bodies of custom ops too.

    These are numbers read on the host, shapes that depend on numbers, tensors made of the host's numbers, and copies
    from one device to another. A backward counts that is started inside the block.

    Attributes:
        found: each with the line that caused it.

    >>> with HostReads() as reads:
    ...     _ = torch.ones(3).sum().item()
    >>> len(reads.found)
    1
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._aside = False
        self._patches = [patch.object(owner, name, self._noting(owner, name)) for owner, name in UNDISPATCHED]

    def __enter__(self) -> HostReads:
        super().__enter__()
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for one in self._patches:
            one.stop()
        super().__exit__(*error)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Note nothing inside the block: stand-ins for kernels of a device may read."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        definition = CUSTOM_OPS.get(func._schema.name)
        if definition is not None:
            with self._going_on():
                return definition._init_fn(*args, **kwargs)
        if _is_read(func, args) or _is_sent(func, args, kwargs):
            self._note(str(func))
        return func(*args, **kwargs)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Note what a custom op does inside: torch switches the mode off while it handles an operation."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _noting(self, owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            self._note(name)
            return original(*args, **kwargs)

        return read

    def _note(self, what: str) -> None:
        if self._aside:
            return
        stack = [frame for frame in traceback.extract_stack() if not _is_machinery(frame.filename)]
        self.found.append(f"{what} at {stack[-1].filename}:{stack[-1].lineno}")


def _is_machinery(file: str) -> bool:
    return file == __file__ or any(part in Path(file).parents for part in MACHINERY)


def _is_read(func: Any, args: Any) -> bool:
    """Tell whether the result, or its shape, depends on numbers that the host must look at."""
    if func in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(READS & set(func.tags))


def _is_sent(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether numbers of the host become a tensor, or a tensor changes its device."""
    if func is aten.lift_fresh.default:
        return True
    devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if func is TO_COPY and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    return func in (TO_COPY, aten.copy_.default) and len({device.type for device in devices}) > 1
