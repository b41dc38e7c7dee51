"""The exchange of one piece runs under the compute of another, by a clock on which only links and experts take time."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from synchromesh import Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter, load_stats
from synchromesh.parallel import waiting
from synchromesh.parallel.comm import all_to_all, collectives
from synchromesh.testing.distributed import run_ranks

D, F, T = 8, 16, 24


class Now:
    """What a rank's clock says."""

    def __init__(self):
        self.seconds = 0.0

    def until(self, moment):
        self.seconds = max(self.seconds, moment)


class Late:
    """What arrives a while after it was sent, as over a slow link; notes from when to when it was on its way."""

    def __init__(self, flight, delay, now, sent):
        self.flight, self.now, self.start, self.sent = flight, now, now.seconds, sent
        self.due = self.start + delay

    def wait(self):
        result = self.flight.wait()
        self.now.until(self.due)
        self.sent.append((self.start, self.due))
        return result


class SlowExperts(MLPExperts):
    def compute(self, rows, ends, weights, kernels):
        return Slow.apply(super().compute(rows, ends, weights, kernels), self)

    def mlp(self, weights):
        return None  # no fused kernel, which would run past `compute`

    def work(self):
        start = self.now.seconds
        self.now.until(start + self.delay)
        self.worked.append((start, self.now.seconds))


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, experts):
        ctx.experts = experts
        experts.work()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.experts.work()
        return grad, None


def overlap(one, other):
    """Return the seconds during which something of both went on."""
    both = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    covered, until = 0.0, 0.0
    for start, end in sorted(both):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def timed(run, now, sent, worked):
    sent.clear()
    worked.clear()
    start = now.seconds
    result = run()
    return result, now.seconds - start, overlap(sent, worked)


def step_seconds(chunks, exchange, compute, ranks_per_node=None, deduplicate=False):
    """Return the duration of forward and backward, and for how long rows travelled while experts worked.

    Where there are nodes the exchange has two levels, and only what crosses the network is late.
    """
    torch.manual_seed(0)
    experts, now = SlowExperts(4, D, hidden=F), Now()
    experts.delay, experts.worked, experts.now = compute / chunks, [], now
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    layer = MoE(TopKRouter(D, 4, k=2), experts, strategy=Sharded(grid))
    sent = []

    def late(rows, group, *sizes):
        flight = collectives.all_to_all(rows, group, *sizes)
        crosses = len({grid.node_of(rank) for rank in dist.get_process_group_ranks(group)}) > 1 or grid.nodes == 1
        return Late(flight, exchange / chunks, now, sent) if crosses and rows.is_floating_point() else flight

    plan = Plan(chunks=chunks, two_level=ranks_per_node is not None, deduplicate=deduplicate)
    with patch.object(waiting, "time", SimpleNamespace(perf_counter=lambda: now.seconds)):
        layer(torch.randn(T, D), plan=plan).sum().backward()
        load_stats(layer)
        with patch.object(all_to_all, "all_to_all", late):
            x = torch.randn(T, D, requires_grad=True)
            y, *forward = timed(lambda: layer(x, plan=plan), now, sent, experts.worked)
            _, *backward = timed(y.sum().backward, now, sent, experts.worked)
    return *forward, *backward, load_stats(layer)[""].exposed_communication


@pytest.mark.parametrize("deduplicate", [False, True])
def test_pieces_are_exchanged_under_the_compute_of_others_in_forward_and_in_backward(deduplicate):
    """Two exchanges of 0.4 s and 0.4 s of compute: 1.2 s one after the other; 4 pieces overlap all but the ends.

    Those are the exchange before the first piece and the one after the last: rows are on their way during the rest.
    """
    for forward, forward_overlap, backward, backward_overlap, waited in run_ranks(
        step_seconds, 2, 1, 0.4, 0.4, None, deduplicate
    ):
        assert (forward, backward) == pytest.approx((1.2, 1.2))
        assert forward_overlap == backward_overlap == 0
        assert waited == pytest.approx(0.8)  # in forward
    for forward, forward_overlap, backward, backward_overlap, waited in run_ranks(
        step_seconds, 2, 4, 0.4, 0.4, None, deduplicate
    ):
        assert (forward, backward) == pytest.approx((0.6, 0.6))
        assert (forward_overlap, backward_overlap) == pytest.approx((0.3, 0.3))
        assert waited == pytest.approx(0.2)


@pytest.mark.parametrize(("deduplicate", "least"), [(False, 0.29), (True, 0.19)])
def test_both_levels_of_an_exchange_run_under_the_compute_of_other_pieces(deduplicate, least):
    """It takes 0.9 s where a piece is sent on only when it is wanted.

    Deduplicated sums cross the network last, when they are added up: those of a piece after the next one's compute.
    """
    found = run_ranks(step_seconds, 4, 4, 0.4, 0.4, 2, deduplicate)
    for forward, forward_overlap, backward, backward_overlap, _ in found:
        assert (forward, backward) == pytest.approx((0.6, 0.6))
        assert min(forward_overlap, backward_overlap) > least
