"""The curves of `synchromesh plan` as one page that opens offline."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.planner import Planned
from synchromesh.training.durable import write_atomically

PARTS = ("dense", "matmul", "permute", "waits", "other")


def write_page(path: Path, tables: Mapping[str, Sequence[Planned]], profile: ClusterProfile) -> None:
    """Write seconds by part and efficiency over the number of ranks, for each table."""
    figures = [figure for title, planned in tables.items() for figure in (_parts(title, planned), _rates(planned))]
    drawn = "\n".join(figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures)
    title = html.escape(f"plans on {profile.name}")
    head = f'<meta charset="utf-8"><title>{title}</title><script>{get_plotlyjs()}</script>'
    write_atomically(path, f"<!doctype html><html><head>{head}</head><body><h1>{title}</h1>{drawn}</body></html>\n")


def _parts(title: str, planned: Sequence[Planned]) -> go.Figure:
    figure = go.Figure(layout={"title": {"text": f"{title}: a step"}, "barmode": "stack"})
    for name in PARTS:
        figure.add_bar(name=name, x=_ranks(planned), y=[1e3 * _part(one, name) for one in planned])
    figure.update_xaxes(title="ranks")
    figure.update_yaxes(title="milliseconds")
    return figure


def _rates(planned: Sequence[Planned]) -> go.Figure:
    figure = go.Figure(layout={"title": {"text": "efficiency against one device that holds all experts"}})
    figure.add_scatter(name="best plans", x=_ranks(planned), y=[one.efficiency for one in planned])
    static = [None if one.static is None else one.efficiency * one.seconds / one.static for one in planned]
    figure.add_scatter(name="static plan", x=_ranks(planned), y=static)
    figure.update_xaxes(title="ranks")
    figure.update_yaxes(range=[0, 1.05])
    return figure


def _ranks(planned: Sequence[Planned]) -> list[str]:
    return [f"{one.ranks.size:,}" for one in planned]


def _part(one: Planned, name: str) -> float:
    if name == "dense":
        return one.dense
    field = {"matmul": "matmul", "permute": "permute", "waits": "exposed", "other": "route"}[name]
    passes = [seconds for layer in one.layers for seconds in (layer.forward, layer.backward)]
    return sum(getattr(seconds, field) for seconds in passes) + (one.reduce if name == "waits" else 0.0)
