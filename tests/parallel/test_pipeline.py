"""The exchange of one piece runs under the compute of another, by durations and by time stamps."""

import time
from unittest.mock import patch

import torch
import torch.distributed as dist

from synchromesh import Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter, load_stats
from synchromesh.parallel.comm import all_to_all, collectives
from synchromesh.testing.distributed import run_ranks

D, F, T = 8, 16, 24


class Late:
    """What arrives a while after it was sent, as over a slow link; notes from when to when it was on its way."""

    def __init__(self, flight, delay, sent):
        self.flight, self.start, self.sent = flight, time.monotonic(), sent
        self.due = self.start + delay

    def wait(self):
        result = self.flight.wait()
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.sent.append((self.start, self.due))
        return result


class SlowExperts(MLPExperts):
    def compute(self, rows, ends, weights, kernels):
        return Slow.apply(super().compute(rows, ends, weights, kernels), self)

    def work(self):
        start = time.monotonic()
        time.sleep(self.delay)
        self.worked.append((start, time.monotonic()))


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


def timed(run, sent, worked):
    sent.clear()
    worked.clear()
    start = time.monotonic()
    result = run()
    return result, time.monotonic() - start, overlap(sent, worked)


def step_seconds(chunks, exchange, compute, ranks_per_node=None):
    """Return the duration of forward and backward, and for how long rows travelled while experts worked.

    Where there are nodes the exchange has two levels, and only what crosses the network is late.
    """
    torch.manual_seed(0)
    experts = SlowExperts(4, D, hidden=F)
    experts.delay, experts.worked = compute / chunks, []
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    layer = MoE(TopKRouter(D, 4, k=2), experts, strategy=Sharded(grid))
    sent = []

    def late(rows, group, *sizes):
        flight = collectives.all_to_all(rows, group, *sizes)
        crosses = len({grid.node_of(rank) for rank in dist.get_process_group_ranks(group)}) > 1 or grid.nodes == 1
        return Late(flight, exchange / chunks, sent) if crosses and rows.is_floating_point() else flight

    plan = Plan(chunks=chunks, two_level=ranks_per_node is not None)
    layer(torch.randn(T, D), plan=plan).sum().backward()
    load_stats(layer)
    with patch.object(all_to_all, "all_to_all", late):
        x = torch.randn(T, D, requires_grad=True)
        y, *forward = timed(lambda: layer(x, plan=plan), sent, experts.worked)
        _, *backward = timed(y.sum().backward, sent, experts.worked)
    return *forward, *backward, load_stats(layer)[""].exposed_communication


def test_pieces_are_exchanged_under_the_compute_of_others_in_forward_and_in_backward():
    """Two exchanges of 0.4 s and 0.4 s of compute: 1.2 s one after the other; 4 pieces overlap all but the ends.

    By time stamps too: rows are on their way during at least three of the four pieces' 0.1 s of compute.
    """
    slow = run_ranks(step_seconds, 2, 1, 0.4, 0.4)
    for forward, forward_overlap, backward, backward_overlap, waited in slow:
        assert min(forward, backward) >= 1.2
        assert max(forward_overlap, backward_overlap) < 0.01
        assert 0.75 < waited < 1  # in forward
    for forward, forward_overlap, backward, backward_overlap, waited in run_ranks(step_seconds, 2, 4, 0.4, 0.4):
        assert max(forward, backward) <= 0.75
        assert waited < 0.35
        assert min(forward_overlap, backward_overlap) >= 0.28


def test_the_second_level_of_an_exchange_too_runs_under_the_compute_of_other_pieces():
    for forward, forward_overlap, backward, backward_overlap, _ in run_ranks(step_seconds, 4, 4, 0.4, 0.4, 2):
        assert max(forward, backward) <= 0.8  # 0.9 where a piece is sent on only when it is wanted
        assert min(forward_overlap, backward_overlap) >= 0.28
