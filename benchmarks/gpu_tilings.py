"""Which block sizes are fastest on this GPU: what `benchmarks/gpu.py --part tune` tries."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from functools import cache, partial

import torch
from gpu_problem import LARGE, TINY, Problem, Shape, problem_of, seconds_of
from gpu_session import Record, Session
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from synchromesh.kernels.fused_mlp.triton import _close_backward, _open
from synchromesh.kernels.grouped_mm.tilings import tilings_of
from synchromesh.kernels.grouped_mm.triton import product, weight_gradient
from synchromesh.kernels.mlp import Net
from synchromesh.kernels.tiles import Tiling, tiles_of, turn_of
from synchromesh.testing.compare import TOLERANCE, relative_rms


def tilings(*, tiny: bool) -> list[Tiling]:
    if tiny:
        return [Tiling(16, 32, 16, 4, 1), Tiling(32, 16, 16, 4, 1)]
    return [Tiling(*one) for one in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))]


def launches(p: Problem) -> dict[str, Callable[[Tiling], Tensor]]:
    """Return the launch of each kind of tiling on a gated layer; tilings change their results in rounding only."""
    net, tokens = Net(p.mlp.up, p.mlp.down, p.mlp.gate), p.rowmap.token_of_rows()
    up, gate, hidden, opened = torch.randn(4, p.shape.rows, p.shape.hidden, device=p.x.device).bfloat16()
    out, d_down, weights = p.x.new_empty(p.shape.rows, p.shape.width), torch.empty_like(p.mlp.down), p.routing.weights
    tiles = cache(partial(tiles_of, p.rowmap.ends, p.shape.rows))
    by, turn = (p.rowmap.pairs, tokens), turn_of(p.x.device)

    def opening(tiling: Tiling) -> Tensor:
        pre = torch.empty_like(up), torch.empty_like(gate)
        _open(p.x, net, tiles(tiling.rows), tiling, tokens, "silu", pre, opened)
        return opened

    return {
        "product": lambda t: product(hidden, net.down, tiles(t.rows), t, out=out),
        "opening": opening,
        "closing": lambda t: _close_backward(p.dy, weights, net, tiles(t.rows), t, by, "silu", (up, gate))[1],
        "weights": lambda t: weight_gradient(hidden, p.dy, p.rowmap.ends, t, out=d_down, tokens=tokens, turn=turn),
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


def compiled(tiling: Tiling, device: str, shapes: list[Shape]) -> None:
    """Compile every kind for a tiling, for layers that differ from these in nothing that Triton compiles for."""
    for shape in shapes:
        p = problem_of(dataclasses.replace(shape, tokens=64, width=256, hidden=256), "balanced", device)
        for launch in launches(p).values():
            refusal(partial(launch, tiling))


def tried(launch: Callable[[Tiling], Tensor], tiling: Tiling, wanted: Tensor) -> Record:
    """Return the seconds of a tiling, or why there are none."""
    run = partial(launch, tiling)
    why = refusal(lambda: run().fill_(torch.nan))  # buffers are used again: what a tiling leaves out must show
    if why is None and relative_rms(run().flatten()[::997], wanted) > TOLERANCE[torch.bfloat16]:
        why = "wrong result"
    return {"refused": why} if why else {"seconds": statistics.median(seconds_of(run) for _ in range(5))}


def tune_part(session: Session) -> None:
    """Time every tiling of every kind on the same layers, and show the best of each kind and number of rows."""
    tiny, rates = session.args.tiny, {}
    shapes, every = (TINY[:1] if tiny else LARGE), tilings(tiny=tiny)
    with session.workers() as workers:
        list(workers.map(partial(compiled, device=session.device, shapes=[] if tiny else shapes), every))
    for shape in shapes:
        p = problem_of(shape, "balanced", session.device)
        used = tilings_of(torch.bfloat16, p.x.device, rows_per_expert=shape.rows // shape.experts)
        for kind, launch in launches(p).items():
            current, flops = getattr(used, kind), shape.product_flops * (2 if kind == "opening" else 1)
            wanted = launch(current).flatten()[::997].clone()
            for tiling in [] if session.late() else dict.fromkeys([current, *every]):
                record = tried(launch, tiling, wanted)
                record["tflops"] = flops / record["seconds"] / 1e12 if "seconds" in record else 0.0
                about = {"kind": kind, "shape": str(shape), "tiling": dataclasses.asdict(tiling)}
                session.write("tune", {**about, "current": tiling == current, **record})
                rates.setdefault((kind, tiling.rows), {}).setdefault(tiling, []).append(record["tflops"])
    table = Table("kind", "best tiling of its rows", f"TFLOP/s on {', '.join(map(str, shapes))}")
    for (kind, _), found in sorted(rates.items()):
        best = max(found, key=lambda tiling: math.prod(found[tiling]))
        table.add_row(kind, str(best), " / ".join(f"{rate:.3g}" for rate in found[best]))
    Console(width=200).print(table)
