import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_benchmark_of_transformers_experts_runs(tmp_path):
    out = tmp_path / "figures.jsonl"
    command = [sys.executable, BENCHMARKS / "huggingface.py", "--tiny", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 8  # step and decode, two dtypes, two routings
    assert all(set(r["seconds"]) == {"eager", "batched_mm", "grouped_mm", "synchromesh"} for r in records)
