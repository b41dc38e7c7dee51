"""Strategy: where rows are computed. `Local` computes them where the tokens are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.kernels import Activation, Kernels, MLPWeights, kernels_for
from synchromesh.kernels.autocast import cast
from synchromesh.moe.capacity import Capacity
from synchromesh.moe.experts import WHOLE, Experts
from synchromesh.types import Plan, Routing, RowMap, Workload


@runtime_checkable
class RowNetworks(Protocol):
    """What `Experts`, and others who keep their weights elsewhere, compute: rows sorted by expert to rows."""

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]: ...

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None: ...


class Strategy(ABC):
    """Runs routed tokens through experts, wherever these are. The result never depends on the plan."""

    @abstractmethod
    def adopt(self, experts: Experts) -> None:
        """Let experts hold what this rank owns of them, once, before their first forward.

        Raises:
            ValueError: they cannot be cut so, or are cut already.
        """

    def see(self, experts: nn.Module) -> None:  # noqa: B027 - there is nothing to see on one rank
        """Look, before each forward, at what the layer calls: its experts, or what by now wraps them."""

    @abstractmethod
    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        """Return the plan for this forward, the same on all ranks."""

    @abstractmethod
    def plans(self) -> Iterable[Plan]:
        """Return every plan there is, legal or not."""

    @abstractmethod
    def refusal(self, plan: Plan, workload: Workload, capacity: Capacity) -> str | None:
        """Return why a plan cannot run; None where it can."""

    def legal_plans(self, workload: Workload, capacity: Capacity) -> dict[Plan, str | None]:
        """Return each plan considered, with None where it is legal or the reason why it is refused."""
        return {plan: self.refusal(plan, workload, capacity) for plan in self.plans()}

    @abstractmethod
    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        """Compute y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t]) over the kept pairs."""

    def run_marked(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"] | None:
        """Do `run`, and mark tokens with a NaN weight in the same pass; None where the layer marks what `run` gives."""
        return None

    def direct(self, x: Float[Tensor, "T D"], routing: Routing, experts: Experts) -> Float[Tensor, "T D"] | None:
        """Compute y of all pairs without a map of rows; None where `run` is the way."""
        return None

    def kernels_on(self, device: torch.device) -> Kernels:
        """Return the kernels of a layer: its router, capacity and experts take the same ones."""
        return kernels_for(device)

    @abstractmethod
    def agree_max(self, value: Tensor) -> Tensor:
        """Return the maximum over ranks, without gradient."""

    @abstractmethod
    def agree_sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, with gradient."""

    def take_waited(self) -> float:
        """Return the seconds that compute waited for the network since the last call."""
        return 0.0


@dataclass(frozen=True)
class Local(Strategy):
    """One process holds all experts.

    Attributes:
        kernels: of router, capacity and experts; None takes the fastest of the device, and two constructions make an
            A/B test.
    """

    kernels: Kernels | None = None

    def adopt(self, experts: Experts) -> None:
        if experts.cut != WHOLE:
            raise ValueError(f"Local wants all experts, got experts that hold {experts.cut}: give them their strategy")

    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        return Plan()

    def plans(self) -> Iterable[Plan]:
        return (Plan(),)

    def refusal(self, plan: Plan, workload: Workload, capacity: Capacity) -> str | None:
        return None if plan == Plan() else f"Local runs on one rank and knows {Plan()} only"

    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        kernels, dtype, parts = self.kernels_on(x.device), compute_dtype(x), _whole(experts)
        mlp = experts.mlp(parts)
        # A fused pass under autocast casts by itself, on a CPU each expert just before it is multiplied.
        casts = mlp is not None and kernels.fuses(mlp[1]) and torch.is_autocast_enabled(x.device.type)
        whole = {name: part if casts and _is_wide(part, dtype) else cast(part, dtype) for name, part in parts.items()}
        return run_here(x.to(dtype), routing, rowmap, experts, whole, kernels)

    def run_marked(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"] | None:
        kernels, dtype = self.kernels_on(x.device), compute_dtype(x)
        if (
            kernels.marked_mlp is None or type(self).run is not Local.run
        ):  # a strategy made of this one runs its own way
            return None
        whole = {name: part.to(dtype) for name, part in _whole(experts).items()}
        mlp = experts.mlp(whole)
        if mlp is None or not kernels.fuses(mlp[1]):
            return None
        return kernels.marked_mlp(x.to(dtype), routing.weights, rowmap, routing.expert_ids, *mlp)

    def direct(self, x: Float[Tensor, "T D"], routing: Routing, experts: Experts) -> Float[Tensor, "T D"] | None:
        ids, kernels = routing.expert_ids, self.kernels_on(x.device)
        return run_few_here(x, ids, routing.weights, experts, _whole(experts), kernels)  # casts what it runs

    def kernels_on(self, device: torch.device) -> Kernels:
        return kernels_for(device, self.kernels)

    def agree_max(self, value: Tensor) -> Tensor:
        return value

    def agree_sum(self, value: Tensor) -> Tensor:
        return value


def _whole(experts: Experts) -> dict[str, Tensor]:
    """Return the parts seen with dim 0 = E."""
    return {name: part.unflatten(0, (experts.num_experts, -1)) for name, part in experts.parts().items()}


def _is_wide(part: Tensor, dtype: torch.dtype) -> bool:
    return part.dtype == torch.float32 and dtype.itemsize < part.dtype.itemsize


def run_here(
    x: Float[Tensor, "T D"],
    routing: Routing,
    rowmap: RowMap,
    experts: RowNetworks,
    weights: Mapping[str, Tensor],
    kernels: Kernels,
) -> Float[Tensor, "T D"]:
    """Run tokens whose experts are all here, with weights seen with dim 0 = E: in one pass where kernels have one."""
    mlp = experts.mlp(weights)
    if mlp is not None and kernels.fuses(mlp[1]):
        return kernels.fused_mlp(x, routing.weights, rowmap, *mlp)
    rows = experts.compute(kernels.gather(x, rowmap), rowmap.ends, weights, kernels)
    return kernels.combine(rows, routing.weights, rowmap)


def run_few_here(
    x: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: RowNetworks,
    parts: Mapping[str, Tensor],
    kernels: Kernels,
) -> Float[Tensor, "T D"] | None:
    """Run all pairs without a map of rows; None where `run_here` is faster, or a gradient is wanted."""
    mlp = None if torch.is_grad_enabled() else experts.mlp(parts)
    if mlp is None or not kernels.prefers_direct(expert_ids.numel(), mlp[0].up.shape[0], mlp[1]):
        return None
    return kernels.direct_mlp(x, weights, expert_ids, *mlp)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that experts compute in: autocast's where it is on (it leaves float64 alone), else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
