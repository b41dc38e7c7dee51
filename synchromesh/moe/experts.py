"""Experts: rows sorted by expert to rows of the same shape. They know nothing of ranks, nor of who sent the rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from synchromesh.kernels import Kernels, MLPWeights, Products
from synchromesh.kernels.composed import members_of
from synchromesh.moe.cut import WHOLE, Cut, Spread, draw
from synchromesh.torch_private import vmapped
from synchromesh.types import RowMap

Activation = Callable[[Tensor], Tensor]


Run = Callable[[Tensor, "Experts"], Tensor]
"""Tokens [T, D] and the experts of a layer to tokens [T, D]."""


class Experts(nn.Module, ABC):
    """The networks of one layer, or one cut through them.

    Attributes:
        num_experts: E, of the layer.
        width: D, of the rows in and out; None where the experts do not say.
        cut: what is held here of all experts.
        spread: where the other cuts are, if others hold them.
        output_parts: names of the parts that are added to the output rows, E * D numbers each.
        matrices: number of matrices [hidden, width] of each expert.
        vectors: numbers in each of its biases.
    """

    num_experts: int
    width: int | None
    cut: Cut = WHOLE
    spread: Spread | None = None
    output_parts: ClassVar[frozenset[str]] = frozenset()
    matrices: ClassVar[int] = 2
    vectors: tuple[int, ...] = ()

    def forward(self, x: Float[Tensor, "T D"], run: Run) -> Float[Tensor, "T D"]:
        """Return run(x, self): what a layer does with its experts is done inside a call of them.

        So they are to others what any module is: hooks fire, parametrizations hold, wrappers that fetch or gather
        parameters before a forward (FSDP2, offload, adapters) do so in time.
        """
        return run(x, self)

    @property
    def holder(self) -> nn.Module:
        """The module whose parameters these are: this one, unless it runs another's."""
        return self

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Return the named parameters held here, each seen with dim 0 = E * F (hidden rows) or E * D (output bias).

        Any equal cut of dim 0 is a legal piece for `compute`. Empty for experts that only move whole.
        """

    def initialize(self, std: float) -> None:
        """Draw own parameters as Swin's release does: truncated normal weights, zero biases."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)

    @abstractmethod
    def hold(self, cut: Cut) -> None:
        """Keep only this cut of all parameters. Raises ValueError where they cannot be cut so, or are cut already."""

    @abstractmethod
    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        """Run L experts, or equal slices of their hidden width, on their rows.

        Args:
            rows: sorted by expert; the tail is not read, and what is returned there may be anything.
            ends: running sum of the rows of each expert.
            weights: `parts`, cut and seen with dim 0 = L, output parts at their full width; of experts without parts,
                the parameters by name.
            kernels: of the rows' device.
        """

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        """Return the networks as kernels know them, which then gather, compute and sum in one pass; None for others.

        Args:
            weights: as in `compute`.
        """
        return None


def experts_in(module: nn.Module) -> Experts:
    """Return the experts, whatever wraps them: an adapter, a checkpoint wrapper.

    Raises:
        ValueError: there are none.
    """
    if isinstance(module, Experts):
        return module
    found = next((one for one in module.modules() if isinstance(one, Experts)), None)
    if found is None:
        raise ValueError(
            f"got {type(module).__name__} as the experts of a layer, wanted `Experts`, or a wrapper of them"
        )
    return found


