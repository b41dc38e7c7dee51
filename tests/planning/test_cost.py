import dataclasses

import pytest
import torch

from synchromesh.planning.cluster import Curve, Link, load_profile
from synchromesh.planning.cost import forward_and_backward, load_of_busiest, step_seconds
from synchromesh.planning.lattice import Ranks, every_plan, refusal
from synchromesh.planning.search import predicted, short_list
from synchromesh.testing.calls import count_calls
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan, Workload

A100, H100 = load_profile("a100_hdr"), load_profile("h100_ndr")
WORK = Workload(16384, 2, 2048, 2048, 64, torch.float16, True)
RANKS = Ranks(64, 8)


def faster_network(factor):
    message = Curve(tuple((size, seconds / factor) for size, seconds in A100.network.message.points))
    return dataclasses.replace(A100, network=Link(A100.network.start / factor, message))


def legal(ranks, work):
    plans = every_plan(ranks.size)
    return [p for p in plans if refusal(p, ranks, work.experts, known_beforehand=False) is None and not p.regather]


def test_one_rank_sends_nothing():
    forward, backward = forward_and_backward(WORK, Plan(), Ranks(1, 1), A100)
    assert forward.exchange == forward.gather == forward.exposed == backward.exposed == 0
    assert backward.matmul == pytest.approx(2 * forward.matmul)


def test_inference_has_no_backward():
    _, backward = forward_and_backward(dataclasses.replace(WORK, training=False), Plan(), RANKS, A100)
    assert backward.total == 0


@pytest.mark.parametrize("plan", legal(RANKS, WORK), ids=str)
def test_the_parts_are_the_whole_and_a_faster_network_is_never_slower(plan):
    forward, backward = forward_and_backward(WORK, plan, RANKS, A100)
    for one in (forward, backward):
        assert min(dataclasses.astuple(one)) >= 0
        assert one.total == pytest.approx(one.route + one.permute + one.matmul + one.exposed)
    assert step_seconds(WORK, plan, RANKS, faster_network(4)) <= step_seconds(WORK, plan, RANKS, A100)


def test_nothing_waits_for_more_than_all_that_travels_one_after_the_other():
    for plan in legal(RANKS, WORK):
        for one in forward_and_backward(WORK, plan, RANKS, dataclasses.replace(A100, slowed=(1.0, 1.0))):
            assert one.exposed <= (one.exchange + one.gather) * (1 + 1e-9)


def test_pieces_hide_the_exchange_behind_compute_of_equal_length():
    long = dataclasses.replace(WORK, hidden=8192)
    plain, pieces = (step_seconds(long, Plan(chunks=chunks), Ranks(16, 8), H100) for chunks in (1, 4))
    assert pieces < 0.95 * plain


def test_pieces_do_not_pay_where_messages_are_small():
    few = dataclasses.replace(WORK, rows=64)
    assert step_seconds(few, Plan(), RANKS, A100) < step_seconds(few, Plan(chunks=8), RANKS, A100)


def test_two_levels_pay_where_messages_are_many_and_small_and_not_where_few_are_large():
    ranks, work = Ranks(2048, 8), dataclasses.replace(WORK, experts=2048)
    assert step_seconds(work, Plan(two_level=True), ranks, A100) < step_seconds(work, Plan(), ranks, A100) / 2
    few = Ranks(16, 8)
    assert step_seconds(WORK, Plan(two_level=True), few, H100) > step_seconds(WORK, Plan(), few, H100)


def crowded(cores, busy):
    links = [dataclasses.replace(link, busy=busy) for link in (A100.node, A100.across)]
    return dataclasses.replace(A100, cores=cores, node=links[0], network=links[1])


@pytest.mark.parametrize("plan", [Plan(), Plan(chunks=4), Plan(gather=8, chunks=2), Plan(gather=64)], ids=str)
def test_ranks_that_are_more_than_cores_take_turns(plan):
    """Two ranks on a core: work takes twice as long, and what an exchange does on cores hides behind nothing."""
    work = dataclasses.replace(WORK, rows=1024)
    free = forward_and_backward(work, plan, RANKS, A100)
    assert forward_and_backward(work, plan, RANKS, crowded(1.0, 0.7)) == free
    for busy in (0.0, 0.5, 1.0):
        longer = max(1.0, 2 * busy)
        for own, before in zip(forward_and_backward(work, plan, RANKS, crowded(0.5, busy)), free, strict=True):
            for name in ("route", "permute", "matmul"):
                assert getattr(own, name) == pytest.approx(2 * getattr(before, name))
            assert own.exchange == pytest.approx(longer * before.exchange)
            assert own.gather == pytest.approx(longer * before.gather)
            cores = 2 * busy * (before.exchange + before.gather)
            assert own.exposed >= cores * (1 - 1e-9)
            one_after_the_other = before.total - before.exposed + before.exchange + before.gather
            assert own.total <= 2 * 1.1 * one_after_the_other  # 1.1: products and messages slow one another down


def test_more_tokens_make_the_best_plan_pool_more_weights():
    """The paper's figure 12: as the capacity grows, r falls from W/E to 0."""
    work = Workload(0, 1, 2048, 32768, 16, torch.float16, True)
    degrees = []
    for power in range(4, 20, 3):
        best = predicted(dataclasses.replace(work, rows=1 << power), RANKS, A100)[0]
        degrees.append(best.plan.gather)
    assert degrees[0] == 1
    assert degrees[-1] == RANKS.size
    assert all(1 < degree < RANKS.size for degree in degrees[2:-1])


def test_skew_is_evened_out_by_pooling():
    hot = dataclasses.replace(WORK, skew=3)
    loads = [load_of_busiest(hot, Plan(gather=g), RANKS) for g in (1, 2, 8, 64)]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] == 8
    assert loads[-1] == 1
    assert load_of_busiest(WORK, Plan(), RANKS) == 1


def calls_of_a_plan():
    plans = legal(RANKS, WORK)
    return count_calls(lambda: [step_seconds(WORK, plan, RANKS, A100) for plan in plans]) / len(plans)


def test_a_plan_is_judged_in_few_calls():
    """So thousands are judged in a second."""
    (calls,) = run_ranks(calls_of_a_plan, 1)
    assert calls < 400


def test_a_short_list_holds_unlike_plans_and_the_best():
    candidates = predicted(WORK, RANKS, A100)
    chosen = short_list(candidates)
    assert chosen[0] == candidates[0]
    assert len(chosen) <= 6
    assert len({(one.plan.gather, one.plan.near) for one in chosen}) >= 3
    assert not any(one.plan.regather for one in candidates)
