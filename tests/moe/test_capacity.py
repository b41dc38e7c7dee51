import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from synchromesh import Dropless, FixedCapacity, NeededCapacity, batch_prioritized, token_order
from synchromesh.moe.capacity import FixedRows
from synchromesh.types import Routing, RowMap


def local(value):
    return value


def random_routing(tokens: int, choices: int, experts: int, *, holes: float = 0.0, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator).softmax(1)
    ids = scores.argsort(dim=1, descending=True)[:, :choices]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < holes, -1)
    return Routing(ids, torch.rand(ids.shape, generator=generator), scores, scores.log())


def served(routing: Routing, order: list[int], capacity: float) -> set[tuple[int, int]]:
    """The kept pairs, by the definition: choice after choice, tokens in their order, until an expert is full."""
    room = [capacity] * routing.num_experts
    kept = set()
    for choice in range(routing.expert_ids.shape[1]):
        for token in order:
            expert = int(routing.expert_ids[token, choice])
            if expert >= 0 and room[expert] > 0:
                room[expert] -= 1
                kept.add((token, choice))
    return kept


def check(rowmap: RowMap, routing: Routing, kept: set[tuple[int, int]]) -> None:
    choices = routing.expert_ids.shape[1]
    ends = [0, *rowmap.ends.tolist()]
    got = {(t, k) for t in range(len(rowmap.rows)) for k in range(choices) if rowmap.rows[t, k] >= 0}
    assert got == kept
    for token, choice in kept:
        row, expert = int(rowmap.rows[token, choice]), int(routing.expert_ids[token, choice])
        assert ends[expert] <= row < ends[expert + 1]
        assert rowmap.pairs[row] == token * choices + choice
    assert len({int(rowmap.rows[pair]) for pair in kept}) == len(kept) == ends[-1]
    assert (rowmap.pairs[ends[-1] :] == -1).all()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    data=st.data(),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    factor=st.sampled_from([0.0, 0.3, 1.0, 1.25, 8.0]),
    prioritized=st.booleans(),
)
def test_kept_pairs_are_those_served_first(tokens, experts, data, holes, factor, prioritized):
    choices = data.draw(st.integers(1, experts))
    routing = random_routing(tokens, choices, experts, holes=holes, seed=tokens)
    best = routing.scores.amax(1)
    order = sorted(range(tokens), key=lambda t: -best[t]) if prioritized else list(range(tokens))
    priority = batch_prioritized if prioritized else token_order
    fixed = FixedCapacity(factor, priority=priority)
    most = fixed.rows_per_expert(tokens=tokens, choices=choices, experts=experts)
    check(fixed(routing, local), routing, served(routing, order, most))
    check(FixedRows(most + 1, priority)(routing, local), routing, served(routing, order, most + 1))
    check(Dropless()(routing, local), routing, served(routing, order, 10**9))
    needed = NeededCapacity(priority=priority)(routing, local)
    check(needed, routing, served(routing, order, 10**9))
    assert int(needed.capacity) == int(routing.tokens_per_expert().max())
    capped = NeededCapacity(max_factor=factor, priority=priority)(routing, local)
    check(capped, routing, served(routing, order, most))


@pytest.mark.parametrize("choices", [1, 2, 4])
def test_priority_without_drops_keeps_every_pair(choices):
    """With batch priority and no cap the needed capacity is the largest load, whatever token comes last."""
    routing = random_routing(64, choices, 4, seed=3)
    rowmap = NeededCapacity(priority=batch_prioritized)(routing, local)
    assert int(rowmap.capacity) == int(routing.tokens_per_expert().max())
    assert (rowmap.rows >= 0).all()


def test_a_larger_agreed_capacity_is_reported_but_moves_no_row():
    routing = random_routing(10, 1, 4)
    alone, agreed = NeededCapacity()(routing, local), NeededCapacity()(routing, lambda value: value + 5)
    assert int(agreed.capacity) == int(alone.capacity) + 5
    assert torch.equal(agreed.rows, alone.rows)


def test_rows_are_bounded_by_what_the_capacity_can_hold():
    routing = random_routing(64, 2, 4)
    assert FixedCapacity(0.5)(routing, local).pairs.shape[0] == 64
    assert FixedCapacity(8.0)(routing, local).pairs.shape[0] == 128
    assert FixedCapacity(0.5, tokens=16)(routing, local).capacity == 4


def test_capacity_is_the_papers_formula_without_rounding_noise():
    assert FixedCapacity(1.1).rows_per_expert(tokens=10, choices=1, experts=1) == 11
    assert FixedCapacity(1.0).rows_per_expert(tokens=10, choices=2, experts=8) == 3


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_factor_without_meaning_is_refused(factor):
    with pytest.raises(ValueError, match=r"factor is .* wanted a finite number >= 0"):
        FixedCapacity(factor)
    with pytest.raises(ValueError, match=r"factor is .* wanted a finite number >= 0"):
        NeededCapacity(max_factor=factor)


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens is -5, wanted"):
        FixedCapacity(1.0, tokens=-5)


def test_a_broken_token_is_served_last():
    routing = random_routing(8, 1, 2, seed=1)
    scores = routing.scores.clone()
    scores[0] = float("nan")
    routing = Routing(torch.zeros(8, 1, dtype=torch.int64), routing.weights, scores, routing.logits)
    rowmap = FixedCapacity(1.0, priority=batch_prioritized)(routing, local)
    assert rowmap.rows[0, 0] == -1
    assert (rowmap.rows >= 0).sum() == 4


def test_rows_below_none_are_refused():
    with pytest.raises(ValueError, match=r"FixedRows.rows is -1, wanted a number >= 0"):
        FixedRows(-1)
