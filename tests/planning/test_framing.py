"""Bytes on the wire: each header counted one by one, and held to what links of emulated clusters counted."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.planning.framing import Framing
from synchromesh.planning.lattice import Ranks, every_plan, refusal
from synchromesh.planning.traffic import traffic
from synchromesh.types import Plan, Workload

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "emulated_cluster.jsonl"


@given(st.integers(0, 20_000), st.sampled_from((500, 1448, 65160)))
def test_every_segment_has_a_header_and_every_second_one_is_acknowledged(size, segment):
    total, left, number = 0, size, 0
    while left > 0:
        total += min(left, segment) + 66
        total += 66 if number % 2 == 0 else 0  # of the same number coming back
        left, number = left - segment, number + 1
    assert Framing(segment).on_the_wire(size) == total


def test_headers_are_added_message_by_message_in_a_step():
    work, ranks = Workload(64, 1, 8, 16, 8, torch.float32, True), Ranks(8, 4)
    for plan in (Plan(), Plan(chunks=4), Plan(gather=2, near=False), Plan(gather=8, regather=True)):
        sent = traffic(work, plan, ranks)
        bare, framed = sent.leaving_a_node("gloo"), sent.leaving_a_node("gloo", framing=Framing())
        one_header_each = sent.leaving_a_node("gloo", framing=Framing(1 << 30))
        assert bare < one_header_each <= framed
    messages = 4 * (4 * sum(one.group.crossing for one in traffic(work, Plan(chunks=4), ranks).there))
    counts = sum(one.group.crossing for one in traffic(work, Plan(chunks=4), ranks).counts)
    whole = traffic(work, Plan(chunks=4), ranks)
    added = whole.leaving_a_node("nccl", framing=Framing(1 << 30)) - whole.leaving_a_node("nccl")
    assert added == pytest.approx(132 * (messages + counts))


@pytest.mark.parametrize(("mbit", "segment"), [(100, 1448), (500, 45 * 1448), (1000, 45 * 1448)])
def test_links_counted_within_two_per_cent_what_is_predicted(mbit, segment):
    """At 100 Mbit/s the emulated link cuts what the kernel hands over into segments; at more it passes 64 KiB on."""
    shares = []
    for line in MEASURED.read_text().splitlines():
        record = json.loads(line)
        if record["mbit"] != mbit:
            continue
        tokens, choices, width, hidden, experts = record["shape"]
        work = Workload(tokens, choices, width, hidden, experts, torch.float32, True, vectors=(hidden, width))
        ranks = Ranks(record["ranks"], record["ranks"] // record["nodes"])
        named = {str(plan): plan for plan in every_plan(ranks.size) if not refused(plan, ranks, experts)}
        sent = traffic(work, named[record["plan"]], ranks)
        shares.append(record["bytes"] / sent.leaving_a_node("gloo", framing=Framing(segment)))
    assert len(shares) > 100
    assert statistics.median(shares) == pytest.approx(1, abs=0.01)
    assert sum(abs(share - 1) <= 0.02 for share in shares) >= 0.9 * len(shares)


def refused(plan, ranks, experts):
    return refusal(plan, ranks, experts, known_beforehand=False) is not None
