"""The figures of the report, from the lines of metrics.jsonl; each is a plotly figure with titles and units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from synchromesh.training.metrics import short_name

Line = dict[str, Any]

INK, PALE = "#1f2933", "#e4e7eb"
COLORS = ("#2563eb", "#d97706")  # the model, its twin: apart for colour-blind eyes too
LAYER_COLORS = ("#1d4ed8", "#0d9488", "#9333ea", "#be185d", "#65a30d", "#475569")


@dataclass(frozen=True)
class Series:
    """The metrics of one model of the run. name: for the legend."""

    name: str
    lines: tuple[Line, ...]

    def of(self, kind: str) -> list[Line]:
        """Return the lines of one kind, "train" or "test"."""
        return [line for line in self.lines if line["kind"] == kind]


def accuracy_figure(series: Sequence[Series]) -> go.Figure:
    """Draw test accuracy, and thinner the accuracy on augmented training images, over the epochs."""
    return _curves(series, lambda line: 100 * line["accuracy"], title="Accuracy", unit="images right, %")


def loss_figure(series: Sequence[Series]) -> go.Figure:
    """Draw the cross-entropy on test images and on augmented training images, over the epochs."""
    figure = _curves(
        series,
        lambda line: line["loss"] if line["kind"] == "test" else line["task_loss"],
        title="Loss",
        unit="cross-entropy, nats",
    )
    return figure.update_yaxes(type="log")


def throughput_figure(series: Sequence[Series]) -> go.Figure:
    """Draw the training speed over the epochs."""
    figure = _empty("Throughput of training", "epoch", "images per second")
    for one, color in zip(series, COLORS, strict=False):
        lines = one.of("train")
        figure.add_scatter(
            x=[line["epoch"] for line in lines],
            y=[line["images_per_second"] for line in lines],
            name=one.name,
            line={"color": color, "width": 2},
        )
    return figure.update_yaxes(rangemode="tozero")


def drop_figure(series: Series) -> go.Figure:
    """Draw the share of (token, expert) pairs that found no room, in training and on the test images."""
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
    """Draw the load of every expert over all test images, one line of bars per layer."""
    figure = _empty("Expert load on the test images", "expert", "share of the layer's tokens, %")
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


def _curves(series: Sequence[Series], value: Callable[[Line], float], *, title: str, unit: str) -> go.Figure:
    figure = _empty(title, "epoch", unit)
    for one, color in zip(series, COLORS, strict=False):
        for kind, name, width, opacity in (("test", "test", 2.5, 1.0), ("train", "training, augmented", 1.2, 0.55)):
            lines = one.of(kind)
            figure.add_scatter(
                x=[line["epoch"] for line in lines],
                y=[value(line) for line in lines],
                name=f"{one.name}: {name}",
                mode="lines+markers" if len(lines) < 40 and kind == "test" else "lines",
                line={"color": color, "width": width, "dash": "solid" if kind == "test" else "dot"},
                opacity=opacity,
            )
    return figure


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
