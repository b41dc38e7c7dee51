"""What `synchromesh plan` prints of one case: the table, the plans with their reasons, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console

from synchromesh.commands.tables import Column, Row, show_table
from synchromesh.planning.planner import Planned
from synchromesh.planning.reasons import short
from synchromesh.planning.shape import ModelShape

ABOVE = (
    "efficient: samples of a rank against one device that holds all experts; above 100% where reading and updating its "
    "share of them saves a rank more than exchanges cost"
)


def show_plans(console: Console, title: str, model: ModelShape, planned: Sequence[Planned]) -> None:
    """Print the steps of a model on each number of ranks."""
    names = ("ranks", "step", "dense", "experts", "waits", "GB", f"{model.unit}/s", "efficient", "static")
    rows = [Row(_cells(one), "red" if one.refused else None) for one in planned]
    show_table(console, f"{title}: milliseconds of a step", [Column(name) for name in names], rows)
    for line in [*_plans(planned), *_remarks(planned)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if any(one.efficiency > 1 for one in planned):
        console.print(ABOVE, style="dim", highlight=False, soft_wrap=True)
    if model.dense_products:
        console.print(f"the dense part: {model.calibrated_by}", style="dim", highlight=False, soft_wrap=True)


def _cells(one: Planned) -> tuple[str, ...]:
    waits = one.waits
    parts = [one.seconds, one.dense, one.seconds - one.dense - waits, waits]
    static = "no room" if one.static is None else f"{one.static / one.seconds:.2f}x"
    memory = short(one.memory / 1e9) if one.memory < 1e10 else f"{one.memory / 1e9:.0f}"
    rates = [memory, short(one.samples_per_second), f"{one.efficiency:.0%}", static]
    return f"{one.ranks.size:,}", *(short(part * 1e3) for part in parts), *rates


def _plans(planned: Sequence[Planned]) -> Iterator[str]:
    """Say for each kind of layer by which plan it runs, on how many ranks, and why on the fewest of them."""
    for number, layer in enumerate(planned[0].layers):
        for plan, own in groupby(planned, key=lambda one, number=number: one.layers[number].plan):
            sizes = list(own)
            reasons = "; ".join(str(reason) for reason in sizes[0].layers[number].reasons)
            at = f"at {sizes[0].ranks.size:,} " if len(sizes) > 1 else ""
            why = f": {at}{reasons}" if reasons else ""
            yield f"{layer.kind.name} by {plan} ({_range([one.ranks.size for one in sizes])}){why}"


def _remarks(planned: Sequence[Planned]) -> Iterator[str]:
    """Say once what is said of several sizes."""
    found: dict[str, list[int]] = {}
    for one in planned:
        for remark in one.notes():
            found.setdefault(remark, []).append(one.ranks.size)
    for remark, sizes in found.items():
        yield f"{_range(sizes)}: {remark}"


def _range(sizes: Sequence[int]) -> str:
    first = f"{sizes[0]:,} rank{'s' if sizes[-1] > 1 else ''}"
    return first if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} ranks"
