"""What a reason says is checked against the cost model by brute force, over clusters and models drawn at random."""

import dataclasses
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.planning.cluster import Curve, Link, load_profile
from synchromesh.planning.cost import forward_and_backward
from synchromesh.planning.lattice import Ranks, every_plan, refusal
from synchromesh.planning.memory import layer_bytes
from synchromesh.planning.planner import USABLE_MEMORY, plan_model
from synchromesh.planning.reasons import (
    DataParallel,
    ForMemory,
    Nested,
    NothingFits,
    OnePiece,
    Option,
    Pieces,
    chosen_for,
)
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

A100 = load_profile("a100_hdr")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


RATES = st.tuples(*[st.floats(8.0, 11.5)] * 3)  # powers of ten: bytes per second of links, bytes of memory
FIXED = st.tuples(*[st.floats(-6.0, -3.5)] * 3)  # seconds
SIZES = st.tuples(*[st.integers(6, 13)] * 3)  # powers of two: tokens, width, hidden
EXPERTS, CHOICES, COUNTS = st.sampled_from((2, 4, 6, 8, 16)), st.sampled_from((1, 2)), st.sampled_from((1, 5))


def cluster(rates, fixed, backend):
    """A cluster whose links, memory and fixed times are anywhere."""
    node, network = (
        Link(10**start, Curve.line(seconds=1e-6, rate=10**rate))
        for start, rate in zip(fixed[:2], rates[:2], strict=True)
    )
    chunk, memory = 10 ** fixed[2], 10 ** rates[2]
    return dataclasses.replace(
        A100, node=node, network=network, chunk=(chunk, chunk), memory_bytes=memory, backend=backend
    )


def a_layer(sizes, experts, choices, count):
    tokens, width, hidden = (2**size for size in sizes)
    return LayerKind("experts", count, tokens, Workload(0, choices, width, hidden, experts, torch.bfloat16, True))


def alone(kind):
    return ModelShape("model", "sequence", (kind,), 0.0, 0.0, 0.0, (1.0, 1.0), "no dense part")


def brute_force(kind, grid, profile, *, training):
    """By plan: seconds and bytes of all layers of a kind, from the cost model alone."""
    work = dataclasses.replace(kind.work, rows=kind.tokens, training=training)
    found = {}
    for plan in every_plan(grid.size):
        if refusal(plan, grid, work.experts, known_beforehand=False) is None:
            passes, memory = forward_and_backward(work, plan, grid, profile), layer_bytes(work, plan, grid)
            seconds = kind.count * sum(one.total for one in passes)
            moved = kind.count * sum(one.gather for one in passes), kind.count * sum(one.exchange for one in passes)
            found[plan] = seconds, kind.count * memory.kept + memory.buffers, moved
    return found


def times_in(text):
    return [float(number.replace(",", "")) * UNITS[unit] for number, unit in re.findall(r"([\d.,]+) (ms|us|s)\b", text)]


def check(reason, found, room, ranks):
    """Hold a reason to what brute force found; its words to its numbers."""
    fitting = {plan: one for plan, one in found.items() if one[1] <= room * (1 + 1e-12)}
    chosen = reason.chosen.plan
    if isinstance(reason, NothingFits):
        assert not fitting
        assert found[chosen][1] == pytest.approx(min(one[1] for one in found.values()))
        assert ("would be fastest" in str(reason)) == (min(found.values())[0] < found[chosen][0])
        return
    assert found[chosen][0] == pytest.approx(min(one[0] for one in fitting.values()))
    assert reason.chosen.seconds == pytest.approx(found[chosen][0])
    said = times_in(str(reason))
    if isinstance(reason, ForMemory):
        assert found[reason.faster.plan][1] > room
        assert found[reason.faster.plan][0] < found[chosen][0]
        assert said[1] <= said[0] * 1.01
        return
    rival = reason.rival.plan
    assert found[rival][0] == pytest.approx(reason.rival.seconds)
    assert found[rival][0] >= found[chosen][0] * (1 - 1e-12)
    assert rival in fitting
    if isinstance(reason, DataParallel):
        assert chosen.gather == ranks > rival.gather
        if "weights move" in str(reason):
            assert found[chosen][2][0] < sum(found[rival][2])
            assert said[2] <= said[3] * 1.01
    else:
        assert (chosen.gather, chosen.near) == (rival.gather, rival.near)
        assert (chosen.chunks > 1) == isinstance(reason, Pieces) == (rival.chunks == 1)
        assert isinstance(reason, Pieces | OnePiece)


def held(profile, kind, ranks, share, *, training=True):
    """Plan with a share of the memory that the plan of least memory needs; hold each reason to the cost model."""
    free = brute_force(kind, ranks, profile, training=training)
    least = min(needs for _, needs, _ in free.values())
    profile = dataclasses.replace(profile, memory_bytes=share * least / USABLE_MEMORY)
    planned = plan_model(alone(kind), profile, ranks, batch=1, training=training)
    grid, (layer,) = planned.nesting.grid, planned.layers
    found = brute_force(kind, grid, planned.nesting.seen_by_a_grid(profile), training=training)
    room = USABLE_MEMORY * profile.memory_bytes
    assert (planned.refused is None) == any(one[1] <= room for one in found.values())
    for reason in layer.reasons:
        check(reason, found, room, grid.size)
    fitting = [one[0] for one in found.values() if one[1] <= room]
    assert not fitting or layer.seconds == pytest.approx(min(fitting))
    passed_over = any(isinstance(one, ForMemory | NothingFits) for one in layer.reasons)
    assert passed_over or layer.seconds == pytest.approx(min(one[0] for one in found.values()))
    return {type(one) for one in layer.reasons}


