import pytest
import torch

from synchromesh.kernels import matmul as by
from synchromesh.kernels.matmul import (
    STEP,
    add_matmul,
    has_onednn,
    matmul,
    matmul_anywhere,
    matmul_turned,
    prefers_onednn,
)
from synchromesh.kernels.product_costs import Cost, ProductCosts
from synchromesh.testing.compare import assert_close

ROWS = pytest.mark.parametrize("rows", [0, 1, STEP - 1, STEP, 2 * STEP + 5, 300])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
LAYOUTS = pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])


def matrix(rows: int, columns: int, dtype: torch.dtype, *, turned: bool = False) -> torch.Tensor:
    tensor = torch.randn(columns, rows).t() if turned else torch.randn(rows, columns)
    return tensor.to(dtype)


@pytest.mark.usefixtures("everything_by_onednn")
@ROWS
@DTYPES
@LAYOUTS
def test_a_product_is_that_of_torch(rows, dtype, turned):
    a, b, bias = matrix(rows, 24, dtype), matrix(24, 40, dtype, turned=turned), torch.randn(40).to(dtype)
    plain, biased, added = torch.full((3, rows, 40), 2.0, dtype=dtype)
    matmul(a, b, plain, None)
    matmul(a, b, biased, bias)
    add_matmul(a, b, added)
    assert_close("a b", plain, a @ b)
    assert_close("a b, anywhere", matmul_anywhere(a, b, torch.empty(rows, 40, dtype=dtype), None), a @ b)
    assert_close("a b + bias", biased, torch.addmm(bias, a, b))
    assert_close("2 + a b", added, 2 + a @ b)


@pytest.mark.usefixtures("everything_by_onednn")
@ROWS
@DTYPES
@pytest.mark.parametrize(("left", "right"), [(24, 40), (200, 8), (8, 200)])
def test_a_sum_over_rows_is_that_of_torch(rows, dtype, left, right):
    a, b, out = matrix(rows, left, dtype), matrix(rows, right, dtype), torch.full((left, right), 2.0, dtype=dtype)
    matmul_turned(a, b, out)
    assert_close("a^T b", out, a.t() @ b)


@pytest.mark.usefixtures("everything_by_onednn")
def test_onednn_gets_whole_steps_of_rows_and_nothing_behind_the_memory(monkeypatch):
    asked = []

    def noted(x, weight, bias, *, gelu):
        asked.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(by, "onednn_linear", noted)
    memory, b = torch.randn(10 * STEP, 8), torch.randn(8, 8)
    for first, stop in [(0, 1), (3, 3 + 2 * STEP), (5, 5 + 2 * STEP + 1), (9 * STEP + 1, 10 * STEP)]:
        out = torch.empty(stop - first, 8)
        matmul(memory[first:stop], b, out, None)
        assert_close("a b", out, memory[first:stop] @ b)
    assert asked == [STEP, 2 * STEP, 3 * STEP]


@pytest.mark.usefixtures("everything_by_onednn")
def test_what_lies_behind_the_rows_does_not_matter():
    memory = torch.randn(2 * STEP, 8)
    memory[5:] = torch.nan
    out, b = torch.empty(5, 8), torch.randn(8, 8)
    matmul(memory[:5], b, out, None)
    assert_close("a b", out, memory[:5] @ b)


def test_other_dtypes_stay_with_torch():
    assert not has_onednn(torch.float64)
    assert not prefers_onednn(10**6, 10**6, torch.float64)
    assert not prefers_onednn(10**6, 10**6, torch.bfloat16)


def test_the_cheaper_library_multiplies():
    costs = ProductCosts(Cost(1.0, 1.0, 1.0), Cost(1.0, 1.0, 1.0), onednn=Cost(1.0, 4.0, 0.5))
    assert not costs.prefers_onednn(rows=6, rest=0, instead=6, numbers=10)  # 10 (4 + 3) against 10 (1 + 6): as much
    assert costs.prefers_onednn(rows=7, rest=0, instead=7, numbers=10)
    assert not costs.prefers_onednn(rows=8, rest=0, instead=7, numbers=10)  # a row of padding
    assert not costs.prefers_onednn(rows=8, rest=3, instead=11, numbers=10)  # the rest is a call of torch
    assert costs.prefers_onednn(rows=16, rest=4, instead=20, numbers=10)
    assert not costs.prefers_onednn(rows=0, rest=7, instead=7, numbers=10)
