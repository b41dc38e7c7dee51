"""What `synchromesh plan` found as one page that opens offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from xml.etree.ElementTree import Element

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.memory import Bytes
from synchromesh.planning.planner import USABLE_MEMORY, Planned
from synchromesh.training.durable import write_atomically
from synchromesh.training.page.axes import Axis, short
from synchromesh.training.page.bars import Mark, Row, rows
from synchromesh.training.page.charts import Curve, line_chart
from synchromesh.training.page.elements import card, document, grid, section, table, tag, tiles

GIGA = 1e9


def write_page(path: Path, tables: Mapping[str, Sequence[Planned]], profile: ClusterProfile) -> None:
    """Write the plans, the parts of a step, memory and efficiency over the number of ranks, for each table."""
    gigabytes = f"{profile.memory_bytes / GIGA:,.0f} GB a rank, of which {USABLE_MEMORY:.0%} can be used"
    about = profile.about.rstrip(".")
    lead = tag("p", f"{about[:1].upper()}{about[1:]}: {profile.per_node} ranks a node, {gigabytes}.", class_="lead")
    parts = [_case(title.strip(), planned, profile) for title, planned in tables.items() if planned]
    title = f"Plans on {profile.name}"
    write_atomically(path, document(title, tag("h1", title), lead, *parts))


def _case(title: str, planned: Sequence[Planned], profile: ClusterProfile) -> Element | None:
    fitting = [one for one in planned if one.refused is None]
    bars = grid(_parts(planned), _memory(planned, profile), pair=True)
    rest = grid(_plans(planned), _efficiency(planned), _speed(planned), _table(planned))
    return section(title, _best(fitting, planned), bars, rest, _remarks(planned))


def _best(fitting: Sequence[Planned], planned: Sequence[Planned]) -> Element:
    """Return what to know first: the fastest, the most efficient, the smallest that fits."""
    if not fitting:
        return tiles([("ranks", _sizes(planned)), ("fits", "on none of them")])
    fastest = max(fitting, key=lambda one: one.samples_per_second)
    near = max(fitting, key=lambda one: one.efficiency)
    values = [
        ("fits from", _ranks(fitting[0])),
        ("most efficient", f"{_ranks(near)}, {near.efficiency:.0%}"),
        ("fastest", _ranks(fastest)),
        ("there, samples/s", short(fastest.samples_per_second)),
        ("there, a step", _milliseconds(fastest.seconds)),
    ]
    return tiles(values)


def _parts(planned: Sequence[Planned]) -> Element | None:
    listed = [
        Row(
            _ranks(one), {n: 1e3 * s for n, s in step_parts(one).items()}, _milliseconds(one.seconds), bool(one.refused)
        )
        for one in planned
    ]
    return rows("Parts of a step", "milliseconds; pale does not fit into memory", listed, unit="ms")


def step_parts(one: Planned) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on; they add up to the step."""
    passes = [seconds for layer in one.layers for seconds in (layer.forward, layer.backward)]
    return {
        "dense part": one.dense,
        "experts": sum(seconds.matmul for seconds in passes),
        "moving rows": sum(seconds.permute for seconds in passes),
        "routing": sum(seconds.route for seconds in passes),
        "waiting": sum(seconds.exposed for seconds in passes) + one.reduce,
    }


def memory_parts(one: Planned) -> dict[str, float]:
    """Return the bytes of a rank by what they hold; they add up to its memory."""
    experts = {field.name: sum(getattr(each.memory, field.name) for each in one.layers) for field in _KEPT}
    buffers = max((layer.memory.buffers for layer in one.layers), default=0.0)
    dense = one.memory - sum(experts.values()) - buffers
    weights = experts["weights"] + experts["gathered"]
    return {
        "dense part": max(0.0, dense),
        "experts' weights": weights,
        "their gradients and optimizer": experts["gradients"] + experts["optimizer"],
        "activations": experts["activations"],
        "buffers": buffers,
    }


_KEPT = [field for field in dataclasses.fields(Bytes) if field.name != "buffers"]


def _memory(planned: Sequence[Planned], profile: ClusterProfile) -> Element | None:
    listed = []
    for one in planned:
        said = f"{one.memory / GIGA:,.1f} GB" + (", does not fit" if one.refused else "")
        listed.append(Row(_ranks(one), {n: b / GIGA for n, b in memory_parts(one).items()}, said, bool(one.refused)))
    limit = USABLE_MEMORY * profile.memory_bytes / GIGA
    return rows(
        "Memory of a rank", "GB; pale does not fit", listed, unit="GB", mark=Mark(f"limit, {limit:,.1f} GB", limit)
    )


