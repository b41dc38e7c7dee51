"""The figures of the report, from the lines of metrics.jsonl, with titles and units; None where one would be empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from synchromesh.training.metrics import short_name
from synchromesh.training.page.axes import Axis, Value
from synchromesh.training.page.bars import bar_chart
from synchromesh.training.page.charts import Curve, line_chart
from synchromesh.training.page.load import load_chart
from synchromesh.training.page.matrix import matrix_chart
from synchromesh.training.panels import Bars, Curves, Matrix
from synchromesh.training.task import Number

Line = dict[str, Any]
EPOCH = Axis("epoch")


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

    def points(
        self, kind: str, name: str, *, scale: Value = 1.0, over: str = "epoch"
    ) -> tuple[tuple[float, float], ...]:
        """Return a number over another one; lines that do not have it are left out."""
        lines = [line for line in self.of(kind) if line.get(name) is not None]
        return tuple((float(line[over]), scale * line[name]) for line in lines)


def number_figure(series: Sequence[Series], number: Number) -> Element | None:
    """Draw a number of the test samples, and thinner that of training, where there is one, over the epochs."""
    scale, unit = _unit(number)
    training = "task_loss" if number.name == "loss" else number.name
    curves = []
    for color, one in enumerate(series):
        curves.append(Curve(f"{one.name}, test", one.points("test", number.name, scale=scale), color))
        curves.append(Curve(f"{one.name}, training", one.points("train", training, scale=scale), color, "faint"))
    return line_chart(title_of(number.title), EPOCH, Axis(unit, log=number.log), curves)


def compared_figure(series: Sequence[Series], number: Number, *, over: Axis, by: str) -> Element | None:
    """Draw a number of the test samples of several runs, over the epochs or over time."""
    scale, unit = _unit(number)
    curves = [Curve(one.name, one.points("test", number.name, scale=scale, over=by), c) for c, one in enumerate(series)]
    title = title_of(number.title) + (" over time" if by == "seconds" else "")
    return line_chart(title, over, Axis(unit, log=number.log), curves)


def training_loss_figure(series: Sequence[Series]) -> Element | None:
    """Draw the loss of training steps over the epochs."""
    curves = [Curve(one.name, one.points("train", "task_loss"), color) for color, one in enumerate(series)]
    return line_chart("Training loss", EPOCH, Axis("loss of the task", log=True), curves)


def rate_figure(series: Sequence[Series]) -> Element | None:
    """Draw the learning rate over the epochs: one curve where all models have the same."""
    curves = [Curve(one.name, one.points("train", "learning_rate"), color) for color, one in enumerate(series)]
    if all(curve.points == curves[0].points for curve in curves):
        curves = curves[:1]
    return line_chart("Learning rate", EPOCH, Axis("of the last step of each line", low=0.0), curves)


def throughput_figure(series: Sequence[Series], unit: str) -> Element | None:
    """Draw the training speed over the epochs."""
    name = f"{unit}_per_second"
    curves = [Curve(one.name, one.points("train", name), color) for color, one in enumerate(series)]
    return line_chart("Throughput of training", EPOCH, Axis(f"{unit} per second", low=0.0), curves)


def drop_figure(series: Sequence[Series]) -> Element | None:
    """Draw the share of (token, expert) pairs that found no room, in training and in tests; None where all found it."""
    curves = []
    for color, one in enumerate(series):
        before = f"{one.name}, " if len(series) > 1 else ""
        curves.append(Curve(f"{before}test", one.points("test", "drop_rate", scale=100.0), color))
        curves.append(Curve(f"{before}training", one.points("train", "drop_rate", scale=100.0), color, "faint"))
    if not any(value > 0 for curve in curves for _, value in curve.points):
        return None
    return line_chart("Dropped tokens", EPOCH, Axis("dropped for lack of capacity, %", low=0.0), curves)


def load_figures(series: Series) -> list[Element | None]:
    """Draw, per MoE layer, each expert's share of the tokens over time, and in the last test, beside an even load."""
    train = [line for line in series.of("train") if line.get("load")]
    tests = [line for line in series.of("test") if line.get("load")]
    layers = (train or tests or [{"load": {}}])[0]["load"]
    figures = []
    for layer in layers:
        shares = [(float(line["epoch"]), line["load"][layer]) for line in train if layer in line["load"]]
        last = tests[-1]["load"].get(layer, []) if tests else []
        figures.append(load_chart(title_of(short_name(layer)), shares, last))
    return figures


def busiest_figure(series: Sequence[Series]) -> Element | None:
    """Draw, for several runs, the load of the busiest expert of any layer, 1 being an even load."""
    curves = []
    for color, one in enumerate(series):
        lines = [line for line in one.of("test") if line.get("load")]
        points = tuple(
            (float(line["epoch"]), max(len(own) * max(own) for own in line["load"].values())) for line in lines
        )
        curves.append(Curve(one.name, points, color))
    return line_chart(
        "Busiest expert", EPOCH, Axis("tokens over an even load, of any layer, in tests", low=0.0), curves
    )


def panel_figure(panel: Bars | Curves | Matrix) -> Element | None:
    """Draw a chart of the task's own."""
    title = title_of(panel.title)
    if isinstance(panel, Bars):
        return bar_chart(title, panel.x, panel.y, panel.labels, panel.series, panel.even)
    if isinstance(panel, Matrix):
        about = "test samples, by true class and what it was taken for; colours are shares of a row"
        return matrix_chart(title, about, panel.names, panel.counts)
    curves = [Curve(name, tuple(points), color) for color, (name, points) in enumerate(panel.series.items())]
    return line_chart(title, Axis(panel.x), Axis(panel.y), curves)


def title_of(text: str) -> str:
    """Return a title that begins with a capital, without what stands after a comma."""
    return text[:1].upper() + text[1:]


def _unit(number: Number) -> tuple[float, str]:
    """Return the factor and the name of the unit that a number is drawn in."""
    return (100.0, f"{number.title}, %") if "%" in number.form else (1.0, number.heading)
