"""Gradients of experts that are spread: whoever takes the norm of all gradients, or looks for infinities in them, hears
of all ranks.

A parameter's gradient is this rank's part, and a plain tensor to everybody, but for two questions: that of torch's
`clip_grad_norm_`, and of all who call it, and that of a GradScaler for infinities. Ranks ask them together, as they do
under FSDP, and get the answer of one process. A norm by itself is this rank's; they meet where norms are stacked, once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from synchromesh.parallel.state import Spread
from synchromesh.torch_private import FOREACH_NORM, UNSCALE, without_torch_function

# What makes another gradient of one: the result speaks for all too.
_KEEP = frozenset(
    {Tensor.clone, Tensor.to, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.__truediv__}
    | {torch.clone, torch.mul, torch.div, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
)


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
                return _local_norm(args[0], *args[1:], **kwargs)
            if func is FOREACH_NORM:
                return _local_norms(*args, **kwargs)
            if func is UNSCALE:
                return _unscaled(*args)
            if func is Tensor.__deepcopy__:
                return args[0].as_subclass(Tensor).clone()
            result = func(*args, **kwargs)
            return _marked(result, args[0].spread) if func in _KEEP and isinstance(args[0], cls) else result

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError(
            "got the gradient of experts that are spread over ranks to store, which is this rank's part alone; wanted "
            "it said so: store `gradient.detach()`, from every rank"
        )


class _Norm(Tensor):
    """The norm of this rank's part of a gradient; where norms are stacked, ranks put theirs together."""

    spread: Spread
    order: float

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with without_torch_function():
            if func is torch.stack:
                return torch.stack(_of_all_ranks(args[0]), *args[1:], **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if func is Tensor.to and isinstance(args[0], cls):
                return _as_norm(result, args[0].spread, args[0].order)
            return result


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
            parameter.grad = _marked(grad, spread)


def _marked(grad: Tensor, spread: Spread) -> SpreadGradient:
    seen = grad.as_subclass(SpreadGradient)
    seen.spread = spread
    return seen


def _as_norm(norm: Tensor, spread: Spread, order: float) -> _Norm:
    seen = norm.as_subclass(_Norm)
    seen.spread, seen.order = spread, order
    return seen


def _local_norm(grad: Any, ord: float = 2) -> _Norm:  # noqa: A002 - torch's name
    return _as_norm(torch.linalg.vector_norm(grad.as_subclass(Tensor), ord), grad.spread, ord)


def _local_norms(grads: Sequence[Tensor], ord: float = 2, **options: Any) -> list[Tensor]:  # noqa: A002
    rest = [one for one in grads if not isinstance(one, SpreadGradient)]
    others = iter(FOREACH_NORM(rest, ord, **options) if rest else ())
    return [_local_norm(one, ord) if isinstance(one, SpreadGradient) else next(others) for one in grads]


def _of_all_ranks(norms: Sequence[Tensor]) -> list[Tensor]:
    """Return norms whose norm is that of all ranks' parts: of those of a grid the first is that of all, others are 0.

    Ranks may hold other numbers of gradients, as of modules as experts: they meet once for a grid.
    """
    found = [one.full_tensor() if isinstance(one, DTensor) else one.as_subclass(Tensor).clone() for one in norms]
    left = [place for place, one in enumerate(norms) if isinstance(one, _Norm)]
    while left:
        first: Any = norms[left[0]]
        own = [place for place in left if _as(norms[place]).spread.grid.is_same(first.spread.grid)]
        total = _met(torch.stack([found[place].double() for place in own]), first.order, first.spread)
        for place in own:
            found[place].copy_(total if place == own[0] else _neutral(total, first.order))
        left = [place for place in left if place not in own]
    return found


def _met(norms: Tensor, order: float, spread: Spread) -> Tensor:
    """Return the norm of this order of what all ranks' norms are of."""
    if order in (math.inf, -math.inf):
        met = norms.max() if order > 0 else norms.min()
        dist.all_reduce(met, dist.ReduceOp.MAX if order > 0 else dist.ReduceOp.MIN, group=spread.grid.group)
        return met
    met = norms.sum() if order == 0 else (norms**order).sum()
    dist.all_reduce(met, group=spread.grid.group)
    return met if order == 0 else met ** (1 / order)


def _neutral(total: Tensor, order: float) -> Tensor:
    """Return what changes no norm beside this one."""
    return total if order in (math.inf, -math.inf) else torch.zeros_like(total)


def _as(norm: Any) -> _Norm:
    return norm


def _unscaled(grads: Sequence[Tensor], found: Tensor, scale: Tensor) -> None:
    """Multiply gradients by a scale; set `found` where any is not finite on any rank: then none steps."""
    for kind in (True, False):  # torch takes DTensors and plain tensors apart
        alike = [one for one in grads if isinstance(one, DTensor) is kind]
        if alike:
            UNSCALE(alike, found, scale)
    spread = next(one.spread for one in grads if isinstance(one, SpreadGradient))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=spread.grid.group)
