"""A model on many ranks learns exactly what it would learn in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from synchromesh import (
    FixedCapacity,
    FullySharded,
    Grid,
    LoadBalance,
    Local,
    MLPExperts,
    MoE,
    OverRanks,
    Plan,
    Replicated,
    Sharded,
    Softmax,
    TopKRouter,
    accumulating,
    aux_loss,
    clip_grad_norm,
    expert_parameters,
    parallelize,
    split_by_kind,
    token_mean_loss,
)
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, WORLD, STEPS, CLIP = 8, 4, 3, 0.05
TOKENS = (5, 0, 3, 7)


class Model(nn.Module):
    def __init__(self, losses=(), experts=4):
        super().__init__()
        self.first = nn.Linear(D, D)
        router = TopKRouter(D, experts, k=2, scores=Softmax(dtype=torch.float64))
        self.moe = MoE(router, MLPExperts(experts, D, hidden=16), losses=losses)
        self.last = nn.Linear(D, D)

    def forward(self, x):
        return self.last(self.moe(self.first(x)))


def model(**kwargs):
    torch.manual_seed(3)
    return Model(**kwargs).double()


def batch(step, rank):
    torch.manual_seed(100 * step + rank)
    return torch.randn(TOKENS[rank], D, dtype=torch.float64), torch.randn(TOKENS[rank], D, dtype=torch.float64)


def loss_of(run, layers, step, rank):
    x, target = batch(step, rank)
    return (run(x) * target).sum() + aux_loss(layers)


def alone(*, micro=1, **kwargs):
    """Train in one process: the mean of the ranks' losses, each rank's slice on its own."""
    whole = model(**kwargs)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            for rank in range(WORLD):
                (loss_of(whole, whole, step * micro + part, rank) / WORLD).backward()
        norms.append(nn.utils.clip_grad_norm_(whole.parameters(), CLIP))
        optimizer.step()
    return dict(whole.named_parameters()), norms


def compare(run, grid, norms, *, micro=1, **kwargs):
    wanted, wanted_norms = alone(micro=micro, **kwargs)
    assert_close("norms", torch.stack(norms), torch.stack(wanted_norms).float())
    for name, parameter in run.named_parameters():
        plain = name.removeprefix("module.")
        got = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        whole = wanted[plain]
        if "experts" in plain:
            whole = whole.chunk(grid.size)[grid.rank]
        assert_close(plain, got, whole)


def trained(run, layers, grid, *, micro=1):
    groups = [{"params": group} for group in split_by_kind(run.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=True)
    rank, norms = dist.get_rank(), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro - 1):
            with accumulating(run):
                loss_of(run, layers, step * micro + part, rank).backward()
        loss_of(run, layers, step * micro + micro - 1, rank).backward()
        norms.append(clip_grad_norm(run, grid, CLIP))
        optimizer.step()
    return norms


def learns(shared, micro):
    grid = Grid.from_group(dist.group.WORLD)
    layers = model()
    run = parallelize(layers, grid, shared=shared)
    compare(run, grid, trained(run, layers, grid, micro=micro), micro=micro)


@pytest.mark.parametrize("shared", [Replicated(), FullySharded()], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("micro", [1, 2])
def test_training_on_ranks_equals_training_in_one_process(shared, micro):
    run_ranks(learns, WORLD, shared, micro)


def learns_on_two_axes(shared):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    grid, outer = Grid.from_mesh(mesh["expert"]), Grid.from_mesh(mesh["data"])
    layers = model()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(dist.get_rank() // 2)  # replicas that began apart are made alike
    run = parallelize(layers, grid, outer=outer, shared=shared)
    wanted, _ = alone()
    groups = [{"params": group} for group in split_by_kind(run.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(run, layers, step, dist.get_rank()).backward()
        clip_grad_norm(run, grid, CLIP)
        optimizer.step()
    for name, parameter in layers.named_parameters():
        whole = wanted[name].chunk(grid.size)[grid.rank] if "experts" in name else wanted[name]
        assert_close(name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter, whole)


@pytest.mark.parametrize("shared", [Replicated(find_unused_parameters=True), FullySharded()], ids=["ddp", "fsdp2"])
def test_experts_inside_and_data_parallel_outside_learn_the_same(shared):
    run_ranks(learns_on_two_axes, WORLD, shared)


def balances_over_ranks():
    grid = Grid.from_group(dist.group.WORLD)
    layers = model(losses=(OverRanks(LoadBalance(0.5)),))
    run = parallelize(layers, grid)
    x, target = batch(0, grid.rank)
    ((run(x) * target).sum() + aux_loss(layers)).backward()
    whole = model(losses=(LoadBalance(0.5),))
    xs, targets = zip(*(batch(0, rank) for rank in range(WORLD)), strict=True)
    loss = (whole(torch.cat(xs)) * torch.cat(targets)).sum() / WORLD + aux_loss(whole)  # one mean over all tokens
    loss.backward()
    for (name, got), wanted in zip(layers.named_parameters(), whole.parameters(), strict=True):
        part = wanted.grad.chunk(WORLD)[grid.rank] if "experts" in name else wanted.grad
        assert_close(name, got.grad, part)


def test_a_loss_over_ranks_balances_the_tokens_of_all_ranks_together():
    run_ranks(balances_over_ranks, WORLD)


def clips_with_an_inf():
    grid = Grid.from_group(dist.group.WORLD)
    layers = model()
    run = parallelize(layers, grid)
    loss_of(run, layers, 0, grid.rank).backward()
    if grid.rank == 2:
        next(iter(expert_parameters(run).values())).grad.view(-1)[0] = torch.inf
    assert not clip_grad_norm(run, grid, 1.0).isfinite()
    return True


def test_an_inf_in_one_ranks_expert_is_seen_by_every_rank():
    assert run_ranks(clips_with_an_inf, WORLD) == [True] * WORLD


def scales_with_an_inf():
    grid = Grid.from_group(dist.group.WORLD)
    layers = model()
    run = parallelize(layers, grid)
    before = copy.deepcopy(layers.state_dict())
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
    scaler = ShardedGradScaler("cpu", process_group=grid.group)
    scaler.scale(loss_of(run, layers, 0, grid.rank)).backward()
    if grid.rank == 1:
        next(iter(expert_parameters(run).values())).grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return all(torch.equal(p, before[name]) for name, p in layers.state_dict().items())


def test_no_rank_steps_when_the_grad_scaler_finds_inf_in_one_ranks_expert():
    assert run_ranks(scales_with_an_inf, WORLD) == [True] * WORLD


def token_means():
    grid = Grid.from_group(dist.group.WORLD)
    values = torch.arange(TOKENS[grid.rank], dtype=torch.float64) + 10 * grid.rank
    return float(token_mean_loss(values.sum(), len(values), grid))


def test_token_mean_loss_averages_over_all_tokens():
    values = torch.cat([torch.arange(n, dtype=torch.float64) + 10 * rank for rank, n in enumerate(TOKENS)])
    losses = run_ranks(token_means, WORLD)
    assert sum(losses) / WORLD == pytest.approx(float(values.mean()))


def made_from_meta():
    grid = Grid.from_group(dist.group.WORLD)
    with torch.device("meta"):
        layers = Model(experts=8)
    torch.manual_seed(11)
    parallelize(layers, grid)
    whole = Model(experts=8)
    torch.manual_seed(11)
    for module in whole.modules():  # in the order in which a model on the meta device is made
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in whole.named_parameters():
        got = dict(layers.named_parameters())[name]
        assert torch.equal(got, parameter.chunk(grid.size)[grid.rank] if "experts" in name else parameter), name


def test_a_rank_makes_only_its_part_and_it_equals_that_part_of_the_whole():
    run_ranks(made_from_meta, 2)


def test_a_grid_of_one_process_changes_nothing():
    layers = model()
    wanted = {name: p.detach().clone() for name, p in layers.named_parameters()}
    run = parallelize(layers, Grid.from_environment({}))
    assert run is layers
    assert isinstance(layers.moe.strategy, Local)
    for name, p in layers.named_parameters():
        assert torch.equal(p, wanted[name])
    x, _ = batch(0, 0)
    assert_close("y", run(x), model()(x))
    layers.moe.distribute(Sharded(Grid.from_environment({})))
    assert_close("y", run(x), model()(x))
    with pytest.raises(ValueError, match="does not divide"):
        layers.moe(x, plan=Plan(gather=2))


def test_experts_that_cannot_be_cut_over_the_ranks_are_refused():
    run_ranks(refuses, 3)


def refuses():
    with pytest.raises(ValueError, match="3 ranks"):
        parallelize(model(), Grid.from_group(dist.group.WORLD))
    layer = MoE(TopKRouter(D, 3), MLPExperts(3, D, hidden=12), strategy=Sharded(Grid.from_group(dist.group.WORLD)))
    with pytest.raises(ValueError, match="even wire wants"):
        layer(torch.randn(4, D), plan=Plan(ragged=False), capacity=FixedCapacity(1.0))


def one_module_twice():
    torch.manual_seed(0)
    experts = MLPExperts(4, D, hidden=16)
    return nn.Sequential(MoE(TopKRouter(D, 4), experts), MoE(TopKRouter(D, 4), experts)).double()


def one_parameter_twice():
    torch.manual_seed(0)
    first, second = MLPExperts(4, D, hidden=16), MLPExperts(4, D, hidden=16)
    second.up = first.up
    return nn.Sequential(MoE(TopKRouter(D, 4), first), MoE(TopKRouter(D, 4), second)).double()


def learns_tied(build):
    grid, whole = Grid.from_group(dist.group.WORLD), build()
    layers = build()
    run = parallelize(layers, grid, strategy=lambda: Sharded(grid))
    assert layers[0].experts.up is layers[1].experts.up
    names = [name for name, _ in layers.named_parameters()]
    assert names == [name for name, _ in whole.named_parameters()]  # once each
    assert list(expert_parameters(layers)) == [name for name in names if "experts" in name]
    assert list(layers.state_dict()) == list(whole.state_dict())
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (run, whole)]
    for step in range(STEPS):
        x = torch.randn(6 * grid.size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizers[1].zero_grad()
        for part in x.chunk(grid.size):
            (whole(part).square().sum() / grid.size).backward()
        optimizers[0].zero_grad()
        run(x.chunk(grid.size)[grid.rank]).square().sum().backward()
        wanted = nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
        assert_close("norm", clip_grad_norm(run, grid, CLIP), wanted.float())
        for optimizer in optimizers:
            optimizer.step()
    full = get_model_state_dict(layers, options=StateDictOptions(full_state_dict=True))
    moments = [
        get_optimizer_state_dict(each, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
        for each, optimizer in zip((layers, whole), optimizers, strict=True)
    ]
    assert list(moments[0]) == list(moments[1])
    for name, tensor in whole.state_dict().items():
        assert_close(name, full[name], tensor)
    again = build()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    parallelize(again, grid, strategy=lambda: Sharded(grid))
    again.load_state_dict(whole.state_dict())
    assert again[0].experts.up is again[1].experts.up
    x = torch.randn(5, D, dtype=torch.float64)
    assert_close("y", again(x), whole(x))
    assert_close("y of torch's DDP", nn.parallel.DistributedDataParallel(again)(x), whole(x))


@pytest.mark.parametrize("build", [one_module_twice, one_parameter_twice])
@pytest.mark.parametrize("world", [2, 8])
def test_tied_experts_stay_tied_and_learn_as_in_one_process(build, world):
    run_ranks(learns_tied, world, build)


def refuses_ties():
    world = dist.group.WORLD
    grid, other = Grid.from_group(world), Grid.from_group(dist.new_group([1, 0], sort_ranks=False))
    layers = one_module_twice()
    last = nn.Linear(D, D).double()
    last.weight = layers[0].experts.up
    layers.append(last)
    with pytest.raises(ValueError, match=r"0\.experts\.up shared with 2\.weight.*give one of them a copy"):
        parallelize(layers, grid)
    assert layers[0].experts.up.shape[0] == 4  # nothing was cut
    layers = one_module_twice()
    layers[0].distribute(Sharded(grid))
    with pytest.raises(ValueError, match="already"):
        layers[1].distribute(Sharded(other))


def test_experts_tied_to_something_else_or_over_other_ranks_are_refused():
    run_ranks(refuses_ties, 2)
