import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import Case, evil_cases, zipf


def assert_right(expert_ids, num_experts, priority):
    for got, wanted in zip(
        TRITON.positions(expert_ids, num_experts, priority),
        REFERENCE.positions(expert_ids, num_experts, priority),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
def test_places_in_token_order(case: Case):
    assert_right(case.expert_ids, case.num_experts, None)


@pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
def test_places_by_priority_with_ties_nan_and_infinities(case: Case):
    priority = torch.randint(4, (len(case.expert_ids),)).float()
    priority[1::7], priority[2::7], priority[3::7] = float("nan"), float("inf"), float("-inf")
    assert_right(case.expert_ids, case.num_experts, priority)


@pytest.mark.parametrize(("tokens", "experts", "choices"), [(300, 3, 2), (64, 300, 8), (129, 1, 1)])
def test_many_blocks_and_many_experts(tokens, experts, choices):
    ids = zipf(tokens, experts, choices)
    assert_right(ids, experts, None)
    assert_right(ids, experts, torch.rand(tokens))


def test_ids_out_of_range_are_absent_pairs():
    places, counts = TRITON.positions(torch.tensor([[0], [4], [-7], [0]]), 4)
    assert places.flatten().tolist() == [0, -1, -1, 1]
    assert counts.tolist() == [2, 0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(0, 90), choices=st.integers(1, 5), experts=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_shape(tokens, choices, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    assert_right(ids, experts, torch.randint(3, (tokens,), generator=generator).double())