@given(
    RATES, FIXED, st.sampled_from(("nccl", "gloo")), SIZES, EXPERTS, CHOICES, COUNTS,
    st.sampled_from(((1, 1), (4, 4), (8, 4), (8, 2))), st.floats(0.8, 3.0), st.booleans(),
)  # fmt: skip
@settings(max_examples=25)
def test_every_reason_is_what_the_cost_model_says(
    rates, fixed, backend, sizes, experts, choices, count, size, share, training
):
    ranks = Ranks(*size)
    if ranks.size % experts and experts % ranks.size:
        return  # copies of a grid, which the test below is about
    kind = a_layer(sizes, experts, choices, count)
    held(cluster(rates, fixed, backend), kind, ranks, share, training=training)


def test_reasons_of_every_kind_hold():
    """Slow and fast links, few and many tokens, tight and ample memory: each kind of reason is met, and true."""
    seen = set()
    for rate, tokens, hidden, share in product((8.0, 10.5), (6, 14), (6, 12), (0.9, 1.01, 1.3, 20.0)):
        profile = cluster((rate, rate, 11.0), (-6.0, -6.0, -6.0), "nccl")
        seen |= held(profile, a_layer((tokens, 10, hidden), 8, 2, 1), Ranks(4, 2), share)
    assert seen == {NothingFits, ForMemory, DataParallel, OnePiece, Pieces}


@given(RATES, FIXED, SIZES, EXPERTS, st.sampled_from((6, 8, 12)))
@settings(max_examples=8)
def test_copies_are_only_said_to_be_needed_or_faster_where_they_are(rates, fixed, sizes, experts, size):
    profile, kind = cluster(rates, fixed, "nccl"), a_layer(sizes, experts, 1, 1)
    planned = plan_model(alone(kind), profile, Ranks(size, size // 2), batch=1, training=True)
    legal = size % experts == 0 or experts % size == 0
    assert legal or isinstance(planned.nested, Nested)
    if planned.nested is not None:
        assert planned.nesting.copies > 1
        assert ("cannot be cut" in str(planned.nested)) == (not legal)
        if legal:
            assert planned.nested.rival_seconds is not None
            assert planned.seconds < planned.nested.rival_seconds


def test_a_plan_taken_for_its_memory_is_not_called_cheap_to_move():
    """The fastest plan does not fit: nothing may be said of moving tokens and weights."""
    kind, ranks = LayerKind("experts", 32, 4096, Workload(0, 2, 4096, 14336, 8, torch.bfloat16, True)), Ranks(24, 8)
    found = brute_force(kind, ranks, A100, training=True)
    tight = min(needs for _, needs, _ in found.values()) * 1.0001
    for memory, says in ((tight, "for memory"), (tight * 0.9, "no plan fits")):
        profile = dataclasses.replace(A100, memory_bytes=memory / USABLE_MEMORY)
        said = " ".join(plan_model(alone(kind), profile, ranks, batch=1, training=True).remarks())
        assert says in said
        assert "move" not in said


def test_data_parallel_is_not_called_cheaper_to_move_where_it_is_chosen_for_something_else():
    """Slow memory and a hot expert: no rank writes and computes its rows alone, though weights take longer to move."""
    profile = dataclasses.replace(cluster((9.5, 9.5, 12.0), (-6.0, -6.0, -6.0), "nccl"), memory_rate=1e9)
    ranks, kind = Ranks(4, 2), a_layer((10, 10, 9), 4, 1, 1)
    kind = dataclasses.replace(kind, work=dataclasses.replace(kind.work, skew=1))
    assert DataParallel in held(profile, kind, ranks, 50.0)
    said = plan_model(alone(kind), profile, ranks, batch=1, training=True).remarks()
    assert any("data parallel" in one for one in said)
    assert not any("weights move" in one for one in said)


def test_of_plans_that_need_the_same_memory_the_fastest_is_shown():
    kind = LayerKind("experts", 1, 4096, Workload(0, 2, 256, 256, 16, torch.bfloat16, True))
    found = brute_force(kind, Ranks(8, 4), A100, training=True)
    work = dataclasses.replace(kind.work, rows=kind.tokens)
    options = [
        Option(plan, *forward_and_backward(work, plan, Ranks(8, 4), A100), layer_bytes(work, plan, Ranks(8, 4)))
        for plan in found
    ]
    chosen, (reason,) = chosen_for(options, 0.0, 8)
    least = min(one.needs for one in options)
    assert chosen.seconds == min(one.seconds for one in options if one.needs == least)
    assert isinstance(reason, NothingFits)
