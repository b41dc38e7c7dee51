"""grouped_mm by Gluon's kernels, in the emulator, and when it is asked for."""

import pytest
import torch

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.grouped_mm import gluon
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.testing.compare import check

ENDS = torch.tensor([30, 30, 70], dtype=torch.int32)


def inputs_of(dtype, *, bias=False):
    rows = torch.randn(75, 24)
    rows[70:] = torch.nan
    inputs = {"rows": rows, "weight": torch.randn(3, 24, 40) / 5} | ({"bias": torch.randn(3, 40)} if bias else {})
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_and_every_gradient(emulator, dtype, transposed):
    def run(multiply):
        def kept(rows, weight):
            weight = weight.mT.contiguous().mT if transposed else weight
            return multiply(rows, weight, ENDS)[:70]

        return kept

    check(run(gluon.grouped_mm), run(REFERENCE.grouped_mm), inputs_of(dtype))


def test_a_bias(emulator):
    inputs = inputs_of(torch.bfloat16, bias=True)
    with torch.no_grad():
        got, wanted = (each(ends=ENDS, **inputs)[:70] for each in (gluon.grouped_mm, REFERENCE.grouped_mm))
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def table(architecture, kinds, *, gluon_seconds=1e-3):
    cells = tuple(Cell(kind, "bfloat16", 3, 16, 24, 40, 3e-3, 2e-3, gluon_seconds) for kind in kinds)
    about = (architecture, "a GPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z")
    return Choices((Measurement(*about, cells),))


ROWS, SHAPE = torch.zeros(48, 24, dtype=torch.bfloat16), (3, 24, 40)


def test_it_runs_by_itself_only_where_it_was_measured_to_be_fastest(monkeypatch):
    monkeypatch.setattr(gluon, "architecture_of", lambda device: "sm_90")
    assert gluon.takes(ROWS, SHAPE)
    assert not gluon.is_faster(Kind.PRODUCT, ROWS, SHAPE)  # the table that ships says nothing of it
    monkeypatch.setattr(gluon, "shipped", lambda: table("sm_90", [Kind.PRODUCT]))
    assert gluon.is_faster(Kind.PRODUCT, ROWS, SHAPE)
    assert gluon.is_faster(Kind.PRODUCT, ROWS[:1], SHAPE, num_rows=48)
    assert not gluon.is_faster(Kind.WEIGHTS, ROWS, SHAPE)
    monkeypatch.setattr(gluon, "shipped", lambda: table("sm_90", list(Kind), gluon_seconds=2.5e-3))
    assert not any(gluon.is_faster(kind, ROWS, SHAPE) for kind in (Kind.PRODUCT, Kind.WEIGHTS))


@pytest.mark.parametrize(
    ("rows", "shape", "architecture"),
    [
        (ROWS.float(), SHAPE, "sm_90"),
        (ROWS, (3, 20, 40), "sm_90"),
        (ROWS, (3, 24, 0), "sm_90"),
        (ROWS, SHAPE, "sm_120"),
        (ROWS, SHAPE, "gfx942"),
    ],
    ids=["float32", "width_20", "width_0", "sm_120", "gfx942"],
)
def test_what_the_kernels_do_not_take_is_never_theirs(monkeypatch, rows, shape, architecture):
    monkeypatch.setattr(gluon, "architecture_of", lambda device: architecture)
    monkeypatch.setattr(gluon, "shipped", lambda: table(architecture, list(Kind)))
    assert not gluon.takes(rows, shape)
    assert not gluon.is_faster(Kind.PRODUCT, rows, shape)


def test_sm_100_has_every_product_too(monkeypatch):
    monkeypatch.setattr(gluon, "architecture_of", lambda device: "sm_100")
    monkeypatch.setattr(gluon, "shipped", lambda: table("sm_100", list(Kind)))
    assert all(gluon.is_faster(kind, ROWS, SHAPE) for kind in Kind)


def test_a_triton_without_gluon_is_never_asked(monkeypatch):
    monkeypatch.setattr(gluon, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(gluon, "_has_gluon", lambda: False)
    assert not gluon.takes(ROWS, SHAPE)
