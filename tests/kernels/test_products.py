import pytest
import torch

from synchromesh.kernels.products import (
    NARROWED_BYTES,
    Batch,
    Matrices,
    add_product,
    batched_here,
    clear_unused,
    most_together,
    multiply,
    multiply_anywhere,
    multiply_rows,
    pieces,
    scale_columns,
    sum_rows,
)
from synchromesh.testing.compare import assert_close

COUNTS = [0, 3, 3, 3, 1, 0, 0, 2, 2, 9, 0]
WAYS = pytest.mark.parametrize(
    "batched",
    [lambda *_: True, lambda *_: False, lambda _, rows: rows > 2, lambda experts, _: experts < 2],
    ids=["all", "none", "some", "pairs"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def own_rows():
    start = 0
    for expert, count in enumerate(COUNTS):
        yield expert, slice(start, start + count)
        start += count


@pytest.mark.parametrize("most", [1, 4, 7, 100])
@pytest.mark.parametrize("cut", [True, False])
@WAYS
def test_pieces_hold_every_row_of_every_expert_once(batched, cut, most):
    found = []
    for piece in pieces(COUNTS, most, batched, cut=cut):
        assert sum(batch.size for batch in piece.batches) == piece.stop - piece.start
        assert piece.stop - piece.start <= most or (not cut and len(piece.batches) == 1)
        assert all(
            batch.stop == batch.first + 1 or batched(batch.stop - batch.first - 1, batch.rows)
            for batch in piece.batches
        )
        row = piece.start
        for batch in piece.batches:
            for expert in range(batch.first, batch.stop):
                found += [(expert, row + place) for place in range(batch.rows)]
                row += batch.rows
    assert found == [(expert, row) for expert, own in own_rows() for row in range(own.start, own.stop)]
    if not cut:  # an expert's gradients are single products
        experts = [
            e for piece in pieces(COUNTS, most, batched, cut=False) for b in piece.batches for e in range(*b[:2])
        ]
        assert len(experts) == len(set(experts))


def test_neighbours_of_equal_loads_are_one_batch():
    (piece,) = pieces(COUNTS, 100, lambda *_: True, cut=False)
    assert piece.batches == [Batch(1, 4, 3), Batch(4, 5, 1), Batch(7, 9, 2), Batch(9, 10, 9)]


@DTYPES
@WAYS
def test_products_are_those_of_a_loop(batched, dtype):
    rows, experts = sum(COUNTS), len(COUNTS)
    a, b, gradient = (torch.randn(rows, width).to(dtype) for width in (4, 5, 5))
    matrices, bias = torch.randn(experts, 4, 5).to(dtype), torch.randn(experts, 5).to(dtype)
    out, more, scaled = (torch.full((rows, 5), torch.nan, dtype=dtype) for _ in range(3))
    d_matrices = torch.full((experts, 4, 5), torch.nan, dtype=dtype)
    d_turned = torch.full((experts, 5, 4), torch.nan, dtype=dtype).mT
    d_bias = torch.full((experts, 5), torch.nan, dtype=dtype)
    for d in (d_matrices, d_turned, d_bias):
        clear_unused(COUNTS, Matrices.of(d))
    for piece in pieces(COUNTS, 8, batched, cut=False):
        own = slice(piece.start, piece.stop)
        multiply(a[own], Matrices.of(matrices), piece, out[own], Matrices.of(bias))
        multiply(a[own], Matrices(matrices, matrices), piece, more[own])
        there = multiply_anywhere(a[own], Matrices.of(matrices), piece, torch.empty_like(more[own]))
        assert_close("anywhere", there, more[own])
        add_product(a[own], Matrices.of(matrices), piece, more[own])
        scale_columns(b[own], Matrices.of(bias), piece, scaled[own])
        multiply_rows(a[own], gradient[own], piece, Matrices.of(d_matrices))
        multiply_rows(a[own], gradient[own], piece, Matrices.of(d_turned))
        sum_rows(gradient[own], piece, Matrices.of(d_bias))
    for expert, own in own_rows():
        assert_close("out", out[own], a[own] @ matrices[expert] + bias[expert])
        assert_close("more", more[own], 2 * (a[own] @ matrices[expert]))
        assert_close("scaled", scaled[own], b[own] * bias[expert])
        for d in (d_matrices, d_turned):
            assert_close("matrices", d[expert], a[own].t() @ gradient[own])
        assert_close("bias", d_bias[expert], gradient[own].sum(0))


@WAYS
def test_wider_matrices_are_cast_for_their_product_and_gradients_of_them_are_wide(batched):
    rows, experts = sum(COUNTS), len(COUNTS)
    a, gradient = (torch.randn(rows, width).bfloat16() for width in (4, 5))
    wide = torch.randn(experts, 4, 5), torch.randn(experts, 5, 4).mT
    for matrices in wide:
        narrow = matrices.bfloat16()
        out, wanted = (torch.zeros(rows, 5, dtype=torch.bfloat16) for _ in range(2))
        d_wide, d_narrow = torch.zeros_like(matrices), torch.zeros_like(narrow)
        for piece in pieces(COUNTS, 8, batched, cut=False):
            own = slice(piece.start, piece.stop)
            for to, by, d in ((out, matrices, d_wide), (wanted, narrow, d_narrow)):
                multiply(a[own], Matrices.of(by), piece, to[own])
                add_product(a[own], Matrices.of(by), piece, to[own])
                multiply_rows(a[own], gradient[own], piece, Matrices.of(d))
        assert d_wide.dtype == torch.float32
        assert d_wide.any()
        assert torch.equal(out, wanted)
        assert torch.equal(d_wide, d_narrow.float())


def test_no_more_experts_are_cast_for_one_call_than_fit_a_cache():
    numbers = 2**10
    most = NARROWED_BYTES // (2 * numbers**2)
    experts = torch.empty(100, 1, 1).expand(100, numbers, numbers)
    assert most_together(torch.bfloat16, experts) == most
    assert not batched_here(torch.bfloat16, experts)(most, 1)
    assert most_together(torch.float32, experts) > len(experts)
    assert most_together(torch.bfloat16, experts[:, :, :1]) == most * numbers
