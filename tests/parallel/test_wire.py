import pytest
import torch

from synchromesh.parallel.wire import AS_IS, Float8


def test_rows_travel_as_they_are_by_default():
    rows = torch.randn(3, 4)
    assert AS_IS.read(AS_IS.write(rows), rows.dtype) is rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eight_bits_are_within_the_stated_error_at_any_scale(dtype, scale):
    rows = (torch.randn(64, 32, dtype=torch.float64) * scale).to(dtype)
    sent = Float8().write(rows)
    assert sent.dtype == torch.uint8
    assert sent.shape == (64, 32 + 4)
    error = (Float8().read(sent, dtype).double() - rows.double()).abs()
    exact = 1 / 128 if dtype == torch.bfloat16 else 1e-6  # what reading in that dtype rounds
    bound = torch.maximum(rows.double().abs() / 16, rows.double().abs().amax(1, keepdim=True) / 2**18)
    assert (error <= bound + exact * rows.double().abs()).all()


def test_zero_rows_and_no_rows_travel():
    assert torch.equal(Float8().read(Float8().write(torch.zeros(2, 4)), torch.float32), torch.zeros(2, 4))
    assert Float8().read(Float8().write(torch.zeros(0, 4)), torch.float32).shape == (0, 4)


def test_a_broken_row_stays_broken_and_alone():
    rows = torch.ones(3, 4)
    rows[1, 2], rows[2, 0] = torch.nan, torch.inf
    back = Float8().read(Float8().write(rows), torch.float32)
    assert torch.equal(back[0], rows[0])
    assert back[1].isnan().any()
    assert not back[2].isfinite().all()


@pytest.mark.parametrize("width", [5, 6, 7])
def test_one_row_of_any_width_travels(width):
    """A single row's scale begins where no float32 may; it must be copied before it is read."""
    rows = torch.randn(1, width)
    assert (Float8().read(Float8().write(rows), torch.float32) - rows).abs().max() < rows.abs().max() / 16
