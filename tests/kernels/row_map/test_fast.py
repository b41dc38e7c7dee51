"""The map of rows of each set of kernels, against a plain loop over all cases."""

import dataclasses

import pytest
import torch

from synchromesh.testing.cases import row_map_of


def made(fast, ids, experts, *, num_rows, capacity):
    places, counts = fast.positions(ids, experts)
    return fast.row_map(ids, places, counts, num_rows=num_rows, capacity=capacity)


def check(got, wanted):
    for name in ("rows", "pairs", "ends"):
        value = getattr(got, name)
        assert value.dtype == getattr(wanted, name).dtype
        assert torch.equal(value, getattr(wanted, name)), name
    tokens = got.token_of_rows()
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, wanted.token_of_rows())


def test_every_case(fast, case):
    wanted = row_map_of(case.expert_ids, case.num_experts, capacity=case.capacity, max_pairs=case.max_pairs)
    check(made(fast, case.expert_ids, case.num_experts, num_rows=len(wanted.pairs), capacity=case.capacity), wanted)


@pytest.mark.parametrize("capacity", [0, 1, 40, 10**12])
def test_a_capacity_may_be_a_number_or_lie_on_the_device(fast, capacity):
    ids = torch.randint(-1, 70, (60, 3), generator=torch.Generator().manual_seed(1))
    wanted = row_map_of(ids, 70, capacity=capacity)
    for given in (capacity, torch.tensor(capacity)):
        check(made(fast, ids, 70, num_rows=len(wanted.pairs), capacity=given), wanted)


@pytest.mark.parametrize("shape", [(0, 2), (3, 1), (1, 130)], ids=str)
def test_sizes_around_none_and_around_a_block(fast, shape):
    ids = torch.arange(shape[0] * shape[1]).view(shape) % 200 - 1
    wanted = row_map_of(ids, 199)
    check(made(fast, ids, 199, num_rows=len(wanted.pairs), capacity=None), wanted)


def test_room_for_more_rows_than_pairs_is_tail(fast):
    ids = torch.tensor([[1], [0], [1]])
    got = made(fast, ids, 2, num_rows=300, capacity=None)
    assert got.pairs[:4].tolist() == [1, 0, 2, -1]
    assert (got.pairs[3:] == -1).all()
    assert (got.token_of_rows()[3:] == -1).all()


def test_other_pairs_forget_the_tokens_of_these(fast):
    got = made(fast, torch.tensor([[0, 1], [1, 0]]), 2, num_rows=4, capacity=None)
    other = dataclasses.replace(got, pairs=torch.tensor([3, 2, 1, 0]))
    assert other.token_of_rows().tolist() == [1, 1, 0, 0]
