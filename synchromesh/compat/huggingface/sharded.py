"""The experts of a transformers model as `Experts`: cut over ranks, run by any plan, put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.compat.huggingface.networks import (
    ExpertsModule,
    Form,
    Network,
    network_from,
    network_of,
    weight_names,
    weights_from,
)
from synchromesh.kernels import Activation, Kernels, MLPWeights
from synchromesh.moe.experts import WHOLE, Cut, Experts
from synchromesh.parallel.comm.grid import Grid

# The fields of MLPWeights, under which shards of an expert are kept.
SHARDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


class TransformersExperts(Experts):
    """The experts of a transformers module, which stays the owner of their parameters.

    Whole experts keep the module's own names and layout, dim 0 the experts. Where ranks are more than experts, a rank
    keeps a slice of one expert's hidden rows as `gate`, `up`, `down [1 F/S D]` (and biases) in their place.

    Args:
        module: an experts module of transformers.
        ranks: that its experts are spread over already, this one holding its equal part; 1 is none. Its gradients are
            then sums over ranks, as transformers wants them, not means.
    """

    output_parts = frozenset({"down_bias", "down_proj_bias"})

    def __init__(self, module: ExpertsModule, *, ranks: int = 1) -> None:
        super().__init__()
        self._owner = (module,)  # in a tuple: a child would be its own parent
        self._ranks = ranks
        _, self.hidden, self.width = network_of(module).weights.down.shape
        self.num_experts = module.num_experts * ranks  # the module says how many it holds

    @property
    def module(self) -> ExpertsModule:
        return self._owner[0]

    @property
    def holder(self) -> nn.Module:
        return self.module

    @property
    def matrices(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 3 if Form.of(self.module).has_gate else 2

    @property
    def vectors(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        form = Form.of(self.module)
        return ((1 + form.has_gate) * self.hidden, self.width or 0) if form.has_bias else ()

    @property
    def in_shards(self) -> bool:
        """Whether this rank holds a slice of one expert."""
        return self.cut.count > self.num_experts

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the experts' parameters; who walks through the modules of a model meets them in theirs alone."""
        for name in self._names() if recurse else ():
            yield f"{prefix}.{name}" if prefix else name, getattr(self.module, name)

    def parts(self) -> dict[str, Tensor]:
        """Return the parameters, seen with dim 0 = E where experts are whole: their cuts are whole experts too."""
        own = {name: getattr(self.module, name) for name in self._names()}
        if self.in_shards:
            return {name: parameter.flatten(0, 1) for name, parameter in own.items()}
        return own if self._ranks == 1 else {name: _summed(w, self._ranks) for name, w in own.items()}

    def hold(self, cut: Cut) -> None:
        if self._ranks > 1:
            if cut.count != self._ranks:
                raise ValueError(f"got {cut} of experts that are spread over {self._ranks} ranks already")
        elif cut == self.cut == WHOLE:
            return
        elif self.cut != WHOLE:
            raise ValueError(f"got {cut}, these experts hold {self.cut} already: load the model again")
        elif cut.count <= self.num_experts:
            self._keep_whole(cut)
        else:
            self._keep_shard(cut)
        self.cut = cut

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        return self._network(weights).compute(rows, ends, weights, kernels)

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        return self._network(weights).mlp(weights)

    def gathered(self, grid: Grid) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's own parameters, whole; all ranks of the grid ask together."""
        if self.cut == WHOLE:
            yield from ((name, getattr(self.module, name).detach()) for name in self._names())
            return
        parts = {name: _all_parts(getattr(self.module, name), grid) for name in self._names()}
        if self.in_shards:
            parts = {name: part.flatten(0, 1).unflatten(0, (self.num_experts, -1)) for name, part in parts.items()}
            parts = weights_from(self.module, MLPWeights.of(parts))
        yield from parts.items()

    def _names(self) -> list[str]:
        if not self.in_shards:
            return weight_names(self.module)
        return [name for name in SHARDS if isinstance(getattr(self.module, name, None), Tensor)]

    def _network(self, weights: Mapping[str, Tensor]) -> Network:
        """See the weights of some experts [N, ...]; whole ones come as [N, 1, ...]."""
        if self.in_shards:
            return Network(self.module, Form.of(self.module), MLPWeights.of(weights))
        return network_from(self.module, {name: weight.flatten(0, 1) for name, weight in weights.items()})

    def _keep_whole(self, cut: Cut) -> None:
        if self.num_experts % cut.count:
            raise ValueError(f"got {self.num_experts} experts to cut into {cut.count} parts, wanted a multiple")
        for name in self._names():
            parameter = getattr(self.module, name)
            _set(self.module, name, parameter.detach().chunk(cut.count)[cut.index].clone(), like=parameter)

    def _keep_shard(self, cut: Cut) -> None:
        module, shards = self.module, cut.count // self.num_experts
        if cut.count % self.num_experts or self.hidden % shards or (self.vectors and (self.width or 0) % shards):
            raise ValueError(
                f"got {self.num_experts} experts of {self.hidden} hidden rows and width {self.width} to cut into "
                f"{cut.count} parts, wanted whole slices of each expert"
            )
        if Form.of(module).has_post_expert_norm:
            raise ValueError(f"{type(module).__name__} has a norm after each expert, which no slice of one can apply")
        expert, shard = divmod(cut.index, shards)
        like, mlp = module.down_proj, network_of(module).weights.apart()
        for name in weight_names(module):
            delattr(module, name)
        for name in SHARDS:
            part = getattr(mlp, name)
            if part is not None:
                own = part.detach()[expert : expert + 1].chunk(shards, 1)[shard]
                _set(module, name, own.clone(memory_format=torch.contiguous_format), like=like)


def _set(module: ExpertsModule, name: str, value: Tensor, *, like: nn.Parameter) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))


def _all_parts(part: Tensor, grid: Grid) -> Tensor:
    """Return the parts of all ranks, one after the other."""
    whole = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(grid.size)]
    dist.all_gather(whole, part.detach().contiguous(), group=grid.group)
    return torch.cat(whole)


def _summed(parameter: Tensor, ranks: int) -> Tensor:
    """See a parameter whose gradient, a mean over ranks, is to be their sum."""
    seen = parameter.view_as(parameter)
    if seen.requires_grad:
        seen.register_hook(lambda grad: grad * ranks)
    return seen
