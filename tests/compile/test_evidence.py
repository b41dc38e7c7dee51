"""What the figures of docs/kernels.md rest on: what kernels are compiled to at sizes of models, and how many launch."""

import json
from pathlib import Path

import pytest
import torch

from synchromesh import FixedCapacity, GatedMLPExperts, Local, MoE, TopKRouter
from synchromesh.kernels.gpu import GLUON, TRITON
from synchromesh.testing.launches import Recorder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Kernel: registers of a thread, instructions of its loop, operations for each byte that a tile reads. Bounds leave room
# for another compiler's taste; 255 registers is where spilling begins.
BOUNDS = {
    "open_rows": (255, 110, 85),
    "_product": (250, 115, 85),
    "close_rows_backward": (245, 80, 64),
    "_weight_gradient": (240, 320, 85),
}
FEW = {"_open_few": 128, "_close_few": 128}  # registers: four programs on a multiprocessor
MOST_LAUNCHES = {"forward": 30, "backward": 43, "few tokens": 6}  # Triton's and torch's, losses and statistics included


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compiled

    return compiled


@pytest.fixture(scope="module")
def large():
    """The lines of a large model, made once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        import compiled

        return compiled.lines_of(compiled.Options(name="after"), "sm_90", "qwen3-235b")


def test_products_of_a_large_model_keep_their_registers_loops_and_launches(large):
    for line in large:
        if line["kernel"] == "launches":
            assert line["triton"] + line["torch"] <= MOST_LAUNCHES[line["pass"]], line
            continue
        if line["kernel"] in FEW:
            assert line["spilled"] == 0, line
            assert line["registers"] <= FEW[line["kernel"]], line
            continue
        registers, loop, intensity = BOUNDS[line["kernel"]]
        assert line["spilled"] == 0, line
        assert line["registers"] <= registers, line
        assert 0 < line["loop"] <= loop, line
        assert line["flop_per_byte"] >= intensity, line


@pytest.mark.parametrize(("target", "name"), [("sm_90", "deepseek-v3"), ("sm_100", "swin, one choice")])
def test_no_product_spills_at_other_sizes(compiled, target, name):
    for line in compiled.lines_of(compiled.Options(), target, name):
        assert line.get("spilled", 0) == 0, line
        assert line.get("shared", 0) <= 227 * 1024, line


@pytest.mark.parametrize("family", [TRITON, GLUON], ids=["triton", "gluon"])
def test_a_token_with_one_choice_needs_no_sum_over_rows(compiled, family):
    for recorder in compiled.recorded("sm_90", compiled.SHAPES["swin, one choice"], family):
        names = {launch.kernel for launch in recorder.launches}
        assert "_sum_rows" not in names
        assert "_fill_absent" in names


def test_a_training_step_marks_broken_tokens_in_its_sums_and_not_in_a_pass_of_its_own():
    with torch.device("meta"):
        layer = MoE(TopKRouter(64, 4, k=2), GatedMLPExperts(4, 64, hidden=32), capacity=FixedCapacity(1.0))
    layer.strategy = Local(kernels=TRITON)
    x = torch.empty(48, 64, device="meta", requires_grad=True)
    forward, backward = Recorder(), Recorder()
    with forward.recording():
        y = layer(x)
    with backward.recording():
        y.backward(torch.empty_like(y))
    assert not {"masked_fill", "isnan", "any"} & {*forward.operations, *backward.operations}
    assert {dict(one.constants)["MARKED"] for one in forward.launches if one.kernel == "_sum_rows"} == {True}
    assert "_mark_tokens" not in {one.kernel for one in forward.launches}
    assert [one.kernel for one in backward.launches].count("_unmark_tokens") == 1


def test_the_file_of_figures_is_what_kernels_are_compiled_to_now(large):
    """Figures that are out of date would be quoted: make them again by the script."""
    lines = [json.loads(line) for line in (BENCHMARKS / "results" / "compiled.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["state"] == "after" and line["shape"] == "qwen3-235b"]
    assert [line["kernel"] for line in kept] == [line["kernel"] for line in large]
    for was, now in zip(kept, large, strict=True):
        for name in ("tile", "stages", "spilled", "unit", "triton"):
            assert was.get(name) == now.get(name), (was, now)


def test_the_file_of_figures_is_what_gluon_kernels_are_compiled_to_now(compiled):
    name = "swin, one choice"
    now = compiled.lines_of(compiled.Options(name="gluon", gluon=True), "sm_100", name)
    lines = [json.loads(line) for line in (BENCHMARKS / "results" / "compiled.jsonl").read_text().splitlines()]
    kept = [line for line in lines if (line["state"], line["target"], line["shape"]) == ("gluon", "sm_100", name)]
    assert [line["kernel"] for line in kept] == [line["kernel"] for line in now]
    for was, line in zip(kept, now, strict=True):
        assert line.get("spilled", 0) == 0, line
        for figure in ("tile", "stages", "unit", "shared", "triton"):
            assert was.get(figure) == line.get(figure), (was, line)
