"""Which products torch's own grouped_mm computes faster: what `benchmarks/gpu.py --part choose` measures.

Before that, few tokens are run with tiles and without at some loads; records named "few" keep both times.

The table goes to synchromesh/kernels/grouped_mm/measured.json, in place of what was measured on this architecture
before; from then on the kernels choose by it. Where torch reads ends on the host it is never chosen, and not measured.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_problem import Problem, Shape, fused, problem_of, timed
from gpu_session import Session
from rich.console import Console
from rich.table import Table
from torch import Tensor

import synchromesh.kernels.grouped_mm as family
from synchromesh.kernels.fused_mlp import triton as fused_mlp
from synchromesh.kernels.grouped_mm import gluon, native
from synchromesh.kernels.grouped_mm.choice import FILE, Cell, Choices, Kind, Measurement, architecture_of
from synchromesh.kernels.grouped_mm.triton import tiled_gradient, tiled_product
from synchromesh.kernels.tiles import interpreted
from synchromesh.testing.compare import TOLERANCE, relative_rms

ROWS = (1024, 4096, 256, 64, 16)  # a cut run knows those of training
SIDES = (2048, 4096, 1024, 512, 8192)
MOST_ROWS, MOST_EXPERTS = 65536, 64
MEANS = (0.5, 1.0, 2.0, 3.0, 4.0)  # rows an expert, on average, of few tokens: at most 512 in all
KINDS = (Kind.PRODUCT, Kind.WEIGHTS)  # that both have: an opening is not one of torch's
Product = Callable[[], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A cell that is not measured yet; its fields are those of `Cell`."""

    kind: Kind
    experts: int
    rows_per_expert: int
    depth: int
    width: int


