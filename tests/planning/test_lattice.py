"""Which plans can run, over every number of ranks and experts, without any rank."""

from functools import partial

import pytest

from synchromesh.parallel.layout import Layout
from synchromesh.planning.lattice import Ranks, check_sizes, every_plan, layout_refusal, refusal, two_level_refusal
from synchromesh.testing.calls import count_calls
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


@pytest.mark.parametrize(
    ("world", "experts", "gather", "near", "says"),
    [
        (6, 6, 4, True, "does not divide"),
        (6, 6, 6, False, "one plan"),
        (6, 3, 3, True, "shards"),
        (12, 4, 2, True, "shards"),
    ],
)
def test_a_refused_layout_says_why(world, experts, gather, near, says):
    assert says in str(layout_refusal(world, experts, gather, near=near))


def test_experts_that_do_not_fit_the_ranks_are_refused_with_numbers_that_do():
    with pytest.raises(ValueError, match="take 4 or 8 experts"):
        check_sizes(4, 6)


def test_ranks_per_node_that_do_not_divide_the_world_are_refused():
    with pytest.raises(ValueError, match="wanted a divisor"):
        Ranks(6, 4)


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ((0, 0), "on one node"),
        ((0, 1), "alone"),
        ((0, 0, 1), "evenly"),
        ((1, 1, 0, 0), "evenly"),
        ((0, 0, 1, 1), None),
    ],
)
def test_two_levels_are_refused_where_nodes_do_not_share_the_ranks_evenly(nodes, says):
    reason = two_level_refusal(nodes)
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(("world", "per_node"), [(8, 4), (8, 2), (12, 4), (12, 6), (12, 3), (12, 1), (12, 12), (24, 4)])
def test_two_levels_are_judged_by_every_exchange_group(world, per_node):
    for plan in every_plan(world):
        if not plan.two_level or plan.chunks > 1 or plan.regather or not plan.ragged or plan.gather == world:
            continue
        if layout_refusal(world, world, plan.gather, near=plan.near) is not None:
            continue
        layout = Layout(world, world, plan.gather, plan.near)
        groups = [[rank // per_node for rank in layout.exchange_group(r)] for r in range(world)]
        reasons = [two_level_refusal(group) for group in groups]
        got = refusal(plan, Ranks(world, per_node), world, known_beforehand=True)
        assert (got is None) == all(reason is None for reason in reasons), plan


def calls_of_all_plans():
    reasons = []
    judge = partial(refusal, ranks=Ranks(65536, 8), num_experts=64, known_beforehand=False)
    calls = count_calls(lambda: reasons.extend(judge(plan) for plan in every_plan(65536)))
    return reasons.count(None), calls


def test_the_plans_of_65536_ranks_are_judged_in_few_calls():
    ((legal, calls),) = run_ranks(calls_of_all_plans, 1)
    assert legal > 100
    assert calls < 20_000
    assert refusal(Plan(two_level=True), Ranks(65536, 8), 65536, known_beforehand=False) is None
