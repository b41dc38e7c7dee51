"""Gradients of experts that are spread: whoever takes their norm, or looks for infinities in them, hears of all ranks.

A parameter's gradient is this rank's part, and a plain tensor to everybody, but for two questions: that of torch's
`clip_grad_norm_`, and of all who call it, for the norm, and that of a GradScaler for infinities. Ranks ask them
together, as they do under FSDP, and get the answer of one process.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from synchromesh.parallel.state import Spread
from synchromesh.torch_private import FOREACH_NORM, UNSCALE, without_torch_function


class SpreadGradient(Tensor):
    """This rank's part of a gradient.

    Attributes:
        spread: how the whole lies over ranks.
    """

    spread: Spread

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_torch_function():
            if func is torch.linalg.vector_norm and len(args) <= 2 and kwargs.keys() <= {"ord"}:
                return _norm_of_all(args[0], *args[1:], **kwargs)
            if func is FOREACH_NORM:
                return _norms_of_all(*args, **kwargs)
            if func is UNSCALE:
                return _unscaled(*args)
            if func is Tensor.__deepcopy__:
                return args[0].as_subclass(Tensor).clone()
            return func(*args, **kwargs)


class _Norm(Tensor):
    """A norm over all ranks, that goes together with DTensors of norms."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.stack:
            return super().__torch_function__(func, tuple(types), tuple(args), kwargs)
        with without_torch_function():
            whole = [one.full_tensor() if isinstance(one, DTensor) else one.as_subclass(Tensor) for one in args[0]]
            return torch.stack(whole, *args[1:], **(kwargs or {}))


def speak_for_all(parameters: Iterable[nn.Parameter], spread: Spread) -> None:
    """Make the gradients that these parameters get `SpreadGradient`s."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.is_leaf and getattr(parameter, "speaks_for", None) is not spread:
            parameter.speaks_for = spread  # pyright: ignore[reportAttributeAccessIssue]
            parameter.register_post_accumulate_grad_hook(_Mark(weakref.ref(spread)))


class _Mark:
    def __init__(self, spread: weakref.ref[Spread]) -> None:
        self._spread = spread

    def __call__(self, parameter: Tensor) -> None:
        spread, grad = self._spread(), parameter.grad
        if spread is not None and grad is not None and not isinstance(grad, (SpreadGradient, DTensor)):
            seen = grad.as_subclass(SpreadGradient)
            seen.spread = spread
            parameter.grad = seen


def _norm_of_all(grad: Any, ord: float = 2) -> Tensor:  # noqa: A002 - torch's name
    """Return the norm of the whole that a gradient is a part of; of modules as experts, of all ranks' together."""
    own = torch.linalg.vector_norm(grad.as_subclass(Tensor), ord)
    summed = not math.isinf(ord) and ord != 0
    power = own.double() ** ord if summed else own.double()
    operation = {math.inf: dist.ReduceOp.MAX, -math.inf: dist.ReduceOp.MIN}.get(ord, dist.ReduceOp.SUM)
    dist.all_reduce(power, operation, group=grad.spread.grid.group)
    return (power ** (1 / ord) if summed else power).to(own.dtype).as_subclass(_Norm)


def _norms_of_all(grads: Sequence[Tensor], ord: float = 2, **options: Any) -> list[Tensor]:  # noqa: A002
    others = iter(FOREACH_NORM([one for one in grads if not isinstance(one, SpreadGradient)], ord, **options))
    return [_norm_of_all(one, ord) if isinstance(one, SpreadGradient) else next(others) for one in grads]


def _unscaled(grads: Sequence[Tensor], found: Tensor, scale: Tensor) -> None:
    """Multiply gradients by a scale; set `found` where any is not finite on any rank: then none steps."""
    UNSCALE(grads, found, scale)
    spread = next(one.spread for one in grads if isinstance(one, SpreadGradient))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=spread.grid.group)
