"""Experts that stay frozen and learn updates of low rank, one for all of them or one each, of one or several streams.

A layer without task streams sees tokens [T, D]. With S of them it sees tokens [T, (1 + S) D], the shared stream first:

    hidden_0 = up x_0 + b + (up update) x_0          hidden_s = up x_0 + b + (up update of s) x_s
    y_0 = down a_0 + (down update) a_0               y_s = down a_0 + (down update of s) a_s         a = act(hidden)

The router sees the shared stream alone: all streams of a token go to its experts in one dispatch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from synchromesh.adapt.adaptation import Adapted
from synchromesh.kernels import Kernels, MLPWeights
from synchromesh.moe.cut import Cut
from synchromesh.moe.experts import Activation, StackedExperts, experts_in
from synchromesh.moe.layer import MoE
from synchromesh.moe.routing import Places, Router, routed
from synchromesh.types import Routing

SHARED = ""  # the stream that goes on; others have the names of tasks


@dataclass(frozen=True)
class Update:
    """The size of an update.

    Attributes:
        rank: r.
        scale: of the product.
    """

    rank: int
    scale: float


class SharedColumns(Router):
    """A router that sees the shared stream of its tokens alone.

    Attributes:
        router: of the layer.
        columns: width of the stream.
    """

    def __init__(self, router: nn.Module, columns: int) -> None:
        super().__init__()
        self.router, self.columns = router, columns
        self.num_experts, self.k = getattr(router, "num_experts", None), getattr(router, "k", 1)
        self.takes_places = getattr(router, "takes_places", False)

    def forward(
        self,
        x: Float[Tensor, "T W"],
        k: int | None = None,
        *,
        kernels: Kernels | None = None,
        places: Places | None = None,
    ) -> Routing:
        return routed(self.router, x[:, : self.columns], k, kernels, places)


class LowRankExperts(StackedExperts):
    """Frozen experts and the factors of their updates, as parts: "up_down" is the first factor of the update of "up".

    Args:
        experts: copied; all of them, not spread yet.
        updates: of each stream, by name, the shared one first.
        shared: whether all experts have the same factors, which `LowRankMoE` then holds.
        with_shared: whether the other streams get the shared update, of the shared rows, too.
        generator: draws first factors.
    """

    def __init__(
        self,
        experts: StackedExperts,
        *,
        updates: Mapping[str, Update],
        shared: bool,
        with_shared: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden = experts.num_experts, experts.hidden
        self.activation, self.dropout, self.cut = experts.activation, experts.dropout, experts.cut
        assert experts.width is not None
        self.columns, self.updates, self.with_shared = experts.width, dict(updates), with_shared
        self.width = experts.width * len(updates)
        for name, weight in experts.weights().items():
            setattr(self, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
        self.frozen_names = tuple(experts.weights())
        factors = _factors(experts, updates, count=1 if shared else experts.num_experts)
        for name, factor in factors.items():
            if name.endswith("_down"):
                draw_first(factor, generator)
        self._outside: tuple[nn.ParameterDict, ...] = (nn.ParameterDict(factors),) if shared else ()
        if not shared:
            for name, factor in factors.items():
                setattr(self, name, nn.Parameter(factor))
        self.part_names = (*self.frozen_names, *factors)

    @property
    def matrices(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # of the experts in it
        return 3 if "gate" in self.frozen_names else 2

    @property
    def common(self) -> nn.ParameterDict | None:
        """The factors that all experts share; None where each has its own."""
        return self._outside[0] if self._outside else None

    def weights(self) -> dict[str, Tensor]:
        own = super().weights()
        held = len(own["up"])
        shared = {} if self.common is None else dict(self.common.items())
        return own | {name: _of_each(factor, held, self.cut.count) for name, factor in shared.items()}

    def hold(self, cut: Cut) -> None:
        """Keep whole experts. Raises ValueError where an expert would lie on several ranks."""
        if cut.count > self.num_experts:
            raise ValueError(
                f"got {cut} of {self.num_experts} experts with updates of low rank, wanted whole experts on each rank: "
                "take as many experts as ranks, or more"
            )
        outside, self._outside = self._outside, ()
        super().hold(cut)
        self._outside = outside

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        return None

    def compute(
        self, rows: Float[Tensor, "R W"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R W"]:
        streams = dict(zip(self.updates, rows.split(self.columns, dim=1), strict=True))

        def products(name: str, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Return a matrix times the shared stream, and with it each stream's own update."""
            matrix = weights[name] if name == "down" else weights[name].mT
            base = kernels.grouped_mm(x[SHARED], matrix, ends, weights.get(f"{name}_bias"))
            found = {}
            for stream, own in x.items():
                inner = kernels.grouped_mm(own, weights[_named(stream, name, "down")].mT, ends)
                update = kernels.grouped_mm(inner, weights[_named(stream, name, "up")].mT, ends)
                found[stream] = base + update * self.updates[stream].scale
                if stream == SHARED and self.with_shared:
                    base = found[SHARED]
            return found

        hidden = products("up", streams)
        if "gate" in weights:
            gate = products("gate", streams)
            hidden = {stream: self.activation(gate[stream]) * own for stream, own in hidden.items()}
        else:
            hidden = {stream: self.activation(own) for stream, own in hidden.items()}
        dropout = nn.functional.dropout
        hidden = {stream: dropout(own, self.dropout, self.training) for stream, own in hidden.items()}
        return torch.cat(list(products("down", hidden).values()), dim=1)

    @torch.no_grad()
    def filled(self, experts: StackedExperts) -> StackedExperts:
        """Give experts of the kind that these were made of the weights with the shared stream's updates."""
        weights = self.weights()
        experts.cut = self.cut
        if self.spread is not None:
            self.spread.attach(experts)
        for name in self.frozen_names:
            weight = weights[name]
            if not name.endswith("bias"):
                update = weights[f"{name}_up"] @ weights[f"{name}_down"]  # [E out in]
                update = update * self.updates[SHARED].scale
                weight = weight + (update.mT if name == "down" else update)
            setattr(experts, name, nn.Parameter(weight.clone()))
        return experts


