"""Twin: a slowly moving copy of a module, which the module learns to agree with (arXiv 1911.05722, 2006.07733)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from synchromesh.moe.layer import MoE
from synchromesh.types import Routing

Routings = dict[str, Routing]
"""What the routers of a module decided in one forward, by the names of its layers."""


class TwinGates(Enum):
    """Where the tokens of a twin of a mixture of experts go."""

    AVERAGED = "averaged"  # its gates are averages, as its experts are
    COPIED = "copied"  # its gates are the student's own; they see the twin's tokens
    FOLLOWED = "followed"  # each token goes where the student sent it, with the student's weights


@dataclass(frozen=True)
class Momentum:
    """How slowly a twin moves: twin = m twin + (1 - m) student after each step.

    Attributes:
        start: m of the first step.
        end: m of step `steps`, reached along a half cosine.
        steps: of that way; 0 keeps `start`.
    """

    start: float = 0.99
    end: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1 or self.steps < 0:
            raise ValueError(f"got {self}, wanted 0 <= start <= end <= 1 and steps >= 0")

    def at(self, step: int) -> float:
        """Return m of a step, counted from 0.

        >>> Momentum(0.9, 1.0, 10).at(0), Momentum(0.9, 1.0, 10).at(10), Momentum(0.9).at(10)
        (0.9, 1.0, 0.9)
        """
        if self.steps == 0:
            return self.start
        share = min(1.0, step / self.steps)
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * share)) / 2


class Twin(nn.Module):
    """A copy of a student without gradients, which follows it by an exponential moving average.

    It goes to disk with the model it stands in, its number of steps too, so that a resumed run moves it on alike.

    Args:
        student: what is copied; it stays outside.
        momentum: how slowly the copy moves.
        gates: how a twin of a mixture routes.
    """

    def __init__(self, student: nn.Module, momentum: Momentum, gates: TwinGates = TwinGates.AVERAGED) -> None:
        super().__init__()
        self.momentum, self.gates = momentum, gates
        self.copied = copy.deepcopy(student).requires_grad_(requires_grad=False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, *inputs: Any, routings: Routings | None = None, **named: Any) -> Any:
        """Run the copy, without a gradient.

        Args:
            inputs: as the student takes them.
            routings: what the student's routers decided on the same inputs, where the twin follows it.
            named: as the student takes them.

        Raises:
            ValueError: a twin that follows its student's choice got none.
        """
        if self.gates is not TwinGates.FOLLOWED or not layers_of(self.copied):
            return self.copied(*inputs, **named)
        if not routings:
            raise ValueError(
                "a twin that follows its student's choice of experts got no `routings`, wanted what `noted_routings` "
                "gives for the same inputs"
            )
        with _followed(self.copied, routings):
            return self.copied(*inputs, **named)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move one step towards the student: parameters on the way, counts and biases of its routers at once."""
        weight = 1 - self.momentum.at(int(self.steps))
        at_once = frozenset() if self.gates is TwinGates.AVERAGED else gate_names(student)
        own = dict(self.copied.named_parameters())
        slow = [(own[name], new) for name, new in student.named_parameters() if name not in at_once]
        if slow and weight:
            move = get_ema_multi_avg_fn(1 - weight)
            move([mine.detach() for mine, _ in slow], [new.detach() for _, new in slow], 0)
        for name, new in student.named_parameters():
            if name in at_once:
                own[name].copy_(new)
        routers = tuple(f"{name}.router." if name else "router." for name in layers_of(student))
        buffers = dict(self.copied.named_buffers())
        for name, new in student.named_buffers():
            if name.startswith(routers) and routers:
                buffers[name].copy_(new)
        self.steps += 1


def layers_of(module: nn.Module) -> dict[str, MoE]:
    """Return the mixtures of experts of a module by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}


def gate_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of all routers."""
    return frozenset(
        f"{name}.router.{own}" if name else f"router.{own}"
        for name, layer in layers_of(module).items()
        for own, _ in layer.router.named_parameters()
    )


@contextmanager
def noted_routings(student: nn.Module) -> Iterator[Routings]:
    """Note what the routers decide in the forward inside the block, without its gradient."""
    found: Routings = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            found[name] = detached(routing)

        return hook

    handles = [layer.router.register_forward_hook(note(name)) for name, layer in layers_of(student).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def detached(routing: Routing) -> Routing:
    """Return a routing whose tensors have no gradient; its sums are made again where they are asked for."""
    return Routing(routing.expert_ids, routing.weights.detach(), routing.scores.detach(), routing.logits.detach())


@contextmanager
def _followed(copied: nn.Module, routings: Routings) -> Iterator[None]:
    def answer(name: str) -> Any:
        return lambda _module, _inputs, _own: routings[name]

    handles = [layer.router.register_forward_hook(answer(name)) for name, layer in layers_of(copied).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
