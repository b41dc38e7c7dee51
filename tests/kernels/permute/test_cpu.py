import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import CPU, REFERENCE
from synchromesh.testing.cases import Case, evil_cases, row_map_of
from synchromesh.testing.compare import TOLERANCE, assert_close, check

DTYPES = list(TOLERANCE)
CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
NAN = float("nan")


def poisoned_tail(buffer, rowmap):
    buffer[int(rowmap.ends[-1]) :] = NAN
    return buffer


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_its_gradient(case: Case, dtype):
    rowmap = case.rowmap()
    n = int(rowmap.ends[-1])
    check(lambda x: CPU.gather(x, rowmap)[:n], lambda x: REFERENCE.gather(x, rowmap)[:n], {"x": case.tokens(6, dtype)})


@CASES
def test_what_flows_back_into_the_tail_reaches_nobody(case: Case):
    rowmap = case.rowmap()
    for kernels in (CPU, REFERENCE):
        x = torch.randn(len(case.expert_ids), 4, requires_grad=True)
        kernels.gather(x, rowmap).backward(poisoned_tail(torch.ones(len(rowmap.pairs), 4), rowmap))
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
    check(lambda **i: CPU.combine(**i, rowmap=rowmap), lambda **i: REFERENCE.combine(**i, rowmap=rowmap), inputs)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_a_nan_weight_or_row_reaches_its_own_token_only(kernels):
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    rowmap = row_map_of(ids, 2)
    buffer, weights = torch.ones(6, 3), torch.ones(3, 2)
    weights[0, 1] = NAN
    buffer[rowmap.rows[2, 0]] = NAN
    assert kernels.combine(buffer, weights, rowmap).isnan().all(1).tolist() == [True, False, True]


def test_combine_sums_in_float32():
    rowmap = row_map_of(torch.arange(64)[None], 64)
    buffer = torch.full((64, 2), 1 / 256, dtype=torch.bfloat16)
    buffer[0] = 1
    y = CPU.combine(buffer, torch.ones(1, 64), rowmap)
    assert torch.equal(y, torch.full((1, 2), 1 + 63 / 256).bfloat16())


def test_non_contiguous_and_expanded_tensors():
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    x = torch.randn(4, 3, dtype=torch.float64).T
    assert_close("rows", CPU.gather(x, rowmap), REFERENCE.gather(x, rowmap))
    zero_stride = torch.randn(4, dtype=torch.float64).expand(3, 4)
    assert_close("rows", CPU.gather(zero_stride, rowmap), REFERENCE.gather(zero_stride, rowmap))
    grads = []
    for kernels in (CPU, REFERENCE):
        leaves = [x.detach().clone().requires_grad_(), torch.full((3, 2), 0.5, dtype=torch.float64, requires_grad=True)]
        kernels.combine(kernels.gather(leaves[0], rowmap), leaves[1], rowmap).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, wanted in zip(*grads, strict=True):
        assert_close("gradient", got, wanted)


@CASES
def test_gradcheck(case: Case):
    rowmap = row_map_of(case.expert_ids[:6], case.num_experts, capacity=case.capacity)
    x = torch.randn(len(case.expert_ids[:6]), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(case.expert_ids[:6].shape, dtype=torch.float64, requires_grad=True)
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w: CPU.combine(CPU.gather(x, rowmap), w, rowmap), (x, weights))


@CASES
def test_registrations_agree_with_the_kernels(case: Case):
    rowmap = case.rowmap()
    x = case.tokens(4, torch.float32).nan_to_num().requires_grad_()
    ops = torch.ops.synchromesh
    if int(rowmap.ends[-1]) == len(rowmap.pairs):  # opcheck compares whole outputs, and the tail may hold anything
        torch.library.opcheck(ops.gather_cpu.default, (x, rowmap.pairs, rowmap.ends, rowmap.rows.shape[1]))
    buffer = torch.randn(len(rowmap.pairs), 4, requires_grad=True)
    weights = torch.rand(case.expert_ids.shape, requires_grad=True)
    torch.library.opcheck(ops.combine_cpu.default, (buffer, weights, rowmap.pairs, rowmap.ends))


@settings(deadline=None, max_examples=60)
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

    check(there_and_back(CPU), there_and_back(REFERENCE), inputs)
