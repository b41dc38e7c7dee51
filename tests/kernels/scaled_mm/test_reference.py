import math

import pytest
import torch

from synchromesh.kernels import REFERENCE, Float8Products, MXFloat8Products
from synchromesh.kernels.scaled_mm.reference import rounded, scale_of
from synchromesh.testing.compare import relative_rms

KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]
ENDS = torch.tensor([20, 20, 50], dtype=torch.int32)


def inputs_of(width=96, out=80):
    rows, weight = torch.randn(60, width), torch.randn(3, width, out) / width**0.5
    rows[50:] = float("nan")
    return rows.requires_grad_(), weight.requires_grad_(), torch.randn(3, out).requires_grad_()


def run(multiply, inputs, **kwargs):
    rows, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    y = multiply(rows, weight, ENDS, bias, **kwargs)[:50]
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return {"y": y.detach(), "rows": rows.grad[:50], "weight": weight.grad, "bias": bias.grad}


@KINDS
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_numbers_are_the_nearest_of_their_block(products, size):
    x = torch.randn(5, size) * 10.0 ** torch.randint(-9, 9, (5, size))
    block = products.block or size
    for row, got in zip(x, rounded(x, 1, products), strict=True):
        for at in range(0, size, block):
            part = row[at : at + block].double()
            scale = 2.0 ** math.ceil(math.log2(float(part.abs().max()) / 448))
            wanted = min_by_distance(part / scale) * scale
            assert ((got[at : at + block].double() - part).abs() == (wanted - part).abs()).all()


def min_by_distance(x):
    return E4M3[(x[:, None] - E4M3).abs().argmin(1)]


def test_scales_are_the_smallest_powers_of_two_that_cover():
    largest = torch.tensor([448.0, 448.0001, 224.0, 1.75, 1.7500001, 0.0, 1e-45, 3.4e38, 2.0**-126])
    wanted = [1.0, 2.0, 0.5, 2.0**-8, 2.0**-7, 2.0**-126, 2.0**-126, 2.0**120, 2.0**-126]
    assert scale_of(largest).tolist() == wanted
    assert scale_of(torch.tensor([float("nan"), float("inf")])).isnan().all()


@KINDS
def test_a_broken_number_breaks_its_block_and_nothing_else(products):
    x = torch.randn(4, 64)
    x[1, 3], x[2, 40] = float("nan"), float("inf")
    wanted = torch.zeros(4, 64, dtype=torch.bool)
    wanted[1, : products.block], wanted[2, 32 if products.block else 0 :] = True, True
    assert torch.equal(rounded(x, 1, products).isnan(), wanted)
    assert not rounded(torch.zeros(2, 40), 1, products).any()


@KINDS
def test_output_and_gradient_of_rows_are_a_few_percent_off_and_others_exact(products):
    inputs = inputs_of()
    got, wanted = run(REFERENCE.scaled_mm, inputs, products=products), run(REFERENCE.grouped_mm, inputs)
    for name in ("y", "rows"):
        assert 0.01 < relative_rms(got[name], wanted[name]) < 0.045
    for name in ("weight", "bias"):
        assert torch.equal(got[name], wanted[name])


@KINDS
def test_backward_rounds_the_gradient_and_the_weights_along_what_it_sums_over(products):
    rows, weight, bias = inputs_of()
    y = REFERENCE.scaled_mm(rows, weight, ENDS, bias, products=products)
    grad = torch.randn(60, 80)
    (d_rows,) = torch.autograd.grad(y, rows, grad)
    wanted = rounded(grad, 1, products)[20:50] @ rounded(weight[2].detach(), 1, products).mT
    assert torch.equal(d_rows[20:50], wanted)
    assert not d_rows[50:].any()


def test_blocks_keep_the_digits_of_small_numbers_beside_large_ones():
    x = torch.randn(4, 64) * 10.0 ** torch.tensor([6, 0]).repeat_interleave(32)
    assert not rounded(x, 1, Float8Products())[:, 32:].any()
    assert relative_rms(rounded(x, 1, MXFloat8Products())[:, 32:], x[:, 32:]) < 0.03


@KINDS
def test_small_rows_beside_large_ones_keep_their_digits(products):
    """One scale for all rows would make zeros of the small ones."""
    rows, weight, _ = inputs_of()
    with torch.no_grad():
        rows[::2] *= 1e-7
    y = REFERENCE.scaled_mm(rows, weight, ENDS, products=products)[:50:2]
    assert relative_rms(y, REFERENCE.grouped_mm(rows, weight, ENDS)[:50:2]) < 0.045
