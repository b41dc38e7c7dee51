"""Which block sizes are fastest on this GPU: what `benchmarks/gpu.py --part tune` tries and applies."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from gpu_problem import LARGE, TINY, Problem, Shape, problem_of, seconds_of
from gpu_session import Record, Session
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

import synchromesh.kernels.grouped_mm as family
from synchromesh.kernels.fused_mlp.triton import _close_backward, _open
from synchromesh.kernels.grouped_mm.choice import architecture_of
from synchromesh.kernels.grouped_mm.tilings import Tilings, tilings_of
from synchromesh.kernels.grouped_mm.triton import product, weight_gradient
from synchromesh.kernels.grouped_mm.tuned import FILE, Tuned, Tuning, shipped
from synchromesh.kernels.mlp import Net
from synchromesh.kernels.tiles import Tiling, tiles_of
from synchromesh.testing.compare import TOLERANCE, relative_rms

# Rows, columns, depth, warps, stages. Few, so that all are timed in minutes: what shared memory and registers of sm_90
# and sm_100 allow, around what is in use.
CANDIDATES: Mapping[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "product": (
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4)),
        *((128, 128, 128, 8, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (64, 128, 128, 4, 3)),
    ),
    "opening": (
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
        *((128, 128, 64, 4, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3)),
    ),
    "closing": (
        *((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 4)),
        *((64, 128, 64, 4, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4)),
    ),
    "weights": (
        *((128, 256, 64, 8, 3), (128, 256, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 5)),
        *((256, 128, 64, 8, 3), (128, 256, 64, 8, 4), (64, 128, 64, 4, 4)),
    ),
}


def candidates(kind: str, *, tiny: bool) -> list[Tiling]:
    if tiny:
        return [Tiling(16, 32, 16, 4, 1), Tiling(32, 16, 16, 4, 1)]
    return [Tiling(*one) for one in CANDIDATES[kind]]


def launches(p: Problem) -> dict[str, Callable[[Tiling], Tensor]]:
    """Return the launch of each kind of tiling on a gated layer; tilings change their results in rounding only."""
    net, tokens = Net(p.mlp.up, p.mlp.down, p.mlp.gate), (p.rowmap.pairs, p.shape.choices)
    up, gate, hidden, opened = torch.randn(4, p.shape.rows, p.shape.hidden, device=p.x.device).bfloat16()
    out, d_down, weights = p.x.new_empty(p.shape.rows, p.shape.width), torch.empty_like(p.mlp.down), p.routing.weights
    tiles = cache(partial(tiles_of, p.rowmap.ends, p.shape.rows))

    def opening(tiling: Tiling) -> Tensor:
        pre = torch.empty_like(up), torch.empty_like(gate)
        _open(p.x, net, tiles(tiling.rows), tiling, tokens, "silu", pre, opened)
        return opened

    return {
        "product": lambda t: product(hidden, net.down, tiles(t.rows), t, out=out),
        "opening": opening,
        "closing": lambda t: _close_backward(p.dy, weights, net, tiles(t.rows), t, tokens, "silu", [up, gate])[1],
        "weights": lambda t: weight_gradient(hidden, p.dy, p.rowmap.ends, t, out=d_down, tokens=tokens),
    }


def refusal(run: Callable[[], object]) -> str | None:
    """Return why Triton cannot compile or launch a kernel."""
    try:
        run()
    except TritonError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    except RuntimeError as error:
        if "PassManager" not in str(error):  # Triton's compiler has no type of its own for its passes
            raise
        return str(error)
    return None


def tried(launch: Callable[[Tiling], Tensor], tiling: Tiling, wanted: Tensor) -> Record:
    """Return the seconds of a tiling, or why there are none."""
    run = partial(launch, tiling)
    why = refusal(lambda: run().fill_(torch.nan))  # buffers are used again: what a tiling leaves out must show
    if why is None and relative_rms(run().flatten()[::997], wanted) > TOLERANCE[torch.bfloat16]:
        why = "wrong result"
    return {"refused": why} if why else {"seconds": statistics.median(seconds_of(run) for _ in range(5))}


Seconds = dict[tuple[str, Tiling], list[float]]  # of each shape, in the order of the shapes


def best_tilings(seconds: Seconds, shapes: int) -> Tilings | None:
    """Return the fastest tilings over all shapes, or None where a kind has none that ran on each of them.

    The product of a tiling's times over the shapes counts, so that no shape weighs more than another. The first three
    kinds cut rows alike: the number of rows is the one whose fastest three take least together.
    """
    scores = {key: math.prod(times) for key, times in seconds.items() if len(times) == shapes}

    def fastest(kind: str, rows: int | None = None) -> tuple[float, Tiling] | None:
        found = [(score, one) for (name, one), score in scores.items() if name == kind and rows in (None, one.rows)]
        return min(found, key=lambda each: each[0], default=None)

    weights = fastest("weights")
    sets = []
    for rows in sorted({tiling.rows for _, tiling in scores}):
        three = [fastest(kind, rows) for kind in ("product", "opening", "closing")]
        if all(three):
            sets.append((math.prod(each[0] for each in three if each), [each[1] for each in three if each]))
    if weights is None or not sets:
        return None
    return Tilings(*min(sets, key=lambda each: each[0])[1], weights[1])


def tune_part(session: Session) -> bool:
    """Time the candidates of each kind on the same layers; write the best where kernels read them.

    The next stage of this very run launches with them. A run that was cut before the last shape writes nothing.
    """
    tiny, device = session.args.tiny, session.device
    shapes, seconds = (TINY[:1] if tiny else LARGE), Seconds()
    for shape in shapes:
        p = problem_of(shape, "balanced", device)
        used = tilings_of(torch.bfloat16, p.x.device, rows_per_expert=shape.rows // shape.experts)
        for kind, launch in launches(p).items():
            current, flops = getattr(used, kind), shape.product_flops * (2 if kind == "opening" else 1)
            wanted = launch(current).flatten()[::997].clone()
            for tiling in dict.fromkeys([current, *candidates(kind, tiny=tiny)]):
                about = {"kind": kind, "shape": str(shape), "tiling": dataclasses.asdict(tiling)}
                if session.late():
                    session.write("tune", {**about, "left_out": "no time is left"})
                    continue
                record = tried(launch, tiling, wanted)
                if "seconds" in record:
                    seconds.setdefault((kind, tiling), []).append(record["seconds"])
                    record["tflops"] = flops / record["seconds"] / 1e12
                session.write("tune", {**about, "current": tiling == current, **record})
    show(seconds, shapes)
    best = best_tilings(seconds, len(shapes))
    if best is not None:
        print("->", apply(best, session))
    return best is not None


def show(seconds: Seconds, shapes: list[Shape]) -> None:
    table = Table("kind", "tiling", *(f"{shape}, ms" for shape in shapes))
    for (kind, tiling), times in sorted(seconds.items(), key=lambda each: (each[0][0], math.prod(each[1]))):
        table.add_row(kind, str(tiling), *(f"{1e3 * time:.3f}" for time in times))
    Console(width=200).print(table)


def apply(best: Tilings, session: Session) -> Path:
    """Write tilings into the table, to the records' folder if tiny; the kernels of this process read it again."""
    packaged = Path(family.__path__[0]) / FILE
    path = session.args.tilings or (session.out.with_name(FILE) if session.args.tiny else packaged)
    before = Tuned.from_json(path.read_text()) if path.exists() else Tuned()
    about = {name: session.about[name] for name in ("device", "torch", "triton", "commit", "started")}
    one = Tuning(architecture_of(torch.device(session.device)), "bfloat16", tilings=best, **about)
    path.write_text(before.with_tuning(one).to_json())
    shipped.cache_clear()
    return path
