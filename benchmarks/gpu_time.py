"""The fused kernel beside other ways to the same numbers: what `benchmarks/gpu.py --part time` measures.

Contestants get one fixed routing and are first compared with torch's grouped_mm: one that differs is no contestant.
Rounds are interleaved, times are medians of CUDA events around eager calls: launches are included, the L2 cache is not
flushed. Two limits are timed in the same rounds: *dense*, a bf16 product of two [8192, 8192] matrices, and *bytes*, the
reading of as many bytes as the weights of the experts in use have. Peak memory is above what was there before,
gradients included; saved bytes are x and what else is kept for backward, without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_problem import (
    LARGE,
    RIVALS,
    SHAPES,
    TINY,
    Problem,
    Shape,
    disagreements,
    fused,
    fused_by_gluon,
    grouped,
    memory,
    padded,
    problem_of,
    timed,
    weights_in_use,
)
from gpu_rivals import Contestant, contestant_of, libraries
from gpu_session import Record, Session, clocks
from rich.console import Console
from rich.table import Table

from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.tiles import interpreted
from synchromesh.moe.capacity import Dropless
from synchromesh.testing.compare import TOLERANCE

HERE = {
    "fused": fused,
    "gluon": fused_by_gluon,
    "grouped_mm": partial(grouped, scatter=True),
    "grouped_mm unsorted": partial(grouped, scatter=False),
    "padded bmm": padded,
}
BOUND = TOLERANCE[torch.bfloat16]


def entries(p: Problem, session: Session) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return who takes part, and who does not with the reason."""
    here = {name: make for name, make in HERE.items() if name != "gluon" or session.args.gluon}
    found = {name: contestant_of(make, p) for name, make in here.items()} | libraries(p)
    runs = {name: one for name, one in found.items() if isinstance(one, Contestant)}
    skipped = {name: one for name, one in found.items() if isinstance(one, str)}
    if "grouped_mm" in runs:
        for name, error in disagreements(p, runs).items():
            if not error <= BOUND * (2 if interpreted() else 1):
                skipped[name] = f"differs from grouped_mm by {error:.3g}"
                del runs[name]
    return runs, skipped


def steps_of(p: Problem, side: int) -> dict[str, Callable[[], object]]:
    """Return what is timed beside the contestants: both limits, and the permuting that is inside of most of them."""
    a, b = torch.randn(2, side, side, device=p.x.device).bfloat16()
    x, weights, rows = p.x.detach(), p.routing.weights.detach(), TRITON.gather(p.x.detach(), p.rowmap)
    return {
        "dense": partial(torch.mm, a, b),
        "bytes": partial(torch.amax, weights_in_use(p)),
        "map": partial(Dropless(), p.routing, max),
        "gather": partial(TRITON.gather, x, p.rowmap),
        "combine": partial(TRITON.combine, rows, weights, p.rowmap),
    }


def measure(shape: Shape, routing: str, session: Session) -> Iterator[Record]:
    """Yield one record for the forward and one for forward and backward."""
    p, side = problem_of(shape, routing, session.device), 64 if session.args.tiny else 8192
    runs, skipped = entries(p, session)
    if "fused" not in runs:
        yield {"left_out": f"fused: {skipped.get('fused')}", "skipped": skipped}
        return
    for backward in (False, True):
        every: dict[str, Callable[[], object]] = {
            name: partial(p.run, run, backward=backward) for name, run in runs.items()
        }
        seconds = timed(every | steps_of(p, side), session.args.seconds)
        used = {} if interpreted() else {name: memory(p, run, backward=backward) for name, run in runs.items()}
        record = {"pass": "both" if backward else "forward", "seconds": seconds, "memory": used, "skipped": skipped}
        yield record | clocks() | verdict(shape, seconds, 2 * side**3, backward=backward)


def verdict(shape: Shape, seconds: dict[str, float], dense_flops: int, *, backward: bool) -> Record:
    """Compare the fused kernels with the limits and with the others. Permuting, in part inside them, counts on top."""
    rate = shape.product_flops * (3 if shape.gated else 2) * (3 if backward else 1) / seconds["fused"]
    others = {name: seconds[name] for name in RIVALS if name in seconds}
    best = min(others, key=others.__getitem__, default=None)
    return {
        "tflops": rate / 1e12,
        "of_dense": rate * seconds["dense"] / dense_flops,
        "over_bytes": seconds["fused"] / seconds["bytes"],
        "best_other": best,
        "over_best_other": None if best is None else seconds["fused"] / others[best],
        "permuting": sum(seconds[n] for n in ("map", "gather", "combine")) / (seconds["map"] + seconds["fused"]),
        "saved_formula": 2 * (shape.tokens * shape.width + shape.rows * shape.hidden * (2 if shape.gated else 1)),
    }


def order(session: Session) -> list[tuple[Shape, str]]:
    """Return what to time: every shape with even loads first, then the large ones with a skewed load."""
    shapes = TINY if session.args.tiny else SHAPES
    chosen = [shapes[index] for index in session.args.shapes or range(len(shapes))]
    skewed = [shape for shape in chosen if shape in (TINY if session.args.tiny else LARGE)]
    return [(shape, "balanced") for shape in chosen] + [(shape, "zipf") for shape in skewed]


def time_part(session: Session) -> bool:
    """Time every shape, as far as there is time; the table comes last, a record as soon as it is known."""
    table = Table(*COLUMNS)
    even: dict[tuple[Shape, str], float] = {}
    for shape, routing in order(session):
        about = {"shape": str(shape), "gated": shape.gated, "routing": routing}
        if session.late():
            session.write("time", {**about, "left_out": "no time is left"})
            continue
        try:
            for record in measure(shape, routing, session):
                if "seconds" in record:
                    mine = record["seconds"]["fused"]
                    record["over_balanced"] = mine / even.setdefault((shape, record["pass"]), mine)
                    table.add_row(*cells(about | record))
                session.write("time", about | record)
        except torch.OutOfMemoryError as error:
            session.write("time", {**about, "left_out": str(error)})
    Console(width=240).print(table)
    return True


RATIOS = ("of_dense", "over_bytes", "over_best_other", "permuting", "over_balanced")
COLUMNS = (
    *("T D F E K", "routing", "pass", *(f"{name}, ms" for name in ("fused", "gluon", *RIVALS))),
    *("TFLOP/s", *RATIOS, "saved / formula, peak MiB"),
)


def cells(record: Record) -> list[str]:
    """Return a line of the table; "-" for who took no part."""
    ms = [f"{1e3 * record['seconds'][n]:.2f}" if n in record["seconds"] else "-" for n in ("fused", "gluon", *RIVALS)]
    ratios = ["-" if record[name] is None else f"{record[name]:.2f}" for name in RATIOS]
    used = record["memory"].get("fused", {"saved": 0, "peak": 0})
    saved, formula, peak = (f"{n / 2**20:.0f}" for n in (used["saved"], record["saved_formula"], used["peak"]))
    sizes = f"{saved} / {formula}, {peak}"
    return [record["shape"], record["routing"], record["pass"], *ms, f"{record['tflops']:.1f}", *ratios, sizes]
