"""What a chart draws, read back from its picture."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.testing.pages import Node, parse_page
from synchromesh.training.page.axes import Axis
from synchromesh.training.page.bars import FARTHEST, Mark, Row, bar_chart, rows
from synchromesh.training.page.charts import HEIGHT, MOST_POINTS, WIDTH, Curve, line_chart
from synchromesh.training.page.elements import document
from synchromesh.training.page.load import MOST_COLUMNS, STEPS, level, load_chart
from synchromesh.training.page.matrix import matrix_chart
from synchromesh.training.page.style import COLORS, STYLE
from synchromesh.training.page.timeline import STRETCHED, Lane, Stretch, timeline


def drawn(element: Any) -> Node:
    return parse_page(document("t", element)).all("figure")[0]


def places(path: Node) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attributes["d"])]


def written(figure: Node, *, end: bool) -> list[tuple[float, float]]:
    """Return (place, value) of the numbers at an axis: the upright one's end at it."""
    texts = [one for one in figure.all("text", "end" if end else "mid") if re.fullmatch(r"-?[\d.,]+", one.text)]
    return [(float(one.attributes["y" if end else "x"]), float(one.text.replace(",", ""))) for one in texts]


def read(at: float, marks: Sequence[tuple[float, float]], *, log: bool = False) -> float:
    """Return the value at a place, by the numbers at the axis."""
    (a, low), (b, high) = marks[0], marks[-1]
    low, high = (math.log(low), math.log(high)) if log else (low, high)
    value = low + (at - a) / (b - a) * (high - low)
    return math.exp(value) if log else value


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_goes_through_its_points_by_the_numbers_at_the_axes(log: bool) -> None:
    points = tuple((float(n), 0.5 * 1.9**n) for n in range(9))
    figure = drawn(line_chart("T", Axis("epoch"), Axis("loss", log=log), [Curve("a", points, 2)]))
    (path,) = figure.all("path", "line")
    assert "k2" in path.attributes["class"].split()
    across, up = written(figure, end=False), [(y - 4, v) for y, v in written(figure, end=True)]
    for (x, y), (left, top) in zip(points, places(path), strict=True):
        assert read(left, across) == pytest.approx(x, abs=0.05)
        assert read(top, up, log=log) == pytest.approx(y, rel=0.03, abs=1.0 if not log else 0)
        assert 0 <= left <= WIDTH
        assert 0 <= top <= HEIGHT
    assert [one.text for one in figure.all("b")] == ["T"]
    assert "loss" in figure.text
    assert "epoch" in figure.text


def test_a_long_curve_is_thinned_to_its_outline() -> None:
    points = [(float(n), math.sin(n / 50)) for n in range(20_000)]
    points[7777] = (7777.0, 9.0)
    points[3333] = (3333.0, -7.0)
    figure = drawn(line_chart("T", Axis("x"), Axis("y"), [Curve("a", tuple(points), 0)]))
    shown = places(figure.all("path", "line")[0])
    assert len(shown) <= MOST_POINTS + 2
    assert [x for x, _ in shown] == sorted(x for x, _ in shown)
    across, up = written(figure, end=False), [(y - 4, v) for y, v in written(figure, end=True)]
    top, bottom = min(shown, key=lambda one: one[1]), max(shown, key=lambda one: one[1])
    assert (read(top[0], across), read(top[1], up)) == (pytest.approx(7777, abs=60), pytest.approx(9, abs=0.1))
    assert (read(bottom[0], across), read(bottom[1], up)) == (pytest.approx(3333, abs=60), pytest.approx(-7, abs=0.1))


def test_what_cannot_be_drawn_is_left_out_and_the_rest_stays() -> None:
    points = ((1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 0.0), (5.0, 4.0))
    figure = drawn(line_chart("T", Axis("x"), Axis("y", log=True), [Curve("a", points, 0)]))
    assert len(places(figure.all("path", "line")[0])) == 2


NUMBERS = st.one_of(st.floats(), st.integers(-(10**30), 10**30))


