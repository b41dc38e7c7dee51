"""What a plan sends, keeps and reads, counted."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from synchromesh import (
    AsIs,
    Dropless,
    FixedCapacity,
    Float8,
    Float8Products,
    Grid,
    MLPExperts,
    ModuleExperts,
    MoE,
    MXFloat8Products,
    Plan,
    Sharded,
    TopKRouter,
    load_stats,
    parallelize,
    set_products,
)
from synchromesh.kernels import REFERENCE
from synchromesh.parallel import pool
from synchromesh.parallel.comm import collectives
from synchromesh.parallel.layout import Layout
from synchromesh.testing.cases import EvenRouter
from synchromesh.testing.compare import relative_rms
from synchromesh.testing.distributed import run_ranks
from synchromesh.testing.reads import HostReads
from synchromesh.types import Workload

D, F, T = 8, 16, 24


def layer_on(grid, experts=4, router=None, **kwargs):
    torch.manual_seed(0)
    return MoE(
        router or TopKRouter(D, experts, k=2), MLPExperts(experts, D, hidden=F), strategy=Sharded(grid, **kwargs)
    )


def run(layer, plan, x=None, **kwargs):
    x = torch.randn(T, D, requires_grad=True) if x is None else x
    layer(x, plan=plan, **kwargs).sum().backward()
    return x.grad


class Counted:
    """Numbers that leave this rank, by kind, and calls."""

    def __init__(self):
        self.numbers, self.calls = {"rows": 0, "weights": 0}, 0

    def __enter__(self):
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        exchange, collect = dist.all_to_all_single, getattr(dist, gather)

        def all_to_all_single(out, rows, received=None, sent=None, group=None, async_op=False):
            if rows.is_floating_point():
                mine = dist.get_rank(group)
                kept = sent[mine] * rows[0].numel() if sent else rows.numel() // group.size()
                kind = "rows" if rows.dim() == 2 and rows.shape[1] == D and self.rows_now else "weights"
                self.numbers[kind] += rows.numel() - kept
            self.calls += 1
            return exchange(out, rows, received, sent, group=group, async_op=async_op)

        def all_gather(whole, part, group=None, async_op=False):
            self.numbers["weights"] += part.numel() * (group.size() - 1)
            self.calls += 1
            return collect(whole, part, group=group, async_op=async_op)

        self.patches = [
            patch.object(dist, "all_to_all_single", all_to_all_single),
            patch.object(dist, gather, all_gather),
        ]
        self.rows_now = True
        for one in self.patches:
            one.start()
        return self

    def __exit__(self, *_):
        for one in self.patches:
            one.stop()


def counts_of(plan, experts, k):
    grid = Grid.from_group(dist.group.WORLD)
    layer = layer_on(grid, experts, EvenRouter(experts, k))
    with Counted() as counted, torch.no_grad():
        layer(torch.randn(T, D), plan=plan)
    return counted.numbers


@pytest.mark.parametrize(
    ("world", "experts", "plan"),
    [
        (4, 4, Plan()),
        (4, 4, Plan(gather=2)),
        (4, 4, Plan(gather=2, near=False)),
        (4, 8, Plan(chunks=2)),
        (4, 4, Plan(gather=4)),
        (4, 2, Plan()),
        (4, 2, Plan(gather=2)),
        (4, 2, Plan(gather=2, near=False)),
    ],
    ids=str,
)
def test_a_forward_sends_what_the_formula_says(world, experts, plan):
    k, g = 2, plan.gather
    copies = Layout(world, experts, g, plan.near).copies
    rows = 2 * T * k * copies * D * (1 - g / world)
    weights = (g - 1) * experts * (2 * F * D + F + D) / world
    for numbers in run_ranks(counts_of, world, plan, experts, k):
        assert numbers == {"rows": rows, "weights": weights}


def calls_with_and_without_a_switch():
    layer = layer_on(Grid.from_group(dist.group.WORLD))
    plans = [Plan(), Plan(gather=2), Plan(gather=4), Plan(gather=2, near=False, chunks=2)]
    parameters = [id(p) for p in layer.parameters()]
    for plan in plans:  # the first call makes the groups
        run(layer, plan)

    def calls(plan):
        with Counted() as counted:
            run(layer, plan)
        return counted.calls, dict(counted.numbers)

    torch.manual_seed(dist.get_rank())
    steady = {plan: (calls(plan), calls(plan))[1][0] for plan in plans}
    switched = {plan: calls(plan)[0] for plan in [*plans, *reversed(plans)]}
    assert steady == switched
    assert [id(p) for p in layer.parameters()] == parameters


def test_a_switch_of_plans_adds_no_collective_and_moves_no_parameter():
    run_ranks(calls_with_and_without_a_switch, 4)


def kept_after_forward(regather):
    layer, kept = layer_on(Grid.from_group(dist.group.WORLD)), []

    def watched(part, group):
        flight = collectives.all_gather(part, group)
        storage = flight._result.untyped_storage()
        kept.append((StorageWeakRef(storage), storage.nbytes()))
        return flight

    with patch.object(pool, "all_gather", watched):
        x = torch.randn(T, D, requires_grad=True)
        y = layer(x, plan=Plan(gather=2, regather=regather))
        gathered, alive = len(kept), sum(nbytes for storage, nbytes in kept if not storage.expired())
        y.sum().backward()
        return gathered, len(kept), alive, sum(not storage.expired() for storage, _ in kept)


def test_regather_keeps_no_pooled_weights_for_backward():
    for gathered, in_all, alive, after in run_ranks(kept_after_forward, 4, False):
        pooled = 2 * 4 * (2 * F * D + F + D) * 4 / 4  # g / W of four experts with their biases, in bytes
        assert (gathered, in_all, alive, after) == (4, 4, pooled, 0)
    for gathered, in_all, alive, after in run_ranks(kept_after_forward, 4, True):
        assert (gathered, in_all, alive, after) == (4, 8, 0, 0)


def host_reads(plan):
    """Count reads of tensors on the host, outside of kernels, in one training step."""
    grid = Grid.from_group(dist.group.WORLD)
    layer = layer_on(grid)
    capacity = FixedCapacity(1.0, tokens=T)
    run(layer, plan, capacity=capacity)
    with HostReads() as reads:
        run(layer, plan, capacity=capacity)
    return [one for one in reads.found if "/kernels/" not in one]


def test_an_even_wire_reads_nothing_on_the_host():
    assert all(not reads for reads in run_ranks(host_reads, 4, Plan(ragged=False, chunks=2)))
    assert all(not reads for reads in run_ranks(host_reads, 4, Plan(gather=2, ragged=False)))
    assert all(reads for reads in run_ranks(host_reads, 4, Plan()))  # the count does count


def no_permuted_copy():
    def never(*_args):
        raise AssertionError("rows were copied though no token leaves the rank")

    import dataclasses

    from synchromesh.kernels import CPU

    layer = layer_on(Grid.from_group(dist.group.WORLD), kernels=dataclasses.replace(CPU, gather=never, combine=never))
    run(layer, Plan(gather=2))


def test_tokens_that_stay_are_not_permuted():
    run_ranks(no_permuted_copy, 2)


def errors_of_float8():
    grid = Grid.from_group(dist.group.WORLD)
    exact, small = layer_on(grid, wire=AsIs()), layer_on(grid, wire=Float8())
    torch.manual_seed(grid.rank)
    x = torch.randn(T, D)
    grads = [run(layer, Plan(), x.clone().requires_grad_()) for layer in (exact, small)]
    with torch.no_grad():
        return relative_rms(small(x, plan=Plan()), exact(x, plan=Plan())), relative_rms(grads[1], grads[0])


def test_an_eight_bit_wire_is_off_by_a_few_percent_at_most():
    for error in run_ranks(errors_of_float8, 2):
        assert 0 < max(error) < 0.06


def errors_of_products(experts, k, products):
    """Compare plans with the one that moves no token, whose experts are whole."""
    layer = layer_on(Grid.from_group(dist.group.WORLD), experts, TopKRouter(D, experts, k=k))
    set_products(layer, products)
    torch.manual_seed(dist.get_rank())
    x, found = torch.randn(T, D), []
    for plan in (Plan(gather=2), Plan(), Plan(chunks=2), Plan(ragged=False)):
        layer.zero_grad()
        capacity = FixedCapacity(float(experts), tokens=T)
        x_grad = run(layer, plan, x.clone().requires_grad_(), capacity=capacity)
        with torch.no_grad():
            y = layer(x, plan=plan, capacity=capacity)
        found.append([y, x_grad, *(p.grad.clone() for p in layer.parameters())])
    return [max(map(relative_rms, one, found[0])) for one in found[1:]]


def errors_of_all_products():
    both = (Float8Products(), MXFloat8Products())
    return [max(max(errors_of_products(*sizes, p)) for p in both) for sizes in ((4, 2), (1, 1))]


def test_products_of_8_bit_numbers_are_the_same_under_every_plan():
    """A shard of an expert may have other scales, all powers of two: that moves numbers far below the largest only."""
    for whole, shards in run_ranks(errors_of_all_products, 2):
        assert whole < 1e-5
        assert shards < 1e-3


def bytes_of_autocast():
    layer = layer_on(Grid.from_group(dist.group.WORLD))
    dtypes = set()
    original = dist.all_to_all_single

    def noted(out, rows, *args, **kwargs):
        dtypes.add(rows.dtype)
        return original(out, rows, *args, **kwargs)

    with patch.object(dist, "all_to_all_single", noted), torch.autocast("cpu", dtype=torch.bfloat16):
        run(layer, Plan(gather=2))
    assert all(p.grad.dtype == torch.float32 for p in layer.experts.parameters())
    return dtypes


def test_under_autocast_rows_and_weight_gradients_travel_in_bfloat16():
    for dtypes in run_ranks(bytes_of_autocast, 4):
        assert dtypes == {torch.int64, torch.bfloat16}


def modules_over_ranks():
    grid = Grid.from_group(dist.group.WORLD)
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D)) for _ in range(4)]
    router = TopKRouter(D, 4, k=2)
    whole = MoE(router, ModuleExperts(modules))
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(grid.rank))
    wanted = whole(x).detach()
    layer = MoE(router, ModuleExperts(modules), strategy=Sharded(grid))
    y = layer(x)
    assert relative_rms(y, wanted) < 1e-6
    y.sum().backward()
    assert len(list(layer.experts.parameters())) == 8  # two modules of two linear layers
    with pytest.raises(ValueError, match="move whole"):
        layer(x, plan=Plan(gather=2))
    return True


def adaptive_modules():
    """Trials must never choose what modules cannot do."""
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, 4), ModuleExperts([nn.Linear(D, D) for _ in range(4)]))
    run = parallelize(layer, Grid.from_group(dist.group.WORLD))
    for _ in range(12):
        run(torch.randn(T, D)).sum().backward()
    return {plan.gather for _, plan in layer.strategy.record}


def test_modules_find_plans_among_those_that_do_not_pool():
    assert run_ranks(adaptive_modules, 2) == [{1}] * 2


def test_modules_as_experts_move_whole():
    assert run_ranks(modules_over_ranks, 2) == [True, True]


def stats_of_each_rank():
    layer = layer_on(Grid.from_group(dist.group.WORLD))
    run(layer, Plan(gather=2, chunks=2))
    return load_stats(layer)[""].plan


def test_the_plan_of_a_forward_is_in_its_load_stats():
    assert run_ranks(stats_of_each_rank, 4) == [Plan(gather=2, chunks=2)] * 4


def listed(ranks_per_node):
    strategy = Sharded(Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node))
    work = Workload(T, 2, D, F, 4, torch.float32, True)
    return {str(plan): reason for plan, reason in strategy.legal_plans(work, Dropless()).items()}


def test_every_refused_plan_has_its_reason():
    plans = run_ranks(listed, 4, 2)[0]
    assert plans["g=1"] is plans["g=1, two-level"] is plans["g=2, 4 chunks, regather"] is plans["g=4"] is None
    assert "even wire wants" in plans["g=1, even wire"]
    assert "no rows are exchanged" in plans["g=4, 2 chunks"]
    assert "gathered again" in plans["g=1, regather"]
    assert "one plan" in plans["g=4 far"]
    assert "each is alone" in plans["g=2, two-level"]
    assert "on one node" in plans["g=2 far, two-level"]


@pytest.mark.parametrize(("experts", "ranks_per_node"), [(12, 6), (12, 3), (12, 4), (6, 6), (4, 4)])
def test_all_ranks_refuse_the_same_plans(experts, ranks_per_node):
    grid = Grid(None)
    grid.size, grid.ranks_per_node = 12, ranks_per_node
    work = Workload(T, 2, D, F, experts, torch.float32, True)
    reasons = []
    for grid.rank in range(12):
        reasons.append(Sharded(grid).legal_plans(work, FixedCapacity(1.0, tokens=T)))
    assert all(own == reasons[0] for own in reasons)
    assert None in reasons[0].values()


def chooses_what_cannot_run():
    layer = layer_on(Grid.from_group(dist.group.WORLD), plan=Plan(ragged=False))
    with pytest.raises(ValueError, match="even wire wants"):
        layer(torch.randn(T, D), capacity=FixedCapacity(1.0))
    return layer(torch.randn(T, D), capacity=FixedCapacity(1.0, tokens=T)).shape


def test_a_strategys_own_plan_is_checked_too():
    assert run_ranks(chooses_what_cannot_run, 2) == [(T, D)] * 2


def deep_copies():
    import copy

    layer = layer_on(Grid.from_group(dist.group.WORLD))
    run(layer, Plan())
    twin = copy.deepcopy(layer)
    x = torch.randn(T, D)
    return torch.equal(twin(x), layer(x))


def test_a_copy_of_a_layer_runs_on_the_same_ranks():
    assert run_ranks(deep_copies, 2) == [True, True]


def test_reference_kernels_give_the_same_on_ranks():
    assert all(error < 1e-5 for error in run_ranks(with_reference, 2))


def with_reference():
    grid = Grid.from_group(dist.group.WORLD)
    torch.manual_seed(5)
    x = torch.randn(T, D)
    return relative_rms(layer_on(grid, kernels=REFERENCE)(x), layer_on(grid)(x))
