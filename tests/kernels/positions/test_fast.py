import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.testing.cases import Case, evil_cases, zipf

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)


def by_loop(expert_ids, num_experts, priority):
    """Count pairs one by one: the plainest meaning of the words."""
    num_tokens, choices = expert_ids.shape
    known = [float("-inf") if p != p else p for p in priority.tolist()] if priority is not None else [0.0] * num_tokens
    counts, places = [0] * num_experts, torch.full_like(expert_ids, -1)
    for k in range(choices):
        for t in sorted(range(num_tokens), key=lambda t: -known[t]):
            expert = int(expert_ids[t, k])
            if expert >= 0:
                places[t, k] = counts[expert]
                counts[expert] += 1
    return places, torch.tensor(counts)


def assert_right(fast, expert_ids, num_experts, priority):
    wanted = by_loop(expert_ids, num_experts, priority)
    for kernels in (fast, REFERENCE):
        for got, own in zip(kernels.positions(expert_ids, num_experts, priority), wanted, strict=True):
            assert torch.equal(got, own)


@CASES
def test_places_in_token_order(fast, case: Case):
    assert_right(fast, case.expert_ids, case.num_experts, None)


@CASES
def test_places_by_priority_with_ties_nan_and_infinities(fast, case: Case):
    priority = torch.randint(4, (len(case.expert_ids),)).float()
    priority[1::7], priority[2::7], priority[3::7] = float("nan"), float("inf"), float("-inf")
    assert_right(fast, case.expert_ids, case.num_experts, priority)


@pytest.mark.parametrize(("tokens", "experts", "choices"), [(300, 3, 2), (64, 300, 8), (129, 1, 1)])
def test_many_blocks_and_many_experts(fast, tokens, experts, choices):
    ids = zipf(tokens, experts, choices)
    assert_right(fast, ids, experts, None)
    assert_right(fast, ids, experts, torch.rand(tokens))


def test_ids_and_priorities_that_are_not_contiguous(fast):
    assert_right(fast, torch.randint(4, (3, 20)).T, 4, torch.rand(40)[::2])


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(0, 90), choices=st.integers(1, 5), experts=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_shape(fast, tokens, choices, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    assert_right(fast, ids, experts, torch.randint(3, (tokens,), generator=generator).double())