@given(st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5), max_size=3), st.booleans(), st.booleans())
def test_whatever_the_values_are_a_chart_is_drawn_inside_its_frame_or_left_out(
    series: list[list[tuple[float, float]]], log_x: bool, log_y: bool
) -> None:
    curves = [Curve(str(number), tuple(points), number) for number, points in enumerate(series)]
    chart = line_chart("T", Axis("x", log=log_x), Axis("y", log=log_y), curves)
    if chart is None:
        return
    figure = drawn(chart)
    assert "nan" not in figure.text
    for path in figure.all("path", "line"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(path))


@given(st.lists(NUMBERS.filter(lambda value: value >= 0), min_size=1, max_size=5))
def test_whatever_the_heights_are_bars_are_drawn(heights: list[float]) -> None:
    figure = drawn(bar_chart("T", "x", "y", [str(n) for n in range(len(heights))], {"a": heights}))
    for bar in figure.all("rect", "fill"):
        assert 0 <= float(bar.attributes["y"]) <= HEIGHT
        assert 0 <= float(bar.attributes["height"]) <= HEIGHT


def test_a_pointer_is_told_the_values_of_all_curves() -> None:
    curves = [Curve("one", ((1.0, 10.0), (2.0, 20.0)), 0), Curve("two", ((1.0, 30.0), (2.0, 40.0)), 1)]
    figure = drawn(line_chart("T", Axis("epoch"), Axis("y"), curves))
    assert [one.text for one in figure.all("title")] == ["epoch 1\none: 10\ntwo: 30", "epoch 2\none: 20\ntwo: 40"]


def test_the_noisy_beginning_of_training_does_not_dwarf_the_tests() -> None:
    faint = Curve("training", ((0.0, 1000.0), (0.5, 50.0), (2.0, 1.0)), 0, "faint")
    figure = drawn(line_chart("T", Axis("x"), Axis("y"), [Curve("test", ((1.0, 2.0), (2.0, 1.0)), 0), faint]))
    assert max(value for _, value in written(figure, end=True)) < 4
    (frame,) = figure.all("svg")[0].all("svg")  # which cuts off what leaves it
    assert len(frame.all("path", "line")) == 2


def test_bars_are_as_high_as_their_numbers_and_the_even_line_is_where_it_belongs() -> None:
    series = {"boxes": [0.5, 0.25, 0.0], "masks": [0.4, 0.2, 1.0]}
    figure = drawn(bar_chart("T", "class", "AP", ["cat", "dog", "eel"], series, even=0.5))
    up = [(y - 4, v) for y, v in written(figure, end=True)]
    for number, heights in enumerate(series.values()):
        bars = figure.all("rect", f"k{number}")
        assert len(bars) == 3
        for bar, height in zip(bars, heights, strict=True):
            assert read(float(bar.attributes["y"]), up) == pytest.approx(height, abs=0.01)
    (line,) = figure.all("line", "even")
    assert read(float(line.attributes["y1"]), up) == pytest.approx(0.5, abs=0.01)
    assert [one.text for one in figure.all("li")] == ["boxes", "masks", "even"]


def shares(style: str) -> float:
    return float(re.search(r"(?:width|left):([\d.]+)%", style)[1])


def test_lying_bars_share_one_scale_with_their_mark_and_are_cut_far_beyond_it() -> None:
    listed = [Row("a", {"x": 2.0, "y": 2.0}, "4 s"), Row("b", {"x": 1.0}, "1 s"), Row("c", {"x": 100.0}, "far", True)]
    figure = drawn(rows("T", "seconds", listed, unit="s", mark=Mark("limit", 5.0)))
    full = 5.0 * FARTHEST
    widths = [
        [shares(one.attributes["style"]) for one in track.all("span")[:-1]] for track in figure.all("div", "track")
    ]
    assert widths == [pytest.approx([200 / full, 200 / full]), pytest.approx([100 / full]), pytest.approx([1e4 / full])]
    assert {shares(one.attributes["style"]) for one in figure.all("span", "mark")} == {50.0}
    assert [one.attributes["class"] for one in figure.all("div", "track")] == ["track", "track", "track over cut"]
    assert [one.text for one in figure.all("span", "said")] == ["4 s", "1 s", "far"]


