"""The optimizer of the parts equals the optimizer of the whole, step by step."""

import copy

import pytest
import torch
from torch import nn

from synchromesh.compat.tutel import net
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]


class Model(nn.Module):
    """Shared weights of sizes that no number of ranks divides, an expert, and a weight without gradient."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5, dtype=torch.float64)
        self.expert = nn.Linear(5, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 1, dtype=torch.float64)
        self.unused = nn.Parameter(torch.rand(7, dtype=torch.float64))

    def forward(self, x):
        return self.last(self.expert(self.first(x).tanh()).tanh())


def loss_of(model, step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.rand(6, 3, dtype=torch.float64, generator=generator)
    if rank == 1 and step % 2:  # this rank does not use the first layer now
        return model.last(model.expert(x @ torch.ones(3, 5, dtype=torch.float64))).square().sum()
    return model(x).square().sum()


def trained(average, optimizer, options):
    """Train five steps by parts, and beside it the whole with gradients summed by hand."""
    world, me = net.get_world_size(), net.get_world_rank()
    torch.manual_seed(0)
    ours = Model()
    wholes = [copy.deepcopy(ours) for _ in range(world)]  # rank by rank: shared weights stay alike, experts do not
    for p in ours.expert.parameters():
        p._tutel_expert = True
    by_parts = net.TutelDistributedOptimizer(ours.parameters(), average_shared=average).warp_local(optimizer, **options)
    by_hand = [optimizer(whole.parameters(), **options) for whole in wholes]
    assert sum(p.numel() for p in by_parts.virt_params) <= sum(p.numel() for p in by_parts.params) / world + 5
    for step in range(5):
        if step == 3:  # weights loaded anew count
            for model in (ours, *wholes):
                model.first.weight.data.mul_(0.5)
        by_parts.zero_grad()
        loss_of(ours, step, me).backward()
        by_parts.step()
        for rank, (whole, hand) in enumerate(zip(wholes, by_hand, strict=True)):
            hand.zero_grad(set_to_none=False)
            loss_of(whole, step, rank).backward()
        for names in zip(*(whole.named_parameters() for whole in wholes), strict=True):
            grads = [p.grad for _, p in names if p.grad is not None]
            if not names[0][0].startswith("expert") and grads:
                for _, p in names:
                    p.grad = sum(grads) / (world if average else 1)
        for hand in by_hand:
            hand.step()
        for (name, got), wanted in zip(ours.named_parameters(), wholes[me].parameters(), strict=True):
            assert_close(f"{name} after step {step}", got, wanted)
    assert ours.unused.grad is None
    return True


def all_trained():
    net.TutelDistributedOptimizer([]).warp_local(NoParameters).step()
    return all(trained(average, *optimizer) for average in (False, True) for optimizer in OPTIMIZERS)


class NoParameters:
    """Stands for an optimizer that takes an empty list; those of torch do not."""

    def __init__(self, parameters):
        assert parameters == []

    def step(self):
        pass


@pytest.mark.parametrize("world", [2, 4])
def test_parts_step_as_the_whole(world):
    assert run_ranks(all_trained, world) == [True] * world


def test_without_a_job_it_is_the_optimizer():
    assert all_trained()


def test_gradients_become_zero():
    ours = Model()
    by_parts = net.TutelDistributedOptimizer(ours.parameters()).warp_local(torch.optim.SGD, lr=0.1)
    loss_of(ours, 0, 0).backward()
    by_parts.zero_grad()
    assert ours.first.weight.grad.abs().sum() == 0
    assert ours.unused.grad is None
