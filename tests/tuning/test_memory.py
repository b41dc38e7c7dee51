"""What a forward keeps for its backward, on each rank and under each plan, against the formula."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from synchromesh import Grid, MLPExperts, MoE, Plan, Sharded
from synchromesh.lattice import Ranks
from synchromesh.testing.cases import EvenRouter
from synchromesh.testing.distributed import run_ranks
from synchromesh.tuning.memory import layer_bytes
from synchromesh.types import Workload

T, K, D, F = 512, 2, 128, 256
PLANS = [Plan(), Plan(chunks=2), Plan(gather=2), Plan(gather=2, near=False), Plan(gather=4)]


def kept(plan, experts):
    """Return the bytes of all storages that autograd saves in a forward, without those of parameters."""
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    layer = MoE(EvenRouter(experts, K), MLPExperts(experts, D, hidden=F), strategy=Sharded(grid))
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(T, D, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, plan=plan)
    total = sum(storages.values())
    y.sum().backward()
    return total, layer.experts.vectors


def kept_by_all(experts):
    return {plan: kept(plan, experts) for plan in PLANS}


@pytest.mark.parametrize("experts", [8, 2])
def test_a_forward_keeps_the_bytes_of_the_formula(experts):
    for found in run_ranks(kept_by_all, 4, experts):
        for plan, (total, vectors) in found.items():
            work = Workload(T, K, D, F, experts, torch.float32, True, vectors=vectors)
            formula = layer_bytes(work, plan, Ranks(4, 2))
            assert total == pytest.approx(formula.activations + formula.gathered, rel=0.1), plan
