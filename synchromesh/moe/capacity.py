"""Capacity: how many rows an expert takes, and who is dropped. `Routing` to `RowMap`."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels import Kernels, kernels_for
from synchromesh.types import Routing, RowMap

AgreeMax = Callable[[Tensor], Tensor]


class Priority(ABC):
    """Says which tokens an expert serves first; any function of a `Routing` may stand in for one."""

    @abstractmethod
    def __call__(self, routing: Routing) -> Float[Tensor, " T"] | None:
        """Return a number for each token, served from the largest on; None serves them in their order."""


@dataclass(frozen=True)
class TokenOrder(Priority):
    """Serve tokens in their order; all first choices come before all second ones."""

    def __call__(self, routing: Routing) -> None:
        return None


@dataclass(frozen=True)
class BatchPrioritized(Priority):
    """Serve tokens in descending order of their best score (V-MoE, arXiv 2106.05974), choice after choice."""

    def __call__(self, routing: Routing) -> Float[Tensor, " T"]:
        return routing.scores.detach().amax(dim=1)


token_order = TokenOrder()
"""Earlier tokens are served first."""

batch_prioritized = BatchPrioritized()
"""Tokens with a better best score are served first."""
ServingOrder = Priority | Callable[[Routing], "Float[Tensor, ' T'] | None"]


class Capacity(ABC):
    """Decides which pairs are kept, and where their rows lie.

    Attributes:
        drops: whether a pair may be left without a row.
        takes_kernels: whether a call has an argument `kernels`, and is given those of its layer.
    """

    drops: ClassVar[bool] = True
    takes_kernels: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.takes_kernels = "kernels" in inspect.signature(cls.__call__).parameters

    @property
    def rows_per_pair(self) -> float:
        """Rows that are computed for each (token, choice) pair, where that is fixed; else 1."""
        return 1.0

    def rows_known(self, *, choices: int, experts: int) -> int | None:
        """Return the rows of an expert that every rank knows without a look at its tokens; None where none does."""
        return None

    @abstractmethod
    def __call__(self, routing: Routing, agree_max: AgreeMax) -> RowMap:
        """Map the pairs to rows; `agree_max` is the maximum over ranks where a number must be agreed."""


@dataclass(frozen=True)
class Dropless(Capacity):
    """Keep every pair."""

    drops = False

    def __call__(self, routing: Routing, agree_max: AgreeMax, *, kernels: Kernels | None = None) -> RowMap:
        return _map_rows(routing, *_places(routing, token_order, kernels), capacity=None, most=None, kernels=kernels)


@dataclass(frozen=True)
class FixedRows(Capacity):
    """Keep at most a number of pairs of an expert.

    Attributes:
        rows: that number, C.
        priority: who is served first.
    """

    rows: int
    priority: ServingOrder = token_order

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"FixedRows.rows is {self.rows}, wanted a number >= 0; Dropless() keeps every pair")

    def __call__(self, routing: Routing, agree_max: AgreeMax, *, kernels: Kernels | None = None) -> RowMap:
        return _map_rows(
            routing, *_places(routing, self.priority, kernels), capacity=self.rows, most=self.rows, kernels=kernels
        )


@dataclass(frozen=True)
class FixedCapacity(Capacity):
    """Keep at most C = ceil(factor K T / E) pairs of an expert (Tutel paper, eq. 1).

    Attributes:
        factor: 1.0 is room for a perfectly even load; 0 drops all.
        tokens: T that C is computed from; None takes each call's own.
        priority: who is served first: `token_order`, `batch_prioritized`, or a function of your own.

    >>> FixedCapacity(1.25).rows_per_expert(tokens=64, choices=1, experts=8)
    10
    """

    factor: float
    tokens: int | None = None
    priority: ServingOrder = token_order

    def __post_init__(self) -> None:
        _check_factor("FixedCapacity.factor", self.factor)
        if self.tokens is not None and self.tokens < 0:
            raise ValueError(f"FixedCapacity.tokens is {self.tokens}, wanted a number of tokens >= 0, or None")

    @property
    def rows_per_pair(self) -> float:
        return self.factor

    def rows_known(self, *, choices: int, experts: int) -> int | None:
        return None if self.tokens is None else _rows(self.factor, self.tokens, choices, experts)

    def rows_per_expert(self, *, tokens: int, choices: int, experts: int) -> int:
        """Return C."""
        return _rows(self.factor, tokens if self.tokens is None else self.tokens, choices, experts)

    def __call__(self, routing: Routing, agree_max: AgreeMax, *, kernels: Kernels | None = None) -> RowMap:
        tokens = routing.expert_ids.shape[0]
        most = self.rows_per_expert(tokens=tokens, choices=routing.choices, experts=routing.num_experts)
        return FixedRows(most, self.priority)(routing, agree_max, kernels=kernels)


@dataclass(frozen=True)
class NeededCapacity(Capacity):
    """Take the smallest capacity that drops nothing, measured at each call and agreed over the ranks.

    Attributes:
        max_factor: never more than FixedCapacity(max_factor) would hold; None is no limit.
        priority: who is served first where that limit binds.
    """

    max_factor: float | None = None
    priority: ServingOrder = token_order

    def __post_init__(self) -> None:
        if self.max_factor is not None:
            _check_factor("NeededCapacity.max_factor", self.max_factor)

    def __call__(self, routing: Routing, agree_max: AgreeMax, *, kernels: Kernels | None = None) -> RowMap:
        positions, counts = _places(routing, self.priority, kernels)
        needed = agree_max(counts.max())
        if self.max_factor is None:
            return _map_rows(routing, positions, counts, capacity=needed, most=None, kernels=kernels)
        most = _rows(self.max_factor, routing.expert_ids.shape[0], routing.choices, routing.num_experts)
        return _map_rows(routing, positions, counts, capacity=needed.clamp(max=most), most=most, kernels=kernels)


def mapped(capacity: Capacity, routing: Routing, agree_max: AgreeMax, kernels: Kernels | None) -> RowMap:
    """Call a capacity of any kind; one that counts places by kernels is given these."""
    if capacity.takes_kernels:
        return capacity(routing, agree_max, kernels=kernels)  # pyright: ignore[reportCallIssue]
    return capacity(routing, agree_max)


def _check_factor(name: str, factor: float) -> None:
    if not 0 <= factor < math.inf:
        raise ValueError(f"{name} is {factor}, wanted a finite number >= 0; Dropless() keeps every pair")


def _rows(factor: float, tokens: int, choices: int, experts: int) -> int:
    return math.ceil(factor * choices * tokens / experts - 1e-9)  # 1.1 * 10 is 11.000000000000002


def _places(
    routing: Routing, priority: ServingOrder, kernels: Kernels | None
) -> tuple[Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Return the place of each pair in its expert's queue, and the length of the queues."""
    ids = routing.expert_ids.detach()
    return (kernels or kernels_for(ids.device)).positions(ids, routing.num_experts, priority(routing))


def _map_rows(
    routing: Routing,
    positions: Int[Tensor, "T K"],
    counts: Int[Tensor, " E"],
    *,
    capacity: int | Int[Tensor, ""] | None,
    most: int | None,
    kernels: Kernels | None,
) -> RowMap:
    """Lay the kept pairs out by expert. `most` bounds the rows of an expert on the host, so that R is static."""
    ids = routing.expert_ids.detach()
    pairs = ids.numel() if routing.max_pairs is None else min(ids.numel(), routing.max_pairs)
    num_rows = pairs if most is None else min(pairs, routing.num_experts * most)
    mapper = (kernels or kernels_for(ids.device)).row_map
    return mapper(ids, positions, counts, num_rows=num_rows, capacity=capacity)
