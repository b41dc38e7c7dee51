"""What comes first on a card: that kernels run at all, are compiled, and give the same bits twice.

smoke: one forward and backward of the layer's kernel, plain and gated, and of few tokens, against torch. warm: all that
will be timed is compiled by many processes at once, into Triton's cache on disk. twice: three runs at large shapes are
compared bit by bit: a race that small shapes hide shows there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from gpu_problem import LARGE, SHAPES, TINY, Problem, Shape, disagreements, fused, grouped, problem_of
from gpu_session import Record, Session, clocks
from rich.console import Console
from rich.table import Table
from torch import Tensor

from synchromesh.kernels.tiles import interpreted
from synchromesh.testing.compare import TOLERANCE

SMOKE = (Shape(512, 256, 512, 8, 2), Shape(512, 256, 512, 8, 1, False), Shape(4, 256, 512, 8, 2))


def smoke_part(session: Session) -> bool:
    """Run each kind of layer once, against torch's grouped_mm."""
    limit, right = TOLERANCE[torch.bfloat16] * (2 if interpreted() else 1), True
    for shape in TINY if session.args.tiny else SMOKE:
        p = problem_of(shape, "zipf", session.device)
        error = disagreements(p, {"grouped_mm": grouped(p, scatter=True), "fused": fused(p)})["fused"]
        record = {"shape": str(shape), "gated": shape.gated, "error": error, "passed": error <= limit}
        session.write("smoke", record | clocks())
        right = right and record["passed"]
    return right


def compiled(given: tuple[Shape, str]) -> str | None:
    """Compile what a shape needs, on few tokens and small matrices; return what went wrong."""
    shape, device = given
    try:
        p = problem_of(shape, "balanced", device)
        for backward in (False, True):
            p.run(fused(p), backward=backward)
    except Exception as error:  # noqa: BLE001  the stage that needs this kernel will tell of it as well
        return f"{type(error).__name__}: {error}"
    return None


def small(shape: Shape) -> Shape:
    """Return a shape for which Triton compiles the same: its rows an expert, its multiples of 16, its choices."""
    width, hidden = min(shape.width, 1024), min(shape.hidden, 512)
    experts = min(shape.experts, max(shape.choices, 8))
    tokens = max(1, shape.tokens * experts // shape.experts)
    return dataclasses.replace(shape, tokens=min(tokens, 8192), width=width, hidden=hidden, experts=experts)


def warm_part(session: Session) -> bool:
    """Compile for all shapes; what cannot be compiled is written down and fails nothing yet."""
    shapes = TINY if session.args.tiny else list(dict.fromkeys(map(small, SHAPES)))
    done: Record = {}
    if session.device == "cpu":
        for shape in shapes:
            if not session.late():
                done[str(shape)] = compiled((shape, session.device))
    else:
        with torch.multiprocessing.get_context("spawn").Pool(session.args.workers) as pool:
            given = [(shape, session.device) for shape in shapes]
            waiting = [pool.apply_async(compiled, (one,)) for one in given]
            for (shape, _), each in zip(given, waiting, strict=True):
                each.wait(max(0.0, session.left()))
                if each.ready():
                    done[str(shape)] = each.get()
    session.write("warm", {"compiled": len(done), "of": len(shapes), "failed": {n: e for n, e in done.items() if e}})
    return True


def results(p: Problem) -> dict[str, Tensor]:
    y = p.run(fused(p), backward=True)
    leaves = {"x": p.x, "weights": p.routing.weights, "up": p.mlp.up, "down": p.mlp.down}
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": y} | {name: grad.clone() for name, grad in grads.items() if grad is not None}


def differing(run: Callable[[], dict[str, Tensor]], times: int) -> dict[str, int]:
    """Return in how many numbers further runs differ from the first one."""
    first = run()
    found = dict.fromkeys(first, 0)
    for _ in range(times - 1):
        for name, tensor in run().items():
            found[name] += int((tensor.view(torch.uint8) != first[name].view(torch.uint8)).sum())
    return {name: count for name, count in found.items() if count}


def twice_part(session: Session) -> bool:
    """Run large shapes three times, with even and skewed loads; every bit is to be the same."""
    table, right = Table("T D F E K", "routing", "bytes that differ"), True
    for shape in TINY if session.args.tiny else LARGE:
        for routing in ("balanced", "zipf"):
            about = {"shape": str(shape), "gated": shape.gated, "routing": routing}
            if session.late():
                session.write("twice", {**about, "left_out": "no time is left"})
                continue
            p = problem_of(shape, routing, session.device)
            found = differing(lambda p=p: results(p), times=3)
            session.write("twice", {**about, "differing": found, "passed": not found})
            table.add_row(str(shape), routing, str(found or "none"))
            right = right and not found
    Console(width=160).print(table)
    return right