def grid(*, tiny: bool) -> Iterator[Asked]:
    """Return what to measure: loads of an expert by sides of its matrix, up to 8 times as long as they are wide."""
    if tiny:
        yield from (Asked(kind, 2, 16, 32, 64) for kind in KINDS)
        return
    for rows, depth, width, kind in itertools.product(ROWS, SIDES, SIDES, KINDS):
        if max(depth, width) <= 8 * min(depth, width):
            yield Asked(kind, min(MOST_EXPERTS, MOST_ROWS // rows), rows, depth, width)


def ways(asked: Asked, device: str, *, with_gluon: bool = False) -> dict[str, Product]:
    """Return the ways to a product. A matrix lies in memory as up does, and then as down does: both count."""
    torch.manual_seed(0)
    shape, rows = (asked.experts, asked.depth, asked.width), asked.experts * asked.rows_per_expert
    left, right = (torch.randn(rows, size, device=device).bfloat16() for size in shape[1:])
    down = torch.randn(shape, device=device).bfloat16().div_(asked.depth**0.5)
    ends = torch.arange(1, asked.experts + 1, device=device, dtype=torch.int32) * asked.rows_per_expert
    layouts = (down.mT.contiguous().mT, down)
    if asked.kind is Kind.PRODUCT:
        each = {"triton": tiled_product, "torch": native.product} | ({"gluon": gluon.product} if with_gluon else {})
        return {name: lambda way=way: [way(left, w, ends) for w in layouts] for name, way in each.items()}
    each = {"triton": tiled_gradient, "torch": native.weight_gradient}
    each |= {"gluon": gluon.weight_gradient} if with_gluon else {}
    return {name: lambda way=way: [way(left, right, ends, like=w) for w in layouts] for name, way in each.items()}


def measured(asked: Asked, session: Session) -> Cell | str:
    """Return a cell, or why there is none: results that differ have no times."""
    rows, shape = torch.empty(1, 8, device=session.device).bfloat16(), (asked.experts, asked.depth, asked.width)
    able = session.args.gluon and gluon.takes(rows, shape)
    runs = ways(asked, session.device, with_gluon=able)
    wanted = runs["torch"]()
    error = max(max(map(relative_rms, run(), wanted)) for run in runs.values())
    if error > TOLERANCE[torch.bfloat16] * (2 if interpreted() else 1):
        return f"the results differ by {error:.3g}"
    seconds = timed(runs, session.args.seconds)
    return Cell(dtype="bfloat16", **{**dataclasses.asdict(asked), "kind": asked.kind}, **seconds)


def few_part(session: Session) -> bool:
    """Time few tokens with and without tiles at some loads; records say which was faster. Tell whether they agreed."""
    width, hidden, experts, choices = (32, 64, 4, 2) if session.args.tiny else (4096, 1536, 128, 8)
    limit, right = TOLERANCE[torch.bfloat16] * (2 if interpreted() else 1), True
    for mean in MEANS[1::3] if session.args.tiny else MEANS:
        if session.late():
            break
        shape = Shape(int(mean * experts) // choices, width, hidden, experts, choices)
        error, seconds = both_ways(problem_of(shape, "zipf", session.device), session.args.seconds)
        record = {"rows_per_expert": mean, "shape": str(shape), "error": error, "passed": error <= limit}
        session.write("few", {**record, **seconds, "faster": min(seconds, key=seconds.__getitem__)})
        right = right and error <= limit
    return right


def both_ways(p: Problem, seconds: float) -> tuple[float, dict[str, float]]:
    """Return by how much a problem without tiles differs from one with tiles, and the times of both."""

    def run(few: bool) -> Tensor:
        fused_mlp.is_few = lambda *_: few
        return p.run(fused(p), backward=False)

    with patch.object(fused_mlp, "is_few"):
        runs = {"few": partial(run, True), "tiles": partial(run, False)}
        return relative_rms(runs["few"](), runs["tiles"]()), timed(runs, seconds)


def choose_part(session: Session) -> bool:
    """Time few tokens both ways, measure every cell, write the table, show it; tell whether all results agreed."""
    agreed = few_part(session)
    device, cells, differing = torch.device(session.device), [], []
    rows = torch.empty(1, 8, device=device, dtype=torch.bfloat16)
    if not native.takes(rows, (1, 8, 8)):
        print(f"On {session.about['device']} torch's grouped_mm reads on the host: nothing to choose.")
        return agreed
    table = Table("kind", "experts", "rows each", "depth", "width", "Triton, ms", "torch, ms", "faster")
    for asked in grid(tiny=session.args.tiny):
        if session.late():
            break
        cell = measured(asked, session)
        if isinstance(cell, str):
            differing.append(asked)
            print(asked, cell)
            continue
        cells.append(cell)
        record = dataclasses.asdict(cell) | {"kind": cell.kind.value, "faster": cell.faster.value}
        session.write("choose", record)
        about = (record[name] for name in ("kind", "experts", "rows_per_expert", "depth", "width"))
        table.add_row(*map(str, about), *(f"{1e3 * s:.3f}" for s in (cell.triton, cell.torch)), cell.faster.value)
    Console(width=160).print(table)
    print("->", save(cells, session, architecture_of(device)))
    return agreed and not differing


def save(cells: list[Cell], session: Session, architecture: str) -> Path:
    """Write the cells into the table, to the records' folder if tiny, in place of those of their architecture.

    A run that measured fewer than there are, because its time was over, leaves the table as it was.
    """
    shipped = Path(family.__path__[0]) / FILE
    path = session.args.table or (session.out.with_name(FILE) if session.args.tiny else shipped)
    before = Choices.from_json(path.read_text()) if path.exists() else Choices()
    known = [cell for one in before.measurements if one.architecture == architecture for cell in one.cells]
    if not cells or len(cells) < len(known):
        print(f"{len(cells)} cells were measured, {len(known)} are known: the table stays as it was.")
        return path
    about = {name: session.about[name] for name in ("device", "torch", "triton", "commit", "started")}
    path.write_text(before.with_measurement(Measurement(architecture, cells=tuple(cells), **about)).to_json())
    return path
