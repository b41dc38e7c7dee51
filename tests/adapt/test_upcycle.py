import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh import Grid, Sharded, Upcycle, aux_loss, parallelize, routing_options
from synchromesh.adapt.adaptation import adapt
from synchromesh.testing.compare import relative_rms
from synchromesh.testing.distributed import run_ranks


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_first_output_is_the_blocks(block, slices, copies):
    x = torch.randn(3, 9, 8).double()
    experts = Upcycle(num_experts=4 * slices, k=copies * slices, slices=slices)("mlp", block)
    torch.testing.assert_close(experts(x), block(x), rtol=1e-10, atol=1e-10)
    assert experts.moe.experts.hidden == 24 // slices


def test_the_experts_are_the_block_bit_for_bit(block):
    experts = Upcycle(num_experts=3)("mlp", block).moe.experts
    first = block.gate_proj if hasattr(block, "gate_proj") else block[0]
    rows = experts.gate if hasattr(experts, "gate") else experts.up
    assert all(torch.equal(own, first.weight) for own in rows)


@pytest.mark.parametrize("slices", [1, 2])
def test_noise_makes_experts_that_differ_a_little(block, slices):
    x = torch.randn(50, 8).double()
    experts = Upcycle(num_experts=4, k=2, slices=slices, noise=0.02)("mlp", block)
    assert 1e-3 < relative_rms(experts(x), block(x)) < 0.1
    up = experts.moe.experts.up
    assert not torch.equal(up[0], up[slices])
    again, other = (Upcycle(4, 2, slices, 0.02, seed=seed)("mlp", block).moe.experts.up for seed in (0, 1))
    assert torch.equal(up, again)
    assert not torch.equal(up, other)


@pytest.mark.parametrize("slices", [1, 2])
def test_merging_at_once_gives_the_block_back_bit_for_bit(block, slices):
    model = nn.Sequential(nn.Linear(8, 8), block).double()
    state = copy.deepcopy(model.state_dict())
    merged = adapt(model, "1", Upcycle(num_experts=4, k=2, slices=slices)).merge().state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())


def test_experts_and_routers_learn_and_part(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), block).double()
    adaptation = adapt(model, "1", Upcycle(num_experts=4, k=2))
    optimizer = torch.optim.AdamW(adaptation.trained().values(), lr=0.05)
    before = {name: p.detach().clone() for name, p in adaptation.trained().items()}
    for _ in range(3):
        (model(torch.randn(40, 8).double()).square().sum() + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in adaptation.trained().items())
    assert "1.moe.router.weight" in adaptation.trained()
    assert not torch.equal(model[1].moe.experts.up[0], model[1].moe.experts.up[1])


def test_what_cannot_be_upcycled_is_said():
    block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))})
    with pytest.raises(ValueError, match="mlp has 24 hidden units to cut into 5 slices, wanted a multiple"):
        adapt(block, "mlp", Upcycle(num_experts=10, k=5, slices=5))
    with pytest.raises(ValueError, match="got 4 slices, 8 experts and k 2, wanted num_experts and k to be multiples"):
        Upcycle(slices=4)
    with pytest.raises(ValueError, match="got k 9 of 8 experts"):
        Upcycle(k=9)
    with pytest.raises(ValueError, match="got noise -1"):
        Upcycle(noise=-1.0)


def upcycled() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))).double()
    adapt(model, "1", Upcycle(num_experts=4, k=2, slices=2, noise=0.1, losses=()))
    return model


def on_ranks() -> list:
    grid = Grid.from_group(dist.group.WORLD)
    run = parallelize(upcycled(), grid, strategy=lambda: Sharded(grid))
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()
    return run(x).tolist()


def test_ranks_compute_what_one_process_does():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()
    wanted = upcycled()(x)
    for y in run_ranks(on_ranks, 2):
        torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), wanted, rtol=1e-9, atol=1e-9)


def test_a_layer_of_many_choices_is_still_the_block(block):
    model, x = nn.Sequential(nn.Linear(8, 8), block).double(), torch.randn(5, 8).double()
    wanted = model(x)
    adapt(model, "1", Upcycle(num_experts=8, k=2))
    with routing_options(model, k=8):
        torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
