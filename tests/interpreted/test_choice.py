"""Products choose between Triton's kernels and torch's own grouped_mm by a table: both ways, the same numbers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.fused_mlp.few import is_few
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.testing.cases import row_map_of, zipf
from synchromesh.testing.compare import check

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
T, D, HIDDEN, E = 40, 16, 24, 5


def table(faster):
    """Say of the products below that torch is faster for these kinds."""
    cells = tuple(Cell(k, "bfloat16", E, 16, 16, 24, 2e-3, 1e-3 if k in faster else 3e-3) for k in Kind)
    return Choices((Measurement("cpu", "a CPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", cells),))


@pytest.fixture
def calls(monkeypatch):
    """The shapes that torch's grouped_mm is called with."""
    made, multiply = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, *, offs: made.append(b.dim()) or multiply(a, b, offs=offs))
    return made


FASTER = pytest.mark.parametrize("faster", [[], [Kind.PRODUCT], [Kind.WEIGHTS], list(Kind)], ids=str)


@FASTER
def test_grouped_mm(monkeypatch, calls, faster):
    monkeypatch.setattr(native, "shipped", lambda: table(faster))
    rowmap = row_map_of(zipf(T, E, 2), E, capacity=20)
    ends, kept = rowmap.ends, int(rowmap.ends[-1])
    inputs = {"rows": torch.randn(len(rowmap.pairs), D), "weight": torch.randn(E, D, HIDDEN) / 4}
    inputs["bias"] = torch.randn(E, HIDDEN)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    check(
        lambda rows, weight, bias: TRITON.grouped_mm(rows, weight, ends, bias)[:kept],
        lambda rows, weight, bias: REFERENCE.grouped_mm(rows, weight, ends, bias)[:kept],
        inputs,
    )
    assert calls == [3] * 2 * (Kind.PRODUCT in faster) + [2] * (Kind.WEIGHTS in faster)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@FASTER
def test_products_of_fused_mlp(monkeypatch, calls, faster, gated):
    """The closing product, and backward's to the tokens where there is no gate; others gather, or add two products."""
    monkeypatch.setattr(native, "shipped", lambda: table(faster))
    rowmap = row_map_of(zipf(T, E, 2), E, capacity=20)
    names = ("up", "down", "gate") if gated else ("up", "down")
    inputs = {name: torch.randn(E, HIDDEN, D) / 4 for name in names} | {"down_bias": torch.randn(E, D)}
    inputs |= {"x": torch.randn(T, D), "weights": torch.rand(T, 2)}
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}

    def run(kernels):
        return lambda x, weights, **mlp: kernels.fused_mlp(x, weights, rowmap, MLPWeights(**mlp), F.silu)

    check(run(TRITON), run(REFERENCE), inputs)
    assert calls == [3] * (1 if gated else 2) * (Kind.PRODUCT in faster)


def test_float32_stays_with_triton(monkeypatch, calls):
    monkeypatch.setattr(native, "shipped", lambda: table(list(Kind)))
    TRITON.grouped_mm(torch.randn(32, D), torch.randn(2, D, HIDDEN), torch.tensor([16, 32], dtype=torch.int32))
    assert calls == []


def test_the_benchmark_writes_a_table_that_the_kernels_read(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_choice
    from gpu_session import Args, session_of

    old = Choices((Measurement("sm_90", "a GPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", ()),))
    path = tmp_path / "table.json"
    path.write_text(old.to_json())
    session = session_of(Args(part=("choose",), tiny=True, commit="abc", out=tmp_path / "records.jsonl", table=path))
    assert gpu_choice.choose_part(session)
    kept, made = Choices.from_json(path.read_text()).measurements
    assert (kept, made.architecture, made.commit) == (old.measurements[0], "cpu", "abc")
    assert [cell.kind for cell in made.cells] == [Kind.PRODUCT, Kind.WEIGHTS]
    records = [json.loads(line) for line in session.out.read_text().splitlines()]
    assert [one["part"] for one in records] == ["few"] * 2 + ["choose"] * len(made.cells)


def test_few_tokens_are_timed_with_tiles_and_without_and_a_wrong_way_is_told(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_choice
    from gpu_session import Args, session_of

    session, kernels = session_of(Args(tiny=True, out=tmp_path / "records.jsonl")), gpu_choice.fused_mlp
    assert gpu_choice.few_part(session)
    assert kernels.is_few is is_few
    told = [json.loads(line) for line in session.out.read_text().splitlines()]
    assert [one["rows_per_expert"] for one in told] == [1.0, 4.0]
    assert all(one["few"] > 0 and one["tiles"] > 0 and one["passed"] for one in told)
    right = kernels.rows_of_few
    monkeypatch.setattr(kernels, "rows_of_few", lambda *given: right(*given) * 1.1)
    assert not gpu_choice.few_part(session)


@pytest.mark.parametrize("minutes", [0, 9])
def test_a_run_of_fewer_cells_leaves_the_table_alone(monkeypatch, tmp_path, minutes):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_choice
    from gpu_session import Args, session_of

    cells = tuple(Cell(Kind.PRODUCT, "bfloat16", 2, rows, 32, 64, 1.0, 2.0) for rows in (16, 32, 64))
    old = Choices((Measurement("cpu", "a CPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", cells),))
    path = tmp_path / "table.json"
    path.write_text(old.to_json())
    out = tmp_path / "records.jsonl"
    session = session_of(Args(part=("choose",), tiny=True, minutes=minutes, commit="abc", out=out, table=path))
    assert gpu_choice.choose_part(session)
    assert Choices.from_json(path.read_text()) == old


def test_the_benchmark_keeps_no_time_of_a_wrong_product(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_choice
    from gpu_session import Args, session_of

    right = native.product
    monkeypatch.setattr(native, "product", lambda *args: right(*args) * 1.1)
    session = session_of(Args(tiny=True, out=tmp_path / "records.jsonl"))
    assert not gpu_choice.choose_part(session)
    (made,) = Choices.from_json((tmp_path / "measured.json").read_text()).measurements
    assert [cell.kind for cell in made.cells] == [Kind.WEIGHTS]
