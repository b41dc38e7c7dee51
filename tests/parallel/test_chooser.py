"""A chooser of one's own says by which plan each forward runs, and is asked as often as it should be."""

import torch
import torch.distributed as dist

from synchromesh import Chooser, Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter, Tuned
from synchromesh.parallel.clock import UNTIMED, Clock
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, E = 8, 4


class InTurn(Chooser):
    """Runs every plan that can run, one after the other, and times each forward."""

    def __init__(self, plans):
        self.plans, self.asked, self.clocks = list(plans), [], []

    def choose(self, workload, usual, refusal):
        legal = [plan for plan in self.plans if refusal(plan) is None]
        self.asked.append(legal[len(self.asked) % len(legal)])
        self.clocks.append(Clock())
        return self.asked[-1]

    def take_clock(self, plan):
        clock, self.clocks[-1] = self.clocks[-1], UNTIMED
        self.timed = clock
        return clock


def layer_with(strategy):
    torch.manual_seed(0)
    return MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), strategy=strategy).double()


def every_plan_in_turn():
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    chooser = InTurn(Sharded(grid).plans())
    layer, fixed = layer_with(Sharded(grid, chooser=chooser)), layer_with(Sharded(grid))
    torch.manual_seed(grid.rank)
    for _ in range(12):
        x = torch.randn(6, D, dtype=torch.float64)
        y = layer(x)
        assert_close("y", y, fixed(x))
        assert chooser.timed.ready(wait=False, backward=False)
        assert not chooser.timed.ready(wait=False)
        y.sum().backward()
        assert chooser.timed.ready(wait=False)
        assert min(chooser.timed.seconds()) > 0
    layer(x, plan=Plan())  # names its own: nobody is asked
    return [str(plan) for plan in chooser.asked]


def test_the_plans_of_a_chooser_run_and_are_timed():
    asked = run_ranks(every_plan_in_turn, 4)
    assert asked == [asked[0]] * 4
    assert len(asked[0]) == len(set(asked[0])) == 12


def recomputed():
    grid = Grid.from_group(dist.group.WORLD)
    chooser = InTurn([Plan(gather=2), Plan()])
    layer = layer_with(Sharded(grid, chooser=chooser))
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert chooser.timed is UNTIMED  # the recomputation's
    return len(chooser.asked)


def test_a_recomputation_asks_nobody_and_is_not_timed():
    assert run_ranks(recomputed, 2) == [1, 1]


def test_one_rank_asks_nobody():
    chooser = InTurn([])
    layer_with(Sharded(Grid(None), chooser=chooser))(torch.randn(3, D, dtype=torch.float64))
    assert chooser.asked == []


def stale_clocks():
    """A clock made for one plan does not time another."""
    tuned = Tuned(Grid.from_group(dist.group.WORLD))
    layer = layer_with(Sharded(tuned.grid, chooser=tuned))
    for _ in range(3):  # agreed on after the first
        layer(torch.randn(6, D, dtype=torch.float64)).sum().backward()
    plan = layer.strategy.choose(layer_work(), layer.capacity)
    other = Plan(gather=2) if plan != Plan(gather=2) else Plan()
    return tuned.take_clock(other) is UNTIMED, tuned.take_clock(plan) is UNTIMED


def layer_work():
    from synchromesh.types import Workload

    return Workload(6, 2, D, 16, E, torch.float64, training=True, matrices=2, vectors=(16, D))


def test_a_forward_that_was_given_up_lends_its_clock_to_no_other():
    assert run_ranks(stale_clocks, 2) == [(True, True)] * 2
