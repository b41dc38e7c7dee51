import dataclasses

import pytest
import torch

from synchromesh.planning.cluster import load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.memory import layer_bytes
from synchromesh.planning.planner import plan_model, worlds
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.testing.calls import count_calls
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan, Workload

A100 = load_profile("a100_hdr")
WORK = Workload(0, 2, 4096, 14336, 8, torch.bfloat16, True, matrices=3)


def model(work=WORK, *, count=32, tokens=4096):
    kind = LayerKind("experts", count, tokens, work)
    return ModelShape("model", "sequence", (kind,), 2e12, 2e9, 5e8, (0.5, 0.4), "assumed")


def test_a_model_that_does_not_fit_says_by_how_much_and_one_that_does_says_nothing():
    small = plan_model(model(), A100, Ranks(8, 8), batch=1, training=True)
    assert "GB a rank, the device has 80" in str(small.refused)
    assert any("does not fit" in remark for remark in small.remarks())
    large = plan_model(model(), A100, Ranks(64, 8), batch=1, training=True, sharded=True)
    assert large.refused is None
    assert large.memory <= 0.92 * 80e9


def test_where_weights_are_cheaper_to_move_than_tokens_it_says_data_parallel():
    work = dataclasses.replace(WORK, width=256, hidden=64, matrices=2)
    planned = plan_model(model(work, count=1, tokens=1 << 20), A100, Ranks(16, 8), batch=1, training=True)
    assert planned.layers[0].plan.gather == 16
    assert any("data parallel" in remark for remark in planned.remarks())


def test_where_pieces_would_cost_more_than_they_hide_it_says_do_not_overlap():
    planned = plan_model(model(tokens=8, count=1), A100, Ranks(16, 8), batch=1, training=False)
    assert any("do not overlap" in remark for remark in planned.remarks())


def test_the_best_plan_is_never_slower_than_the_static_one():
    for size in (1, 8, 64, 512):
        planned = plan_model(model(), A100, Ranks(size, min(size, 8)), batch=1, training=True, sharded=True)
        if planned.refused is None and planned.static is not None:
            assert planned.seconds <= planned.static * (1 + 1e-9)
        assert 0 < planned.efficiency <= 1.05  # a little over 1: one device alone reads the weights of all experts


def calls_of_a_large_job():
    found = []

    def plan():
        found.append(plan_model(model(), A100, Ranks(16384, 8), batch=1, training=True, sharded=True))

    return count_calls(plan), found[0].refused


def test_plans_for_16384_devices_are_found_in_few_calls():
    ((calls, refused),) = run_ranks(calls_of_a_large_job, 1)
    assert refused is None
    assert calls < 500_000  # half a second: nine sizes of grids are compared


def test_worlds_double_up_to_the_last():
    assert list(worlds(8, 64)) == [8, 16, 32, 64]
    assert list(worlds(6, 30)) == [6, 12, 24]
    assert list(worlds(4, 4)) == [4]


@pytest.mark.parametrize("experts", [4, 16])
def test_pooled_weights_take_g_parts_and_none_where_they_are_gathered_again(experts):
    work = dataclasses.replace(WORK, rows=128, experts=experts)
    part = experts * 3 * 4096 * 14336 * 2 / 16
    for gather in (4, 16):
        assert layer_bytes(work, Plan(gather=gather), Ranks(16, 8)).gathered == gather * part
        assert layer_bytes(work, Plan(gather=gather, regather=True), Ranks(16, 8)).gathered == 0
    assert layer_bytes(work, Plan(gather=4), Ranks(16, 8)).weights == 2 * part


def test_ranks_that_fill_no_nodes_are_said_with_numbers_that_do():
    planned = plan_model(model(), A100, Ranks(100, 5), batch=1, training=True)
    said = "20 nodes with 5 ranks each, as they fill no nodes of 8 evenly; 96 or 104 ranks do"
    assert planned.remarks().count(said) == 1
    for ranks in (Ranks(24, 8), Ranks(7, 7), Ranks(4, 4)):
        other = plan_model(model(), A100, ranks, batch=1, training=True)
        assert not any("fill no nodes" in remark for remark in other.remarks())
