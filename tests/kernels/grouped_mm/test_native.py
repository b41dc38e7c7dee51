from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import assert_close, check

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
BFLOAT16 = torch.bfloat16


def inputs_of(ends, num_rows, shape, *, bias=True, dtype=BFLOAT16):
    """Rows with a NaN tail, weights of unit output."""
    num_experts, width, out = shape
    rows = torch.randn(num_rows, width)
    rows[int(ends[-1]) :] = float("nan")
    inputs = {"rows": rows, "weight": torch.randn(num_experts, width, out) / width**0.5}
    inputs |= {"bias": torch.randn(num_experts, out)} if bias else {}
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def kept(multiply, ends, *, transposed=False):
    """Multiply, and look at what lies before the tail."""

    def run(rows, weight, bias=None):
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        return multiply(rows, weight, ends, bias)[: int(ends[-1])]

    return run


@CASES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_every_gradient(case: Case, bias, transposed):
    ends, num_rows = case.rowmap().ends, len(case.rowmap().pairs)
    inputs = inputs_of(ends, num_rows, (case.num_experts, 24, 40), bias=bias)
    with patch.object(F, "grouped_mm", unwritten(F.grouped_mm)):
        check(kept(native.grouped_mm, ends, transposed=transposed), kept(REFERENCE.grouped_mm, ends), inputs)


def unwritten(multiply):
    """Leave unwritten what some GPUs do: rows after the last expert's, and matrices of experts without rows."""

    def run(a, b, *, offs):
        out = multiply(a, b, offs=offs)
        missing = torch.arange(len(out)) >= offs[-1]
        if b.dim() == 2:
            missing = offs.diff(prepend=offs.new_zeros(1)) == 0
        return out.masked_fill_(missing.view(-1, *[1] * (out.dim() - 1)), torch.nan)

    return run


@pytest.mark.parametrize(("dtype", "width", "out"), [(BFLOAT16, 7, 8), (BFLOAT16, 8, 5), (torch.float32, 8, 8)])
def test_what_torch_does_not_take_goes_to_the_reference(dtype, width, out):
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    with patch.object(F, "grouped_mm", side_effect=AssertionError("not to be called")):
        inputs = inputs_of(ends, 9, (3, width, out), dtype=dtype)
        check(kept(native.grouped_mm, ends), kept(REFERENCE.grouped_mm, ends), inputs)


def test_rows_and_matrices_at_odd_places_are_copied():
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (3, 16, 8), bias=False)
    rows = torch.randn(9 * 16 + 1).to(BFLOAT16)[1:].view(9, 16)  # 2 bytes after an aligned place
    weight = torch.randn(3, 16, 9).to(BFLOAT16)[:, :, 1:]  # steps of 18 bytes
    wanted = REFERENCE.grouped_mm(rows, weight, ends)[:8]
    assert_close("rows", native.grouped_mm(rows, weight, ends)[:8], wanted)
    apart = inputs["weight"].repeat(1, 2, 1)[:, 16:]  # one of two matrices in one tensor
    check(
        lambda rows: native.grouped_mm(rows, apart, ends)[:8],
        lambda rows: REFERENCE.grouped_mm(rows, apart, ends)[:8],
        {"rows": inputs["rows"]},
    )


def test_a_gradient_lies_as_its_parameter_does():
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    up = torch.randn(3, 8, 16).to(BFLOAT16).requires_grad_()
    native.grouped_mm(torch.randn(9, 16).to(BFLOAT16), up.mT, ends)[:8].sum().backward()
    assert up.grad.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_registrations_agree_with_the_kernel(transposed):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    weight = torch.randn(3, 16, 8).transpose(1, 2) if transposed else torch.randn(3, 8, 16)
    for bias in (None, torch.randn(3, 16).to(BFLOAT16).requires_grad_()):
        rows = torch.randn(5, 8).to(BFLOAT16).requires_grad_()
        args = (rows, weight.to(BFLOAT16).detach().requires_grad_(), ends, bias)
        torch.library.opcheck(torch.ops.synchromesh.grouped_mm_native.default, args)


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        native.grouped_mm(torch.randn(2, 8).bfloat16(), torch.randn(1, 8, 8), torch.tensor([2], dtype=torch.int32))


def test_it_is_chosen_where_it_was_measured_faster_and_fits(monkeypatch):
    cells = [Cell(kind, "bfloat16", 4, 16, 64, 32, 2e-3, 1e-3) for kind in Kind]
    table = Choices((Measurement("cpu", "a CPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", tuple(cells)),))
    rows = torch.randn(64, 64).to(BFLOAT16)
    assert not native.is_faster(Kind.PRODUCT, rows, (4, 64, 32))  # nothing is measured on a CPU
    monkeypatch.setattr(native, "shipped", lambda: table)
    assert native.is_faster(Kind.PRODUCT, rows, (4, 64, 32))
    assert native.is_faster(Kind.WEIGHTS, rows, (4, 64, 32))
    assert not native.is_faster(Kind.PRODUCT, rows.float(), (4, 64, 32))
    assert not native.is_faster(Kind.PRODUCT, rows, (4, 64, 33))
    assert not native.is_faster(Kind.PRODUCT, rows, (1024, 64, 32))


class OnGpu(torch.Tensor):
    """Rows on a GPU, as far as one asks them where they are."""

    device, is_cuda = torch.device("cuda"), True


@pytest.mark.parametrize(
    ("major", "minor", "wanted"), [(8, 0, False), (9, 0, True), (10, 0, True), (10, 3, False), (12, 0, False)]
)
def test_it_is_never_chosen_where_it_reads_on_the_host_nor_where_its_gradients_were_nan(
    monkeypatch, major, minor, wanted
):
    cell = Cell(Kind.PRODUCT, "bfloat16", 4, 16, 64, 32, 2e-3, 1e-3)
    name, rows = f"sm_{major}{minor}", torch.randn(64, 64).to(BFLOAT16).as_subclass(OnGpu)
    table = Choices((Measurement(name, "a GPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", (cell,)),))
    monkeypatch.setattr(native, "shipped", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    assert native.is_faster(Kind.PRODUCT, rows, (4, 64, 32)) == wanted
