import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import Case, evil_cases, row_map_of
from synchromesh.testing.compare import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHORT = [case for case in evil_cases() if case.name != "longer_than_a_block"]  # there are no blocks of rows here
CASES = pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
NAN = float("nan")


def poisoned_tail(buffer, rowmap):
    buffer[int(rowmap.ends[-1]) :] = NAN
    return buffer


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_its_gradient(case: Case, dtype):
    rowmap = case.rowmap()
    n = int(rowmap.ends[-1])
    inputs = {"x": case.tokens(6, dtype)}
    check(lambda x: TRITON.gather(x, rowmap)[:n], lambda x: REFERENCE.gather(x, rowmap)[:n], inputs)


@CASES
def test_what_flows_back_into_the_tail_reaches_nobody(case: Case):
    rowmap = case.rowmap()
    x = torch.randn(len(case.expert_ids), 4, requires_grad=True)
    TRITON.gather(x, rowmap).backward(poisoned_tail(torch.ones(len(rowmap.pairs), 4), rowmap))
    assert torch.equal(x.grad, (rowmap.rows >= 0).sum(1, keepdim=True).expand(-1, 4).float())


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "fp32"])
def test_combine_and_its_gradients(case: Case, dtype, weight_dtype):
    rowmap = case.rowmap()
    inputs = {
        "buffer": poisoned_tail(torch.randn(len(rowmap.pairs), 6), rowmap).to(dtype),
        "weights": case.weights(weight_dtype or dtype),
    }
    check(lambda **i: TRITON.combine(**i, rowmap=rowmap), lambda **i: REFERENCE.combine(**i, rowmap=rowmap), inputs)


def test_rows_wider_than_a_block_that_are_not_contiguous():
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    x = torch.randn(1100, 3).T

    def there_and_back(kernels):
        return lambda x, weights: kernels.combine(kernels.gather(x, rowmap), weights, rowmap)

    check(there_and_back(TRITON), there_and_back(REFERENCE), {"x": x, "weights": torch.rand(2, 3).T})


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 4),
    experts=st.integers(1, 6),
    capacity=st.none() | st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_any_shape(tokens, choices, experts, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    rowmap = row_map_of(ids, experts, capacity=capacity)
    inputs = {"x": torch.randn(tokens, 3, generator=generator), "weights": torch.rand(tokens, choices)}

    def there_and_back(kernels):
        return lambda x, weights: kernels.combine(kernels.gather(x, rowmap), weights, rowmap)

    check(there_and_back(TRITON), there_and_back(REFERENCE), inputs)