def _efficiency(planned: Sequence[Planned]) -> Element | None:
    best = tuple((float(one.ranks.size), 100 * one.efficiency) for one in planned)
    static = tuple(
        (float(one.ranks.size), 100 * one.efficiency * one.seconds / one.static) for one in planned if one.static
    )
    if len(best) < 2:
        return None
    top = max(105.0, *(y for _, y in best))
    curves = [Curve("best plans", best, 0), Curve("the plan that E and W alone fix", static, 1, "dashed")]
    about = Axis("% of one device that holds all experts", low=0.0, high=top)
    return line_chart("Efficiency", _over(planned), about, curves)


def _over(planned: Sequence[Planned]) -> Axis:
    return Axis("ranks", log=True, marks=tuple(float(one.ranks.size) for one in planned))


def _speed(planned: Sequence[Planned]) -> Element | None:
    if len(planned) < 2:
        return None
    own = tuple((float(one.ranks.size), one.samples_per_second) for one in planned)
    first = planned[0]
    ideal = tuple((x, first.samples_per_second * x / first.ranks.size) for x, _ in own)
    curves = [Curve("predicted", own, 0), Curve("as many times more as ranks", ideal, 7, "dashed")]
    return line_chart("Speed", _over(planned), Axis("samples per second", log=True), curves)


def _plans(planned: Sequence[Planned]) -> Element | None:
    """Return by which plan each kind of layer runs, on how many ranks."""
    if not planned[0].layers:
        return None
    lines = []
    for number, layer in enumerate(planned[0].layers):
        runs = groupby(planned, key=lambda one, number=number: str(one.layers[number].plan))
        for count, (plan, group) in enumerate(runs):
            own = list(group)
            seconds = [_milliseconds(one.layers[number].seconds) for one in (own[0], own[-1])]
            said = f"{seconds[0]} to {seconds[1]}" if len(own) > 1 else seconds[0]
            name = f"{layer.kind.name}, {_count(layer.kind.count, 'layer')}" if count == 0 else ""
            lines.append([name, plan, _sizes(own), said])
    about = "of each kind of layer; g ranks pool the weights of their experts, W/g exchange tokens"
    return card(
        "Plans",
        table(["layers", "plan", "ranks", "all layers of the kind"], lines, left=2),
        about=about,
        room="broad tall",
    )


def _table(planned: Sequence[Planned]) -> Element:
    columns = [
        "ranks",
        "step",
        "dense",
        "experts",
        "waiting",
        "memory, GB",
        "samples/s",
        "efficiency",
        "static plan takes",
    ]
    lines = []
    for one in planned:
        parts = step_parts(one)
        waits = parts["waiting"]
        times = [one.seconds, one.dense, one.seconds - one.dense - waits, waits]
        static = "no room" if one.static is None else f"{one.static / one.seconds:.2f}x"
        memory = f"{one.memory / GIGA:,.1f}" + (" does not fit" if one.refused else "")
        rates = [memory, short(one.samples_per_second), f"{one.efficiency:.0%}", static]
        lines.append([f"{one.ranks.size:,}", *map(_milliseconds, times), *rates])
    marked = [number for number, one in enumerate(planned) if one.refused]
    return card("Numbers", table(columns, lines, marked=marked), room="wide")


def _remarks(planned: Sequence[Planned]) -> Element | None:
    found: dict[str, list[Planned]] = {}
    for one in planned:
        for remark in one.remarks():
            found.setdefault(remark, []).append(one)
    said = []
    for remark, own in found.items():
        bad = any(one.refused and one.refused in remark for one in own)
        said.append(tag("li", remark if bad else f"{remark} ({_sizes(own)} ranks)", class_="bad" if bad else None))
    return tag("ul", *said, class_="notes") if said else None


def _ranks(one: Planned) -> str:
    return _count(one.ranks.size, "rank")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _sizes(planned: Sequence[Planned]) -> str:
    first, last = planned[0].ranks.size, planned[-1].ranks.size
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _milliseconds(seconds: float) -> str:
    return f"{short(1e3 * seconds)} ms"
