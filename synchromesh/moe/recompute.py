"""Activation checkpointing: a recomputation repeats the decisions of its first forward.

`torch.utils.checkpoint` (use_reentrant=False) runs a forward a second time inside backward. By then options, plan and
random state may have moved on, so the first forward's decisions are kept with its checkpoint and used again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from synchromesh.torch_private import backward_task, checkpoint_frame, unseen_by_policies

T = TypeVar("T")


def in_backward() -> bool:
    """Tell whether autograd is running a backward in this thread; a forward under it is a recomputation."""
    return backward_task() is not None


def checkpointed() -> bool:
    """Tell whether this forward is inside a checkpoint, and so is run again in backward."""
    return not torch.compiler.is_compiling() and checkpoint_frame() is not None


@torch.library.custom_op("synchromesh::first_forward", mutates_args=(), schema="(Tensor anchor) -> Tensor")
def first_forward(anchor: Tensor) -> Tensor:
    """Tell at run time, inside a compiled graph too, whether this is no recomputation: a bool tensor on the CPU.

    The anchor only ties the operation to its place in the graph.
    """
    return torch.tensor(not in_backward())


@first_forward.register_fake
def _(anchor: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")


class Decisions:
    """What each checkpointed forward of one layer decided, in order, for its recomputation."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        self._next: weakref.WeakKeyDictionary[Any, dict[int | None, int]] = weakref.WeakKeyDictionary()

    def once(self, decide: Callable[[], T]) -> T:
        """Return what decide() returns; in a recomputation, what it returned in the first forward.

        Raises:
            ValueError: no first forward is known, as under reentrant checkpointing.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return decide()
        frame = checkpoint_frame()
        if not in_backward():
            if frame is None:
                return decide()
            # No recomputation repeats these operations: no policy sees them, the checkpoint counts no tensor of them.
            with unseen_by_policies(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                decision = decide()
            self._made.setdefault(frame, []).append(decision)
            return decision
        made = [] if frame is None else self._made.get(frame, [])
        used = {} if frame is None else self._next.setdefault(frame, {})
        # A graph that is kept is run backwards several times; each of these reads the decisions from the first on.
        task = backward_task()
        index = used.get(task, 0)
        if index >= len(made):
            raise ValueError(
                "a MoE layer ran inside backward without its first forward, as under reentrant checkpointing "
                "or from a hook; wanted one torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or no_grad"
            )
        used[task] = index + 1
        return made[index]

    @contextmanager
    def same_random(self, device: torch.device) -> Iterator[None]:
        """Draw in a recomputation what the first forward drew, also under checkpoint(..., preserve_rng_state=False)."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or checkpoint_frame() is None:
            yield
            return
        before = self.once(lambda: _random_state(device))
        with unseen_by_policies():
            restored = all(map(torch.equal, before, _random_state(device)))  # by the checkpoint itself
        if restored:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_rng_state(before[0])
            if device.type == "cuda":
                torch.cuda.set_rng_state(before[1], device)
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Decisions:
        return Decisions()

    def __reduce__(self) -> tuple[type[Decisions], tuple[()]]:
        return Decisions, ()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
