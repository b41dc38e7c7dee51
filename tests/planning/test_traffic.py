"""The collectives of a real step, traced on 2,048 ranks that are not there, against what the cost model counts."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from synchromesh import FixedCapacity, GatedMLPExperts, Grid, MLPExperts, MoE, Plan, Sharded
from synchromesh.parallel.comm import collectives
from synchromesh.planning.lattice import Ranks, refusal
from synchromesh.planning.traffic import traffic
from synchromesh.testing.cases import EvenRouter
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Workload

D, F = 8, 16


class Done(dist.Work):
    def wait(self, timeout=None):
        return True


class Trace:
    """Notes each collective and pretends that all ranks sent what this one did."""

    def __init__(self):
        self.calls = Counter()

    def all_to_all(self, out, rows, received=None, sent=None, group=None, async_op=False):
        self.calls["all_to_all", group.size(), rows.nbytes / group.size()] += 1
        out.copy_(rows)
        return Done()

    def all_gather(self, whole, part, group=None, async_op=False):
        self.calls["all_gather", group.size(), part.nbytes] += 1
        whole.view(group.size(), *part.shape).copy_(part.expand(group.size(), *part.shape))
        return Done()

    def reduce_scatter(self, part, whole, group=None, async_op=False):
        self.calls["reduce_scatter", group.size(), part.nbytes] += 1
        part.copy_(whole.view(group.size(), *part.shape).sum(0))
        return Done()

    def __enter__(self):
        names = {"all_to_all_single": self.all_to_all}
        for kind, run in (("all_gather", self.all_gather), ("reduce_scatter", self.reduce_scatter)):
            for name in (f"{kind}_single", f"{kind}_into_tensor", f"{kind}_tensor"):
                if hasattr(dist, name):
                    names[name] = run
        self._patches = [patch.object(collectives.dist, name, run) for name, run in names.items()]
        for one in self._patches:
            one.start()
        return self.calls

    def __exit__(self, *_):
        for one in self._patches:
            one.stop()


def expected(work, plan, ranks):
    """Return the calls of a forward and its backward."""
    sent, calls = traffic(work, plan, ranks), Counter()
    for one in sent.counts:
        calls[one.kind, one.group.size, one.size] += 1
    for one in sent.there:
        calls[one.kind, one.group.size, one.size] += 4 * sent.chunks
    for one in sent.gather:
        calls[one.kind, one.group.size, one.size] += 2 if plan.regather else 1
        calls["reduce_scatter", one.group.size, one.size] += 1
    return calls


@pytest.fixture
def world_of_2048():
    dist.init_process_group("fake", rank=0, world_size=2048, store=FakeStore())
    yield Grid.from_group(dist.group.WORLD, ranks_per_node=8)
    dist.destroy_process_group()


PLANS = (
    Plan(),
    Plan(chunks=2),
    Plan(two_level=True),
    Plan(ragged=False, chunks=2),
    Plan(gather=8),
    Plan(gather=8, regather=True),
    Plan(gather=16, near=False, chunks=4),
    Plan(gather=256, near=False),
    Plan(gather=4, two_level=True),
    Plan(gather=2048),
    Plan(gather=2048, regather=True),
)
LEGAL = [
    (experts, plan)
    for experts in (2048, 512)
    for plan in PLANS
    if refusal(plan, Ranks(2048, 8), experts, known_beforehand=True) is None
]


@pytest.mark.parametrize(("experts", "plan"), LEGAL, ids=str)
def test_the_collectives_of_a_step_on_2048_ranks_are_those_of_the_cost_model(world_of_2048, experts, plan):
    grid, tokens, k = world_of_2048, 4 * experts, 2
    layer = MoE(EvenRouter(experts, k), MLPExperts(experts, D, hidden=F), strategy=Sharded(grid))
    x = torch.randn(tokens, D, requires_grad=True)
    capacity = FixedCapacity(1.0, tokens=tokens)
    known = capacity.rows_per_expert(tokens=tokens, choices=k, experts=experts)
    work = Workload(tokens, k, D, F, experts, torch.float32, True, capacity=known, vectors=layer.experts.vectors)
    with Trace() as calls:
        layer(x, plan=plan, capacity=capacity).sum().backward()
    assert calls == expected(work, plan, grid.ranks)


def traced(plan, experts, ranks_per_node):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    layer = MoE(EvenRouter(experts, 2), GatedMLPExperts(experts, D, hidden=F, bias=True), strategy=Sharded(grid))
    assert layer.experts.vectors == (F, F, D)
    tokens = 32
    work = Workload(tokens, 2, D, F, experts, torch.float32, True, matrices=3, vectors=layer.experts.vectors)
    sizes, original = Counter(), dist.all_to_all_single
    layer(torch.randn(tokens, D, requires_grad=True), plan=plan).sum().backward()  # makes the groups

    def noted(out, rows, received=None, sent=None, group=None, async_op=False):
        sizes[group.size(), rows.nbytes / group.size()] += 1
        return original(out, rows, received, sent, group=group, async_op=async_op)

    with patch.object(dist, "all_to_all_single", noted):
        layer(torch.randn(tokens, D, requires_grad=True), plan=plan).sum().backward()
    return sizes, work


def traced_all(experts):
    plans = [Plan(), Plan(gather=2), Plan(gather=2, near=False, chunks=2), Plan(two_level=True)]
    return {plan: traced(plan, experts, 2) for plan in plans}


@pytest.mark.parametrize("experts", [8, 2])
def test_real_ranks_over_gloo_send_what_the_cost_model_counts(experts):
    for found in run_ranks(traced_all, 4, experts):
        for plan, (sizes, work) in found.items():
            wanted = Counter()
            for (kind, size, each), count in expected(work, plan, Ranks(4, 2)).items():
                if kind != "all_gather":  # gloo sums a reduce-scatter from an all-to-all
                    wanted[size, each] += count
            assert sizes == wanted, plan


@pytest.mark.parametrize(
    ("plan", "near", "crossing", "ring"),
    [
        (Plan(), 3, 16, 0),  # all to all of 8: 4 ranks of a node send to 4 elsewhere
        (Plan(gather=2), 1, 8, 0),  # every second rank
        (Plan(gather=2, near=False), 3, 0, 4),  # exchange in the node, gather across
        (Plan(gather=8), 0, 0, 1),  # one ring through both nodes
    ],
)
def test_what_leaves_a_node_of_two(plan, near, crossing, ring):
    work = Workload(64, 1, D, F, 8, torch.float32, True)
    sent = traffic(work, plan, Ranks(8, 4))
    if sent.there:
        assert (sent.there[0].group.near, sent.there[0].group.crossing) == (near, crossing)
    if sent.gather:
        assert sent.gather[0].group.ring == ring
    far = Ranks(8, 8)
    assert traffic(work, plan, far).leaving_a_node("nccl") == 0
