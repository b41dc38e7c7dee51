import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import CPU, REFERENCE
from synchromesh.testing.cases import Case, evil_cases

KERNELS = [pytest.param(CPU, id="cpu"), pytest.param(REFERENCE, id="reference")]


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


def assert_right(kernels, expert_ids, num_experts, priority):
    places, counts = kernels.positions(expert_ids, num_experts, priority)
    wanted_places, wanted_counts = by_loop(expert_ids, num_experts, priority)
    assert torch.equal(places, wanted_places)
    assert torch.equal(counts, wanted_counts)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
def test_places_in_token_order(kernels, case: Case):
    assert_right(kernels, case.expert_ids, case.num_experts, None)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
def test_places_by_priority_with_ties_nan_and_infinities(kernels, case: Case):
    priority = torch.randint(4, (len(case.expert_ids),)).float()
    priority[1::7], priority[2::7], priority[3::7] = float("nan"), float("inf"), float("-inf")
    assert_right(kernels, case.expert_ids, case.num_experts, priority)


@pytest.mark.parametrize("num_experts", [1, 255, 256, 300, 70_000])
def test_every_width_of_the_sorted_key(num_experts):
    ids = torch.randint(-1, num_experts, (50, 2))
    assert_right(CPU, ids, num_experts, None)


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(0, 30), choices=st.integers(1, 5), experts=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_shape(tokens, choices, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    priority = torch.randint(3, (tokens,), generator=generator).double()
    for kernels in (CPU, REFERENCE):
        assert_right(kernels, ids, experts, priority)


def test_non_contiguous_ids():
    ids = torch.randint(4, (3, 20)).T
    assert_right(CPU, ids, 4, torch.rand(40)[::2])


@pytest.mark.parametrize(("bad", "named"), [(4, "expert id 4"), (-2, "expert id -2")])
def test_an_id_out_of_range_is_named(bad, named):
    with pytest.raises(ValueError, match=named):
        CPU.positions(torch.tensor([[0], [bad]]), 4)
