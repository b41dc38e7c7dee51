"""The steps that are captured as CUDA graphs, in the interpreter: they read nothing on the host, and are right."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from triton.runtime.interpreter import GridExecutor

from synchromesh import Local
from synchromesh.kernels import REFERENCE
from synchromesh.testing.compare import assert_close
from synchromesh.testing.reads import HostReads

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_graphs

    return gpu_graphs


def noted(step):
    """Run a step; return its results, what it read between its launches, and these. A launch interpreted reads all."""
    launch, launches = GridExecutor.__call__, []
    with HostReads() as reads:

        def aside(executor, *args, **kwargs):
            launches.append(executor.fn.__name__)
            with reads.aside():
                return launch(executor, *args, **kwargs)

        with patch.object(GridExecutor, "__call__", aside):
            results = step()
    return results, reads.found, set(launches)


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("name", ["capacity 1.25", "dropless"])
def test_a_step_reads_nothing_on_the_host_and_is_right(graphs, trains, name):
    for shape in graphs.SMALL:
        step = graphs.step_of(shape, graphs.CAPACITIES[name], "cpu", trains=trains)
        plain = graphs.twin(step)
        plain.layer.strategy = Local(kernels=REFERENCE)
        got, found, launches = noted(step)
        assert found == []
        assert {"_select", "_count_block", "_place_block", "_map_rows"} < launches
        assert {"_sum_rows", "_fill_absent"} & launches  # the second where tokens have one choice
        for part, wanted in plain().items():
            assert_close(part, got[part], wanted)


def test_the_benchmark_captures_and_compares_them(graphs, monkeypatch, tmp_path):
    from gpu_session import Args, session_of

    monkeypatch.delitem(graphs.CAPACITIES, "dropless")
    session = session_of(Args(part=("graphs",), tiny=True, commit="abc", out=tmp_path / "records.jsonl"))
    assert graphs.graphs_part(session)
    records = [json.loads(line) for line in session.out.read_text().splitlines()]
    assert [record["pass"] for record in records] == ["forward", "step"]
    assert all(record["passed"] and set(record["seconds"]) == {"eager", "replayed"} for record in records)
