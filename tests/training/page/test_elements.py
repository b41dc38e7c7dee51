"""Pages are trees: whatever a name holds, it is text."""

from pathlib import Path

import pytest

from synchromesh.testing.browser import Browser
from synchromesh.testing.pages import loose_ends, parse_page
from synchromesh.training.page.axes import Axis
from synchromesh.training.page.bars import Mark, Row, bar_chart, rows
from synchromesh.training.page.charts import Curve, line_chart
from synchromesh.training.page.elements import card, document, grid, legend, section, table, tag, tiles
from synchromesh.training.page.load import load_chart
from synchromesh.training.page.matrix import matrix_chart
from synchromesh.training.page.timeline import Lane, Stretch, timeline

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "'><svg onload='document.title=1'>",
    "</title></style><b>loud",
    "javascript:alert(1)",
    "url(https://example.com/a.png)",
    "&lt;b&gt; &amp; &#60;",
    "\x00\x1b[31m\u202e\ud800 end",
    "-->]]><!--",
    "x" * 3000,
)


def page_of(name: str) -> str:
    """Return a page that has a name from outside in every place that takes one."""
    parts = [
        tag("p", name, title=name),
        tiles([(name, name)]),
        legend([("k0", name), ("k1", name)]),
        table([name, name], [[name, tag("b", name)]]),
        line_chart(name, Axis(name), Axis(name), [Curve(name, ((0.0, 1.0), (1.0, 2.0)), 0)] * 2),
        bar_chart(name, name, name, [name, "b"], {name: [1.0, 2.0], "two": [2.0, 1.0]}, even=1.5),
        rows(name, name, [Row(name, {name: 1.0}, name, True)], unit=name, mark=Mark(name, 0.5)),
        load_chart(name, [(0.0, [0.5, 0.5])], [0.5, 0.5]),
        matrix_chart(name, name, [name, "b"], [[1, 2], [0, 3]]),
        timeline(name, name, [Lane(name, (Stretch(name, 0, 5, name),), name)]),
        card(name, tag("img", alt=name, src="data:image/png;base64,AAAA"), about=name),
    ]
    return document(name, section(name, grid(parts), about=name))


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:20]))
def test_a_hostile_name_is_text_in_every_place_and_adds_no_element(name: str) -> None:
    text = page_of(name)
    page, plain = parse_page(text), parse_page(page_of("plain"))
    text.encode()  # half of a pair of surrogates would fail
    assert loose_ends(page) == []
    assert "\x00" not in text

    def shape(node: object) -> list[str]:
        return [node.name, *(part for one in node.inside if not isinstance(one, str) for part in shape(one)), "/"]

    assert shape(page) == shape(plain)
    shown = name.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert page.all("title")[0].text == shown
    assert page.all("td")[0].text == shown
    assert page.all("p")[1].attributes["title"] == shown
    assert page.all("b")[0].text == shown


def test_a_page_forbids_what_it_does_not_need() -> None:
    (policy,) = (
        one.attributes["content"] for one in parse_page(document("t")).all("meta") if "http-equiv" in one.attributes
    )
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_text_beside_elements_keeps_its_order() -> None:
    page = parse_page(document("t", tag("p", "a", tag("b", "b"), "c", "d", tag("i", "e"), None, ["f", "g"])))
    assert page.all("p")[0].text == "abcdefg"
    assert page.all("p")[0].inside[0] == "a"


def test_what_is_empty_is_left_out() -> None:
    assert section("title", None, [], grid(None, [None])) is None
    assert legend([("k0", "one")]) is None
    assert line_chart("t", Axis("x"), Axis("y"), [Curve("a", (), 0)]) is None
    assert bar_chart("t", "x", "y", [], {}) is None
    assert rows("t", "", [], unit="s") is None
    assert load_chart("t", [], []) is None
    assert matrix_chart("t", "", ["a"], [[0]]) is None
    assert timeline("t", "s", [Lane("a", ())]) is None


@pytest.mark.parametrize("name", HOSTILE[:4], ids=lambda name: repr(name[:20]))
def test_a_browser_runs_nothing_that_a_name_holds(name: str, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_of(name))
    found = parse_page(browser.dom(path)).all("title")[0].text
    assert found == name
