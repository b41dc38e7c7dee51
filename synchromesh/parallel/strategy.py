"""Strategy: where rows are computed. `Local` computes them where the tokens are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.capacity import Capacity
from synchromesh.experts import Experts
from synchromesh.kernels import Kernels, kernels_for
from synchromesh.types import Plan, Routing, RowMap, Workload


class Strategy(ABC):
    """Runs routed tokens through experts, wherever these are. The result never depends on the plan."""

    @abstractmethod
    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        """Return the plan for this forward, the same on all ranks."""

    @abstractmethod
    def legal_plans(self, workload: Workload, capacity: Capacity) -> dict[Plan, str | None]:
        """Return each plan considered, with None where it is legal or the reason why it is refused."""

    @abstractmethod
    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        """Compute y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t]) over the kept pairs."""

    @abstractmethod
    def agree_max(self, value: Tensor) -> Tensor:
        """Return the maximum over ranks, without gradient."""

    @abstractmethod
    def agree_sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, with gradient."""


@dataclass(frozen=True)
class Local(Strategy):
    """One process holds all experts.

    Attributes:
        kernels: None takes the fastest of the device; two constructions make an A/B test.
    """

    kernels: Kernels | None = None

    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        return Plan()

    def legal_plans(self, workload: Workload, capacity: Capacity) -> dict[Plan, str | None]:
        return {Plan(): None}

    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        if plan != Plan():
            raise ValueError(f"Local runs on one rank and knows {Plan()} only, got {plan}")
        kernels = self.kernels or kernels_for(x.device)
        dtype = compute_dtype(x)
        x = x.to(dtype)
        whole = {name: part.unflatten(0, (experts.num_experts, -1)).to(dtype) for name, part in experts.parts().items()}
        y = experts.fused(x, routing, rowmap, whole, kernels)
        if y is not None:
            return y
        rows = experts.compute(kernels.gather(x, rowmap), rowmap.ends, whole, kernels)
        return kernels.combine(rows, routing.weights, rowmap)

    def agree_max(self, value: Tensor) -> Tensor:
        return value

    def agree_sum(self, value: Tensor) -> Tensor:
        return value


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that experts compute in: autocast's where it is on (it leaves float64 alone), else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