class LowRankMoE(Adapted):
    """A MoE layer, frozen, whose experts learn updates of low rank.

    Args:
        moe: copied; not spread over ranks yet.
        updates: of each stream in the columns of a token, by name, the shared one first.
        per_expert: whether each expert has factors of its own.
        with_shared: whether the other streams get the shared update, of the shared rows, too.
        generator: draws first factors.

    Attributes:
        moe: the layer.
        common: the factors that all experts share; None where each has its own.

    Raises:
        ValueError: its experts are of another kind than `MLPExperts` and `GatedMLPExperts`, or masked.
    """

    takes_mask = True

    def __init__(
        self,
        moe: MoE,
        updates: Mapping[str, Update],
        *,
        per_expert: bool,
        with_shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        old, tasks = experts_in(moe.experts), len(updates) > 1
        if not isinstance(old, StackedExperts) or (tasks and moe.shared is not None):
            what = "a shared expert" if isinstance(old, StackedExperts) else f"the experts {type(old).__name__}"
            raise ValueError(f"got a MoE layer with {what}, wanted MLPExperts or GatedMLPExperts alone")
        if parametrize.is_parametrized(old):
            raise ValueError(
                "got experts that are masked or adapted already, wanted plain ones: densify or merge first"
            )
        self.moe = copy.deepcopy(moe).requires_grad_(False)
        experts = LowRankExperts(
            old, updates=updates, shared=not per_expert, with_shared=with_shared, generator=generator
        )
        self.moe.experts, self.common = experts, experts.common
        if tasks:
            assert old.width is not None
            self.moe.router = SharedColumns(self.moe.router, old.width)
        self._plain = (copy.deepcopy(old).to("meta"),)

    def forward(self, x: Float[Tensor, "*T W"], mask: Bool[Tensor, "*T"] | None = None) -> Float[Tensor, "*T W"]:
        return self.moe(x, mask=mask)

    def merged(self) -> nn.Module:
        """Return the MoE layer with the shared stream's updates; what tasks have learned is not in it."""
        experts = experts_in(self.moe.experts)
        assert isinstance(experts, LowRankExperts)
        plain = copy.deepcopy(self._plain[0])
        made = copy.deepcopy(self.moe, {id(experts): None})  # all but the experts
        made.experts = experts.filled(plain)
        if isinstance(made.router, SharedColumns):
            made.router = made.router.router
        return made.requires_grad_(True)


def _of_each(factor: Tensor, experts: int, ranks: int) -> Tensor:
    """Return the factors that all experts share, for those held here.

    Gradients of experts are means over ranks as they come, those of parameters outside of experts become means later:
    what comes through experts is multiplied by the ranks first.
    """
    seen = factor.expand(experts, -1, -1)
    if ranks > 1 and seen.requires_grad:
        seen.register_hook(lambda gradient: gradient * ranks)
    return seen


def _factors(experts: StackedExperts, updates: Mapping[str, Update], *, count: int) -> dict[str, Tensor]:
    """Return factors for every matrix and stream, by name: [count, r, in], and zeros [count, out, r]."""
    found = {}
    for name, weight in experts.weights().items():
        if not name.endswith("bias"):
            out, width = weight.shape[1:] if name != "down" else (weight.shape[2], weight.shape[1])
            for stream, update in updates.items():
                found[_named(stream, name, "down")] = weight.new_empty(count, update.rank, width)
                found[_named(stream, name, "up")] = weight.new_zeros(count, out, update.rank)
    return found


def _named(stream: str, matrix: str, factor: str) -> str:
    return "_".join(part for part in (stream, matrix, factor) if part)


def draw_first(down: Tensor, generator: torch.Generator | None) -> None:
    """Fill a first factor as `nn.Linear` fills its weight."""
    if not down.is_meta:
        numbers = torch.rand(down.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            down.copy_((2 * numbers - 1) / math.sqrt(down.shape[-1]))
