"""StaticSparsity: matrices of which most entries are 0 from the first step until `densify` (SPDF, arXiv 2303.10464).

Train with a random mask that never changes, then let the masked entries learn too, from 0:

    sparse = adapt(model, "blocks.*", StaticSparsity(0.75))     pre-training: masked entries are exactly 0
    densify(model, optimizer)                                   tuning: the same function, now dense

Random entries save arithmetic in principle only: dense products compute them too, and torch's sparse ones no faster on
a CPU up to 75 % (docs/adapt.md). `count_entries` counts what a machine for such matrices would save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from synchromesh import seeds
from synchromesh.adapt.adaptation import AdaptedTensor, merge_tensors
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.linear_layers import is_linear
from synchromesh.moe.experts import StackedExperts


@final
@dataclass(frozen=True)
class StaticSparsity(ModuleFactory):
    """Masks entries of the matrices of linear layers and of experts; other modules stay, what is inside is asked.

    Norms, biases, embeddings and routers are never masked; stacked experts of other libraries are not known, and stay.
    Every matrix, and every expert's, has the same share of zeros, to one entry. Masks depend on seed, name and size
    alone: ranks that hold parts of experts have their part of the mask of the whole.

    Attributes:
        sparsity: share of entries that are 0, 0 <= it < 1.
        seed: of the masks.

    >>> sparse = StaticSparsity(0.75)("fc", nn.Linear(8, 4))
    >>> int((sparse.weight == 0).sum())
    24
    """

    sparsity: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"got sparsity {self.sparsity}, wanted the share of entries that are 0, 0 <= it < 1, such as 0.75"
            )

    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        if not is_linear(module) and not isinstance(module, StackedExperts):
            return None
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is masked or adapted already, wanted plain weights to mask: merge or densify it first"
            )
        masked = copy.deepcopy(module)
        for own, weight in [(own, p) for own, p in masked.named_parameters(recurse=False) if _is_matrix(own, p)]:
            mask = self._mask(f"{name}.{own}", masked, weight)
            with torch.no_grad():
                weight.mul_(mask)  # before the mask lies over it: what is drawn below a mask would come back later
            parametrize.register_parametrization(masked, own, StaticMask(mask))
        return masked

    def _mask(self, name: str, module: nn.Module, weight: Tensor) -> Bool[Tensor, ...]:
        if weight.is_meta:
            return torch.ones_like(weight, dtype=torch.bool)
        if not isinstance(module, StackedExperts):
            return self._drawn(name, weight.numel()).view_as(weight).to(weight.device)
        rows, each = weight.flatten(0, 1), weight.shape[0] * weight.shape[1] * module.cut.count // module.num_experts
        first = len(rows) * module.cut.index
        masks = [
            self._drawn(f"{name}.{expert}", each * weight.shape[2]).view(each, -1)
            for expert in range(first // each, -(-(first + len(rows)) // each))
        ]
        start = first % each
        return torch.cat(masks)[start : start + len(rows)].view_as(weight).to(weight.device)

    def _drawn(self, name: str, entries: int) -> Bool[Tensor, " N"]:
        """Return False for the given share of entries, any of them."""
        order = torch.randperm(entries, generator=seeds.named_generator(self.seed, seeds.ADAPT, name))
        return torch.ones(entries, dtype=torch.bool).index_fill_(0, order[: round(self.sparsity * entries)], False)


@final
class StaticMask(AdaptedTensor):
    """Lets the entries of a tensor through that its mask holds; the others are exactly 0, and get no gradient.

    Attributes:
        mask: True for entries that learn.
    """

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, ...]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return torch.where(self.mask, weight, 0.0)

    def hold(self, cut: Callable[[Tensor], Tensor]) -> None:
        """Keep the mask of a part of the tensor."""
        self.mask = cut(self.mask)


def densify(model: nn.Module, optimizer: Optimizer | None = None) -> list[str]:
    """Take the masks of a model away, in place: all entries learn from now on, those that were masked from exactly 0.

    The parameters stay the same objects, so that an optimizer goes on with them; what it remembers of them (moments,
    steps) is forgotten, since masked entries have none. Return the names of the tensors.

    Raises:
        ValueError: there is no mask, or something else than a mask lies over a tensor too.
    """
    found = dict(_masked(model))
    if not found:
        raise ValueError(f"densify found no masked tensor in {type(model).__name__}: it is dense already")
    for name, (module, own) in found.items():
        parts = module.get_submodule(f"parametrizations.{own}").children()
        over = [type(part).__name__ for part in parts if not isinstance(part, StaticMask)]
        if over:
            raise ValueError(
                f"{name} has {', '.join(over)} over its mask, wanted the mask alone: merge or undo that first"
            )
    for module, own in found.values():
        merge_tensors(module, own)
        if optimizer is not None:
            optimizer.state.pop(module.get_parameter(own), None)
    return list(found)


@dataclass(frozen=True)
class Entries:
    """How many entries the masked matrices of a model have.

    Attributes:
        kept: entries that learn.
        all: with those that are 0.
    """

    kept: int
    all: int


def count_entries(model: nn.Module) -> Entries:
    """Count the entries of the masked matrices held here. A token costs two operations for each kept one, forward."""
    masks = [module.mask for module in model.modules() if isinstance(module, StaticMask)]
    return Entries(sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks))


def _masked(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yield the masked tensors: dotted name, module, own name."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            lists = module.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            for own, parts in lists.items():
                assert isinstance(parts, parametrize.ParametrizationList)
                if any(isinstance(part, StaticMask) for part in parts):
                    yield f"{path}.{own}".lstrip("."), (module, own)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")  # an expert's bias has two dims
