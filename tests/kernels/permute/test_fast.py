import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.testing.cases import NAN, Case, row_map_of
from synchromesh.testing.compare import check


def poisoned_tail(buffer, rowmap):
    buffer[int(rowmap.ends[-1]) :] = NAN
    return buffer


def there_and_back(kernels, rowmap):
    return lambda x, weights: kernels.combine(kernels.gather(x, rowmap), weights, rowmap)


def test_gather_and_its_gradient(fast, case: Case, every_dtype):
    rowmap = case.rowmap()
    n, inputs = int(rowmap.ends[-1]), {"x": case.tokens(6, every_dtype)}
    check(lambda x: fast.gather(x, rowmap)[:n], lambda x: REFERENCE.gather(x, rowmap)[:n], inputs)


def test_what_flows_back_into_the_tail_reaches_nobody(fast, case: Case):
    rowmap = case.rowmap()
    for kernels in (fast, REFERENCE):
        x = torch.randn(len(case.expert_ids), 4, requires_grad=True)
        kernels.gather(x, rowmap).backward(poisoned_tail(torch.ones(len(rowmap.pairs), 4), rowmap))
        assert torch.equal(x.grad, (rowmap.rows >= 0).sum(1, keepdim=True).expand(-1, 4).float())


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "fp32"])
def test_combine_and_its_gradients(fast, case: Case, every_dtype, weight_dtype):
    rowmap = case.rowmap()
    inputs = {
        "buffer": poisoned_tail(torch.randn(len(rowmap.pairs), 6), rowmap).to(every_dtype),
        "weights": case.weights(weight_dtype or every_dtype),
    }
    check(lambda **i: fast.combine(**i, rowmap=rowmap), lambda **i: REFERENCE.combine(**i, rowmap=rowmap), inputs)


def test_a_nan_weight_or_row_reaches_its_own_token_only(fast):
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    buffer, weights = torch.ones(6, 3), torch.ones(3, 2)
    weights[0, 1] = NAN
    buffer[rowmap.rows[2, 0]] = NAN
    for kernels in (fast, REFERENCE):
        assert kernels.combine(buffer, weights, rowmap).isnan().all(1).tolist() == [True, False, True]


def test_combine_sums_in_float32(fast):
    rowmap = row_map_of(torch.arange(63)[None], 63)
    buffer = torch.full((63, 2), 1 / 256, dtype=torch.bfloat16)
    buffer[0] = 1  # to which 1/256 adds nothing in bfloat16
    y = fast.combine(buffer, torch.ones(1, 63), rowmap)
    assert torch.equal(y, torch.full((1, 2), 1 + 62 / 256).bfloat16())


@pytest.mark.parametrize("width", [4, 1100])
def test_tensors_that_are_not_contiguous_or_repeat_themselves(fast, exact, width):
    rowmap, weights = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2), torch.rand(2, 3).to(exact).T
    for x in (torch.randn(width, 3).to(exact).T, torch.randn(width).to(exact).expand(3, width)):
        check(there_and_back(fast, rowmap), there_and_back(REFERENCE, rowmap), {"x": x, "weights": weights})


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 4),
    experts=st.integers(1, 6),
    capacity=st.none() | st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_any_shape(fast, tokens, choices, experts, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    rowmap = row_map_of(ids, experts, capacity=capacity)
    inputs = {"x": torch.randn(tokens, 3, generator=generator), "weights": torch.rand(tokens, choices)}
    check(there_and_back(fast, rowmap), there_and_back(REFERENCE, rowmap), inputs)