class StackedExperts(Experts):
    """Experts of one shape, whose parameters are stacked: hidden rows `[E F D]`, their biases `[E F]`, output `[E D]`.

    A cut holds `[E/n F D]` or, where it is smaller than an expert, `[1 F*E/n D]`.

    Attributes:
        products: which 8-bit numbers are multiplied, in forward and for the gradient of the rows; None, as at first,
            multiplies rows and weights as they are. `set_products` sets it.
    """

    hidden: int
    activation: Activation
    dropout: float
    products: Products | None = None
    output_parts = frozenset({"down_bias"})
    part_names = ("gate", "gate_bias", "up", "up_bias", "down", "down_bias")

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, as they are computed with: a parametrization's or a pruning's result."""
        named = ((name, getattr(self, name, None)) for name in self.part_names)
        return {name: weight for name, weight in named if weight is not None}

    def parts(self) -> dict[str, Tensor]:
        return {name: weight.flatten(0, 1) for name, weight in self.weights().items()}

    @property
    def vectors(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        biases = [name for name in self.weights() if name.endswith("bias")]
        return tuple(self.hidden if name != "down_bias" else self.width or 0 for name in biases)

    def hold(self, cut: Cut) -> None:
        if cut == self.cut == WHOLE:
            return
        if self.cut != WHOLE:
            raise ValueError(f"got {cut}, these experts hold {self.cut} already: build them again")
        self._check_cut(cut)
        lists = _parametrized(self)
        others = sorted(set(self.weights()) - {name for name, _ in self.named_parameters(recurse=False)} - set(lists))
        if others:
            raise ValueError(
                f"got {cut} of experts whose {', '.join(others)} are parametrized or pruned, wanted plain parameters: "
                "distribute the layer first, then parametrize what each rank holds"
            )

        def part(whole: Tensor) -> Tensor:
            own = whole.detach().flatten(0, 1).chunk(cut.count)[cut.index]
            return own.unflatten(0, (max(1, self.num_experts // cut.count), -1)).clone()

        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(part(parameter), requires_grad=parameter.requires_grad))
        for parametrizations in lists.values():
            learns = parametrizations.original.requires_grad
            parametrizations.original = nn.Parameter(part(parametrizations.original), requires_grad=learns)
            for each in parametrizations:
                each.hold(part)
        self.cut = cut

    def reset_parameters(self) -> None:
        """Draw E pairs of nn.Linear again; a cut draws all, one expert at a time, and keeps its own numbers."""
        assert self.width is not None
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.hidden if name.startswith("down") else self.width
            draw(parameter, 1 / math.sqrt(fan_in), self.num_experts, self.cut)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        mlp = self.mlp(weights) if kernels.fuses(self.activation) else None
        if mlp is not None:  # keeps the pre-activations for backward, and not the hidden rows
            rowmap = RowMap.of_rows(rows.shape[0], ends)
            return kernels.fused_mlp(rows, rows.new_ones(rows.shape[0], 1), rowmap, *mlp)
        multiply = kernels.grouped_mm if self.products is None else partial(kernels.scaled_mm, products=self.products)
        hidden_RF = multiply(rows, weights["up"].mT, ends, weights.get("up_bias"))
        if "gate" in weights:
            gate_RF = multiply(rows, weights["gate"].mT, ends, weights.get("gate_bias"))
            hidden_RF = self.activation(gate_RF) * hidden_RF
        else:
            hidden_RF = self.activation(hidden_RF)
        hidden_RF = F.dropout(hidden_RF, self.dropout, self.training)
        return multiply(hidden_RF, weights["down"], ends, weights.get("down_bias"))

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        drops = self.training and self.dropout > 0
        return None if drops or self.products is not None else (MLPWeights.of(weights), self.activation)

    def _check_cut(self, cut: Cut) -> None:
        if self.num_experts % cut.count and cut.count % self.num_experts:
            raise ValueError(
                f"got {self.num_experts} experts to cut into {cut.count} parts, wanted one number to divide the other"
            )
        shards = max(1, cut.count // self.num_experts)
        biased = bool(self.output_parts & set(self.parts()))
        for name, size in (("hidden", self.hidden), ("width", self.width if biased else shards)):
            if size is not None and size % shards:
                raise ValueError(f"got {name} {size} to cut into {shards} shards of an expert, wanted a multiple")


def _parametrized(experts: nn.Module) -> dict[str, Any]:
    """Return what parametrizes tensors and can be cut with them, such as masks, by the tensors' names."""
    if not is_parametrized(experts):
        return {}
    lists = experts.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return {name: parts for name, parts in lists.items() if all(hasattr(part, "hold") for part in parts.children())}


