"""Which hidden units of a feed-forward block go into one expert: groups of equal size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Grouping(ABC):
    """Puts hidden units into groups of equal size: a frozen dataclass of plain values."""

    @abstractmethod
    def order(self, rows: Float[Tensor, "F D"], groups: int) -> Int[Tensor, " F"]:
        """Return the units, those of the first group first, then of the second; in rising order inside a group.

        Args:
            rows: of the first linear layer, one of each hidden unit.
            groups: divides F.
        """


@final
@dataclass(frozen=True)
class RandomGroups(Grouping):
    """Any units together, for comparison.

    Attributes:
        seed: the same groups for the same seed.
    """

    seed: int = 0

    def order(self, rows: Float[Tensor, "F D"], groups: int) -> Int[Tensor, " F"]:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return _sorted(drawn.unflatten(0, (groups, -1)))


@final
@dataclass(frozen=True)
class BalancedKMeans(Grouping):
    """Units whose rows point the same way together: k-means of unit rows with clusters of equal size.

    Needs scipy, which assigns units to clusters at the least cost: F^3 operations in each iteration. The same groups
    for the same rows and seed.

    Attributes:
        seed: of the first centres, rows that are far from one another (k-means++).
        iterations: at most; it ends when no unit changes its group.
    """

    seed: int = 0
    iterations: int = 100

    def order(self, rows: Float[Tensor, "F D"], groups: int) -> Int[Tensor, " F"]:
        if rows.is_meta:
            return torch.arange(len(rows))
        if not rows.isfinite().all():
            raise ValueError("got a first layer with NaN or infinite weights to group by direction, wanted finite ones")
        units = F.normalize(rows.detach().to("cpu", torch.float64), dim=1)
        centres, before = self._first(units, groups), None
        for _ in range(self.iterations):
            group = _assigned(_distances(units, centres))
            if before is not None and torch.equal(group, before):
                break
            before = group
            centres = torch.stack([units[group == number].mean(0) for number in range(groups)])
        assert before is not None
        return _sorted(before.argsort(stable=True).unflatten(0, (groups, -1)))

    def _first(self, units: Float[Tensor, "F D"], groups: int) -> Float[Tensor, "G D"]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = [int(torch.randint(len(units), (), generator=generator))]
        while len(chosen) < groups:
            nearest = _distances(units, units[chosen]).amin(1)
            nearest[chosen] = 0
            if not nearest.any():  # all units are equal to chosen ones
                nearest = torch.ones_like(nearest).index_fill(0, torch.tensor(chosen), 0)
            chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        return units[chosen]


def _distances(units: Float[Tensor, "F D"], centres: Float[Tensor, "G D"]) -> Float[Tensor, "F G"]:
    """Return squared distances, by differences: a unit is exactly 0 from itself."""
    return torch.stack([(units - centre).square().sum(1) for centre in centres], dim=1)


def _assigned(cost: Float[Tensor, "F G"]) -> Int[Tensor, " F"]:
    """Return the group of each unit, F / G units in each, at the least sum of costs."""
    places = cost.repeat_interleave(len(cost) // cost.shape[1], dim=1)  # a column for each place in a group
    _, place = _linear_sum_assignment()(places.numpy())
    return torch.from_numpy(place).to(torch.int64) // (len(cost) // cost.shape[1])


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment  # an extra
    except ImportError as error:
        raise ImportError(
            "balanced k-means needs scipy: pip install 'synchromesh[vision]', or take RandomGroups()"
        ) from error
    return linear_sum_assignment


def _sorted(groups: Int[Tensor, "G N"]) -> Int[Tensor, " F"]:
    return groups.sort(dim=1).values.flatten()
