"""The calls of benchmarks/gpu.py, dry: a clock of their own, tiny shapes, Triton's interpreter."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from synchromesh.kernels.grouped_mm.blocks import Tilings
from synchromesh.kernels.grouped_mm.tuned import Tuned
from synchromesh.kernels.tiles import Tiling

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass
class Clock:
    """A clock that goes on when it is told to, and a little whenever it is read."""

    now: float = 1000.0
    tick: float = 0.0
    read: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        self.read.append(self.now)
        self.now += self.tick
        return self.read[-1]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def session_of(tmp_path, clock, minutes=9.0, **given):
    from gpu_session import Args, session_of

    out = tmp_path / "records.jsonl"
    return session_of(Args(tiny=True, minutes=minutes, seconds=0.0, commit="abc", out=out, **given), clock)


def records_of(session):
    return [json.loads(line) for line in session.out.read_text().splitlines()] if session.out.exists() else []


def spending(clock, seconds, order):
    """Return stages that take these seconds, of which none looks at the clock."""

    def run(name):
        def stage(session):
            order.append((name, session.left()))
            clock.now += seconds[name]
            return True

        return stage

    return {name: run(name) for name in seconds}


@pytest.mark.parametrize("call", ["prove", "tune", "table"])
def test_a_call_plans_less_than_ten_minutes(call):
    from gpu_calls import CALLS, minutes

    assert 0 < minutes(CALLS[call]) <= 9.5
    assert all(stage.minutes > 0 for stage in CALLS[call])


def test_stages_run_in_order_and_what_one_leaves_over_goes_to_the_next(tmp_path):
    from gpu_calls import CALLS, run_stages

    clock, order = Clock(), []
    seconds = {"smoke": 20.0, "warm": 100.0, "check": 250.0, "twice": 61.0, "graphs": 70.0, "gluon": 9.0}
    session = session_of(tmp_path, clock, 9.0)
    assert run_stages(CALLS["prove"], spending(clock, seconds, order), session)
    assert order == [
        ("smoke", 60.0),
        ("warm", 130.0),
        ("check", 210.0),
        ("twice", 20.0),
        ("graphs", 49.0),
        ("gluon", 39.0),
    ]
    told = records_of(session)
    assert [(one["stage"], one["cut"]) for one in told] == [
        *[("smoke", False), ("warm", False), ("check", True), ("twice", True), ("graphs", True), ("gluon", False)]
    ]


def test_a_stage_without_time_is_left_out_and_told_of(tmp_path):
    from gpu_calls import CALLS, run_stages

    clock, order = Clock(), []
    session = session_of(tmp_path, clock, 9.0)
    assert run_stages(CALLS["tune"], spending(clock, {"tune": 600.0, "choose": 1.0}, order), session)
    assert [name for name, _ in order] == ["tune"]
    assert records_of(session)[-1]["left_out"] == "no time is left"


def test_after_a_failed_check_nothing_is_measured(tmp_path):
    from gpu_calls import CALLS, run_stages

    clock, order = Clock(), []
    runs = spending(clock, dict.fromkeys(("smoke", "warm", "check", "twice", "graphs"), 1.0), order)
    runs["check"] = lambda session: False
    session = session_of(tmp_path, clock)
    assert not run_stages(CALLS["prove"], runs, session)
    assert [name for name, _ in order] == ["smoke", "warm"]
    assert records_of(session)[-1]["left_out"] == "check failed"


def test_a_stage_that_breaks_off_leaves_the_others_their_time(tmp_path):
    from gpu_calls import CALLS, run_stages

    def broken(session):
        raise RuntimeError("no kernel image")

    clock, order = Clock(), []
    runs = spending(clock, {"choose": 1.0}, order) | {"tune": broken}
    session = session_of(tmp_path, clock)
    assert not run_stages(CALLS["tune"], runs, session)
    assert order == [("choose", 540.0)]
    assert "no kernel image" in records_of(session)[0]["error"]


def test_a_cut_check_has_checked_the_layers_own_kernel_and_names_the_rest(tmp_path, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "evil_cases", list)
    clock = Clock(tick=1.0)
    session = session_of(tmp_path, clock).within(2.0)
    assert gpu_check.check_part(session)
    told = records_of(session)
    checked = [one for one in told if "passed" in one]
    assert {(one["kernel"], one["dtype"]) for one in checked} == {("fused_mlp", "bfloat16")}
    assert all(one["passed"] for one in checked)
    left = [one for one in told if "left_out" in one]
    assert {"grouped_mm", "gather", "combine", "positions"} <= {one["kernel"] for one in left}


@pytest.mark.parametrize(
    ("kernel", "kind", "case"),
    [
        ("direct_mlp", "int8 gated_biased", "empty_experts"),
        ("marked_mlp", "gated", "absent_and_dropped"),
        ("marked_mlp", "biased", "every_pair_dropped"),
    ],
)
def test_few_tokens_and_marks_are_checked(kernel, kind, case, monkeypatch):
    import gpu_check

    cases = [one for one in gpu_check.evil_cases() if one.name == case]
    monkeypatch.setattr(gpu_check, "evil_cases", lambda: cases)
    monkeypatch.setattr(gpu_check, "TINY", [])
    task = gpu_check.Task(kernel, kind, "silu", torch.float32)
    assert task.kernel in {one.kernel for one in gpu_check.tasks_of(("float32",))}
    (found,) = gpu_check.checked(task, "cpu", True)
    assert found["passed"], found


def test_tokens_that_differ_with_their_company_are_found_out(monkeypatch):
    import gpu_check

    own = gpu_check.TRITON
    company = replace(own, direct_mlp=lambda x, *given: own.direct_mlp(x, *given) + 1e-7 * len(x))
    monkeypatch.setattr(gpu_check, "TRITON", company)
    case = next(one for one in gpu_check.evil_cases() if one.name == "empty_experts")
    task = gpu_check.Task("direct_mlp", "gated", "silu", torch.float32)
    assert gpu_check.errors(task, case, (10, 17), "cpu")["bits that differ alone"] > 0


def test_a_kernel_that_fails_fails_the_call(tmp_path, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "tasks_of", lambda dtypes: [gpu_check.Task("gather", "plain", "", torch.bfloat16)])
    monkeypatch.setattr(gpu_check, "checked", lambda *given: 1 / 0)
    session = session_of(tmp_path, Clock())
    assert not gpu_check.check_part(session)
    assert "ZeroDivisionError" in records_of(session)[0]["error"]


def test_bits_that_differ_are_counted():
    import gpu_smoke

    runs = iter([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])])
    assert gpu_smoke.differing(lambda: {"output": next(runs), "kept": torch.ones(1)}, times=3) == {"output": 1}


def test_all_shapes_are_compiled_ahead_as_small_ones():
    import gpu_smoke
    from gpu_problem import SHAPES

    large = Tilings(*[Tiling(128, 256, 64, 8, 3)] * 4)
    for shape in SHAPES:
        less = gpu_smoke.small(shape)
        assert large.lowered(less.rows // less.experts) == large.lowered(shape.rows // shape.experts)
        assert (less.choices, less.gated) == (shape.choices, shape.gated)
        assert less.choices <= less.experts <= 32
        assert less.tokens <= 8192
        assert less.width <= 1024


SMALL, WIDE, LOW = Tiling(64, 64, 64, 4, 3), Tiling(128, 256, 64, 8, 3), Tiling(128, 64, 64, 8, 3)


def test_the_fastest_tilings_over_all_shapes_are_taken_and_their_rows_agree():
    from gpu_tilings import best_tilings

    seconds = {
        ("product", WIDE): [1.0, 4.0], ("product", LOW): [3.0, 1.0], ("product", SMALL): [0.5, 1.0],
        ("opening", WIDE): [1.0, 1.0], ("opening", SMALL): [2.0, 2.0],
        ("closing", LOW): [1.0, 1.0], ("closing", SMALL): [9.0, 9.0],
        ("weights", WIDE): [5.0, 1.0], ("weights", SMALL): [2.0, 2.0], ("weights", LOW): [0.1],
    }  # fmt: skip
    # SMALL is the fastest product, but its three kinds together take 0.5 * 4 * 81 against 3 * 1 * 1 of 128 rows.
    assert best_tilings(seconds, 2) == Tilings(LOW, WIDE, LOW, SMALL)
    assert best_tilings({key: times for key, times in seconds.items() if key[0] != "closing"}, 2) is None


class Launches:
    """Launches of one kind, of which a tiling of 32 rows is wrong and others take as long as they have columns."""

    def __init__(self, clock):
        self.clock, self.out = clock, torch.ones(5000, dtype=torch.bfloat16)

    def __call__(self, tiling):
        self.clock.now += tiling.cols
        return self.out.fill_(2.0 if tiling.rows == 32 and tiling.cols == 16 else 1.0)


def test_what_was_tuned_is_what_the_kernels_read(tmp_path, monkeypatch):
    import gpu_tilings

    clock = Clock()
    monkeypatch.setattr(gpu_tilings, "launches", lambda p: dict.fromkeys(gpu_tilings.CANDIDATES, Launches(clock)))
    monkeypatch.setattr(gpu_tilings, "seconds_of", lambda run: -clock.now + (run(), clock.now)[1])
    session = session_of(tmp_path, clock, minutes=1000.0)
    assert gpu_tilings.tune_part(session)
    (made,) = Tuned.from_json((tmp_path / "tuned.json").read_text()).tunings
    assert (made.architecture, made.commit) == ("cpu", "abc")
    told = records_of(session)
    assert {one["refused"] for one in told if "refused" in one} == {"wrong result"}
    assert made.tilings.weights.cols == 32


def test_a_cut_tuning_writes_nothing(tmp_path, monkeypatch):
    import gpu_tilings

    clock = Clock()
    monkeypatch.setattr(gpu_tilings, "launches", lambda p: dict.fromkeys(gpu_tilings.CANDIDATES, Launches(clock)))
    monkeypatch.setattr(gpu_tilings, "seconds_of", lambda run: -clock.now + (run(), clock.now)[1])
    assert not gpu_tilings.tune_part(session_of(tmp_path, clock, minutes=1.0))
    assert not (tmp_path / "tuned.json").exists()


def test_a_cut_table_has_the_even_loads_and_names_what_is_left(tmp_path, monkeypatch):
    import gpu_time

    monkeypatch.setattr(gpu_time, "HERE", {name: gpu_time.HERE[name] for name in ("fused", "grouped_mm")})
    clock = Clock(tick=1.0)
    session = session_of(tmp_path, clock, shapes=(1, 0)).within(1.5)
    assert gpu_time.time_part(session)
    told = records_of(session)
    assert [(one["shape"][:2], one["routing"], one.get("pass")) for one in told] == [
        *[("40", "balanced", "forward"), ("40", "balanced", "both")],
        *[("48", "balanced", None), ("40", "zipf", None), ("48", "zipf", None)],
    ]
    assert {"fused", "grouped_mm", "dense", "bytes"} <= set(told[0]["seconds"])
    assert "gated experts only" in told[0]["skipped"]["transformers"]


def test_experts_of_transformers_take_part_and_absent_libraries_say_so():
    from gpu_problem import TINY, disagreements, grouped, problem_of
    from gpu_rivals import Contestant, libraries

    p = problem_of(TINY[0], "zipf", "cpu")
    found = libraries(p)
    assert isinstance(found["transformers"], Contestant)
    assert disagreements(p, {"grouped_mm": grouped(p, scatter=True), "other": found["transformers"]})["other"] < 0.02
    assert all("ModuleNotFoundError" in found[name] for name in ("liger", "sonicmoe") if name not in sys.modules)


def test_kernels_that_no_card_has_run_are_tried_in_a_process_of_their_own(tmp_path, monkeypatch):
    import gpu_gluon

    session = session_of(tmp_path, Clock())
    assert gpu_gluon.gluon_part(session)
    assert "nothing to run here" in records_of(session)[-1]["said"]
    (tmp_path / "hangs.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    monkeypatch.setattr(gpu_gluon, "__file__", str(tmp_path / "hangs.py"))
    assert not gpu_gluon.gluon_part(session.within(1.0))
    assert "not done after 1 s" in records_of(session)[-1]["left_out"]


def test_a_call_without_a_word_says_what_to_do(capsys):
    import gpu
    from gpu_session import Args

    assert gpu.main(Args(tiny=True)) == 2
    assert "--call" in capsys.readouterr().out