class MLPExperts(StackedExperts):
    """E feed-forward networks y = act(x up^T + up_bias) down + down_bias.

    Args:
        num_experts: E.
        width: D.
        hidden: F.
        activation: any elementwise callable.
        up_bias, down_bias: whether to have them.
        dropout: probability, on the activated hidden rows while training.

    Parameters: `up [E F D]`, `up_bias [E F]`, `down [E F D]`, `down_bias [E D]`, initialised as E pairs of nn.Linear.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        hidden: int,
        activation: Activation = F.gelu,
        up_bias: bool = True,
        down_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, width, hidden, dropout)
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.dropout = activation, dropout
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if up_bias else None
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if down_bias else None
        self.reset_parameters()


class GatedMLPExperts(StackedExperts):
    """E gated feed-forward networks y = (act(x gate^T) * (x up^T)) down: SwiGLU with F.silu, GEGLU with F.gelu.

    Args:
        num_experts: E.
        width: D.
        hidden: F.
        activation: any elementwise callable.
        bias: on gate, up and down.
        dropout: probability, on the product while training.

    Parameters: `gate`, `up`, `down [E F D]`; with bias `gate_bias`, `up_bias [E F]`, `down_bias [E D]`.
    """

    matrices = 3

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        hidden: int,
        activation: Activation = F.silu,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, width, hidden, dropout)
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.dropout = activation, dropout
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.gate_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.reset_parameters()


class ModuleExperts(Experts):
    """Any modules from rows to rows as experts, one each. They move whole, and run one after the other.

    Every module runs in every forward, on no rows if need be, so that its gradients exist on every rank. The number of
    rows of each is read on the host, so torch.compile does not take them in one graph. Under vmap, which allows no such
    read, each runs on all rows, others' being 0: the same for modules that treat every row by itself.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        if not modules:
            raise ValueError("ModuleExperts got no modules, wanted at least one")
        self.num_experts, self.width = len(modules), None
        self.experts = nn.ModuleDict({str(number): module for number, module in enumerate(modules)})

    def parts(self) -> dict[str, Tensor]:
        return {}

    def hold(self, cut: Cut) -> None:
        if self.cut != WHOLE or self.num_experts % cut.count:
            raise ValueError(
                f"got {cut} of {self.num_experts} modules held as {self.cut}, wanted whole modules in equal numbers: "
                "take as many experts as ranks, or a multiple"
            )
        each = self.num_experts // cut.count
        own = range(cut.index * each, (cut.index + 1) * each)
        self.experts = nn.ModuleDict({str(number): self.experts[str(number)] for number in own})
        self.cut = cut

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        if vmapped():
            out = []
            for number, member in zip(self.experts, members_of(rows.shape[0], ends), strict=True):
                own = member[:, None]
                out.append(self._run(number, rows.where(own, 0), weights).where(own, 0))
            return torch.stack(out).sum(0)
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        *groups, tail = rows.split([*sizes, rows.shape[0] - sum(sizes)])
        out = [self._run(number, group, weights) for number, group in zip(self.experts, groups, strict=True)]
        return torch.cat([*out, out[0].new_zeros(tail.shape)])

    def _run(self, number: str, rows: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        prefix, expert = f"experts.{number}.", self.experts[number]
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        out = functional_call(expert, own, (rows,)) if own else expert(rows)
        if out.shape != rows.shape:
            got, wanted = tuple(out.shape), tuple(rows.shape)
            raise ValueError(f"expert {number} returned rows of shape {got}, wanted {wanted}, as they came in")
        return out


def set_products(model: nn.Module, products: Products | None) -> list[str]:
    """Let the experts of every MoE layer multiply 8-bit numbers, in training too; None undoes it. Return their names.

    Parameters, gradients and optimizer stay as they are. Output and gradients are a few per cent off.

    Args:
        model: any model with `MLPExperts` or `GatedMLPExperts` in it, or such experts.
        products: `Float8Products()` or `MXFloat8Products()`.

    Raises:
        ValueError: there are none.

    >>> from synchromesh.kernels import Float8Products
    >>> set_products(nn.Sequential(MLPExperts(4, 8, hidden=16)), Float8Products())
    ['0']
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, StackedExperts)}
    if not found:
        raise ValueError(f"set_products found no MLPExperts or GatedMLPExperts in {type(model).__name__}")
    for experts in found.values():
        experts.products = products
    return list(found)


def _check_sizes(num_experts: int, width: int, hidden: int, dropout: float) -> None:
    for name, got in (("num_experts", num_experts), ("width", width), ("hidden", hidden)):
        if got < 1:
            raise ValueError(f"{name} is {got}, wanted at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, wanted a probability 0 <= dropout < 1")
