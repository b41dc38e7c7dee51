"""The figures of the report, from the lines of metrics.jsonl; each is a plotly figure with titles and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from synchromesh.training.metrics import short_name
from synchromesh.training.task import Bars, Curves, Number

Line = dict[str, Any]

INK, PALE = "#1f2933", "#e4e7eb"
COLORS = ("#2563eb", "#d97706")  # the model, its twin; colour-blind readers can tell them from each other
LAYER_COLORS = ("#1d4ed8", "#0d9488", "#9333ea", "#be185d", "#65a30d", "#475569")


@dataclass(frozen=True)
class Series:
    """The metrics of one model of the run.

    Attributes:
        name: for the legend.
        lines: of its file.
    """

    name: str
    lines: tuple[Line, ...]

    def of(self, kind: str) -> list[Line]:
        """Return the lines of one kind, "train" or "test"."""
        return [line for line in self.lines if line["kind"] == kind]


def number_figure(series: Sequence[Series], number: Number) -> go.Figure:
    """Draw a number of the test samples, and thinner that of training, where there is one, over the epochs."""
    percent = "%" in number.form
    unit = f"{number.title}, %" if percent else number.heading
    training = "task_loss" if number.name == "loss" else number.name
    names = {"test": number.name, "train": training}
    figure = _curves(series, names, scale=100.0 if percent else 1.0, title=_title(number.title), unit=unit)
    return figure.update_yaxes(type="log" if number.log else "linear")


def training_loss_figure(series: Sequence[Series]) -> go.Figure:
    """Draw the loss of training steps over the epochs."""
    names = {"train": "task_loss"}
    return _curves(series, names, scale=1.0, title="Training loss", unit="loss of the task").update_yaxes(type="log")


def bars_figure(bars: Bars) -> go.Figure:
    """Draw a bar chart of the task's own."""
    figure = _empty(_title(bars.title), bars.x, bars.y)
    for i, (name, heights) in enumerate(bars.series.items()):
        color = LAYER_COLORS[i % len(LAYER_COLORS)]
        figure.add_bar(x=list(bars.labels), y=list(heights), name=name, marker={"color": color})
    if bars.even is not None:
        figure.add_hline(y=bars.even, line={"color": INK, "dash": "dot"}, annotation_text="even")
    figure.update_xaxes(type="category")
    return figure.update_layout(barmode="group")


def curves_figure(curves: Curves) -> go.Figure:
    """Draw curves of the task's own."""
    figure = _empty(_title(curves.title), curves.x, curves.y)
    for i, (name, points) in enumerate(curves.series.items()):
        line = {"color": LAYER_COLORS[i % len(LAYER_COLORS)], "width": 2}
        figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines", line=line)
    return figure.update_layout(showlegend=True)


def throughput_figure(series: Sequence[Series], unit: str) -> go.Figure:
    """Draw the training speed over the epochs."""
    figure = _empty("Throughput of training", "epoch", f"{unit} per second")
    for one, color in zip(series, COLORS, strict=False):
        lines = one.of("train")
        figure.add_scatter(
            x=[line["epoch"] for line in lines],
            y=[line[f"{unit}_per_second"] for line in lines],
            name=one.name,
            line={"color": color, "width": 2},
        )
    return figure.update_yaxes(rangemode="tozero")


def drop_figure(series: Series) -> go.Figure:
    """Draw the share of (token, expert) pairs that found no room, in training and in tests."""
    figure = _empty("Dropped tokens", "epoch", "dropped for lack of capacity, %")
    for kind, name, dash in (("train", "training", "solid"), ("test", "test", "dot")):
        lines = series.of(kind)
        figure.add_scatter(
            x=[line["epoch"] for line in lines],
            y=[100 * line["drop_rate"] for line in lines],
            name=name,
            line={"color": COLORS[0], "width": 2, "dash": dash},
        )
    top = max([100 * line["drop_rate"] for line in series.lines] or [0.0])
    return figure.update_yaxes(range=[0, max(1.0, 1.1 * top)])


def load_figures(series: Series) -> list[go.Figure]:
    """Draw, per MoE layer, each expert's share of the tokens over time, 1 being its fair part 1/E."""
    lines = [line for line in series.of("train") if line["load"]]
    return [_load_figure(layer, lines) for layer in (lines[0]["load"] if lines else {})]


def final_load_figure(shares: dict[str, list[float]]) -> go.Figure:
    """Draw the load of every expert over all tests, one line of bars per layer."""
    figure = _empty("Expert load in the last test", "expert", "share of the layer's tokens, %")
    for i, (layer, values) in enumerate(shares.items()):
        figure.add_bar(
            x=[str(expert) for expert in range(len(values))],
            y=[100 * v for v in values],
            name=short_name(layer),
            marker={"color": LAYER_COLORS[i % len(LAYER_COLORS)]},
        )
    if shares:
        count = max(len(values) for values in shares.values())
        figure.add_hline(y=100 / count, line={"color": INK, "dash": "dot"}, annotation_text="even load")
    return figure.update_layout(barmode="group")


def _curves(series: Sequence[Series], names: dict[str, str], *, scale: float, title: str, unit: str) -> go.Figure:
    """Draw, for each kind of line, the number of the name that is given for it."""
    figure = _empty(title, "epoch", unit)
    for one, color in zip(series, COLORS, strict=False):
        for kind, label, width, opacity in (("test", "test", 2.5, 1.0), ("train", "training, augmented", 1.2, 0.55)):
            lines = [line for line in one.of(kind) if names.get(kind, "") in line]
            if not lines:
                continue
            figure.add_scatter(
                x=[line["epoch"] for line in lines],
                y=[None if line[names[kind]] is None else scale * line[names[kind]] for line in lines],
                name=f"{one.name}: {label}",
                mode="lines+markers" if len(lines) < 40 and kind == "test" else "lines",
                line={"color": color, "width": width, "dash": "solid" if kind == "test" else "dot"},
                opacity=opacity,
            )
    return figure


def _title(text: str) -> str:
    return text.partition(",")[0][:1].upper() + text.partition(",")[0][1:]


def _load_figure(layer: str, lines: Sequence[Line]) -> go.Figure:
    count = len(lines[0]["load"][layer])
    relative = [[count * line["load"][layer][expert] for line in lines] for expert in range(count)]
    figure = _empty(f"Expert load: {short_name(layer)}", "epoch", "expert")
    figure.add_heatmap(
        x=[line["epoch"] for line in lines],
        y=list(range(count)),
        z=relative,
        zmin=0,
        zmid=1,
        zmax=max(2.0, max(max(row) for row in relative)),
        colorscale=[[0.0, "#7f1d1d"], [0.05, "#f59e0b"], [0.5, "#f8fafc"], [1.0, "#1d4ed8"]],
        colorbar={"title": {"text": "load over<br>even load"}, "thickness": 12},
        hovertemplate="epoch %{x:.2f}<br>expert %{y}<br>%{z:.2f} times even<extra></extra>",
    )
    figure.update_yaxes(dtick=1 if count <= 16 else None, showgrid=False, autorange="reversed")
    return figure.update_layout(height=max(260, 120 + 22 * min(count, 32)))


def _empty(title: str, x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 18}},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 48, "b": 48},
        legend={"orientation": "h", "y": -0.24, "x": 0},
        height=380,
        hovermode="x unified",
    )
    figure.update_xaxes(title_text=x, gridcolor=PALE, zeroline=False, linecolor=INK)
    return figure.update_yaxes(title_text=y, gridcolor=PALE, zeroline=False)