def cells(figure: Node, experts: int, columns: int) -> list[list[int]]:
    """Return the colour of each cell of a load chart."""
    found = [[-1] * columns for _ in range(experts)]
    boxes = [
        (int(path.attributes["class"][-1]), *map(float, box))
        for path in figure.all("path")
        for box in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", path.attributes["d"])
    ]
    left, right = min(box[1] for box in boxes), max(box[1] + box[3] for box in boxes)
    top, bottom = min(box[2] for box in boxes), max(box[2] + box[4] for box in boxes)
    for color, x, y, width, _ in boxes:
        row = round((y - top) / (bottom - top) * experts)
        for column in range(columns):
            middle = left + (column + 0.5) * (right - left) / columns
            if x <= middle < x + width:
                assert found[row][column] == -1, "two colours in one place"
                found[row][column] = color
    return found


def test_each_expert_has_at_each_time_the_colour_of_its_load() -> None:
    loads = [[0.7, 0.02, 0.25, 0.03], [0.25, 0.25, 0.25, 0.25], [0.4, 0.1, 0.5, 0.0], [0.4, 0.1, 0.5, 0.0]]
    figure = drawn(load_chart("T", [(float(n), own) for n, own in enumerate(loads)], []))
    wanted = [[sum(4 * own[expert] >= step for step in STEPS) for own in loads] for expert in range(4)]
    assert cells(figure, 4, 4) == wanted
    assert level(1.0) == 3


def test_much_time_is_shown_as_means() -> None:
    loads = [(float(n), [0.5, 0.5] if n % 2 else [0.1, 0.9]) for n in range(20 * MOST_COLUMNS)]
    figure = drawn(load_chart("T", loads, []))
    assert cells(figure, 2, MOST_COLUMNS) == [[level(0.6)] * MOST_COLUMNS, [level(1.4)] * MOST_COLUMNS]


@pytest.mark.parametrize("count", [2, 8, 64, 300])
def test_the_line_of_an_even_load_stands_where_a_bar_of_one_over_e_ends(count: int) -> None:
    last = [1 / count] * (count - 2) + [1.5 / count, 0.5 / count]
    figure = drawn(load_chart("T", [(0.0, last)], last))
    bars = figure.all("rect", "bar")
    assert len(bars) == count
    (line,) = figure.all("line", "even")
    even = float(line.attributes["x1"])
    left = float(bars[0].attributes["x"])
    for bar, share in zip(bars, last, strict=True):
        assert float(bar.attributes["width"]) / (even - left) == pytest.approx(share * count, abs=0.02)


def test_a_matrix_says_each_count_and_whose_it_is() -> None:
    figure = drawn(matrix_chart("T", "", ["cat", "dog"], [[3, 1], [0, 5]]))
    assert figure.cells() == [["true class", "cat", "dog"], ["cat", "3", "1"], ["dog", "0", "5"]]
    titles = [one.attributes.get("title") for one in figure.all("td")]
    assert titles == ["cat taken for cat: 3 of 4", "cat taken for dog: 1 of 4", None, "dog taken for dog: 5 of 5"]


@pytest.mark.parametrize("end", [STRETCHED - 1, 50_000])
def test_lanes_are_filled_from_their_beginning_to_their_end(end: int) -> None:
    lane = Lane("layer", (Stretch("a", 0, 3, "2 ms"), Stretch("b", 3, 10), Stretch("a", 10, end)), "now a")
    figure = drawn(timeline("T", "steps", [lane]))
    runs = figure.all("div", "runs")[0].all("span")
    widths = [shares(one.attributes["style"]) for one in runs]
    assert sum(widths) == pytest.approx(100, abs=0.1)
    place = (lambda m: math.log1p(m) / math.log1p(end)) if end >= STRETCHED else (lambda m: m / end)
    assert widths[0] == pytest.approx(100 * place(3), rel=0.01)
    assert [one.attributes["class"] for one in runs] == ["k0", "k1", "k0"]
    assert runs[0].attributes["title"] == "layer: a, 1 to 3; 2 ms"


def test_every_colour_that_is_used_is_there_in_the_light_and_in_the_dark() -> None:
    light, _, dark = STYLE.partition("prefers-color-scheme: dark")
    for number in range(COLORS):
        assert f"--k{number}:" in light.split("{")[1]
        assert f"--k{number}:" in dark.split("}")[0]
        assert f".k{number} {{ --k: var(--k{number})" in STYLE
