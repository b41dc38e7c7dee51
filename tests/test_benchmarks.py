import importlib.util
import json
import sys
from pathlib import Path

import tyro

from synchromesh.testing.programs import run_program
from synchromesh.training.codec import differences, encode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_benchmark_of_transformers_experts_runs(tmp_path):
    out = tmp_path / "figures.jsonl"
    done = run_program(BENCHMARKS / "huggingface.py", "--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 8  # step and decode, two dtypes, two routings
    assert all(set(r["seconds"]) == {"eager", "batched_mm", "grouped_mm", "synchromesh"} for r in records)


def test_the_demo_of_8_bit_products_is_the_recipe_with_such_experts_under_a_name_of_its_own(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", BENCHMARKS / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)  # dataclasses look their module up
    spec.loader.exec_module(demo)
    args = tyro.cli(demo.Args, args=["--products", "float8", "--tile", "64"])
    config, plain = demo.alone("moe", 0, args), demo.alone("moe", 0, demo.Args())
    differ = differences(encode(plain), encode(config))
    assert differ == [
        "model.experts.router.tile: 0 -> 64",
        "model.experts.products: None -> {'kind': 'Float8Products'}",
    ]
    assert demo.name_of("moe", args) == "moe, tile 64, float8"
    assert demo.name_of("moe", demo.Args()) == "moe"
    assert demo.name_of("dense", args) == "dense"
