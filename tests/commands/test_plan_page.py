"""The page of `plan --html`."""

import json
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.commands.plan_page import memory_parts, step_parts, write_page
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.shapes import SHAPES
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import USABLE_MEMORY, Planned, plan_model
from synchromesh.testing.browser import Browser, contrast
from synchromesh.testing.pages import loose_ends, parse_page

PROFILE = load_profile("a100_hdr")


def planned(size: int, batch: int = 128) -> Planned:
    model = SHAPES["swinv2_moe_b"](ExpertsConfig(num_experts=32))
    return plan_model(model, PROFILE, Ranks(size, 8), batch=batch, training=True)


@pytest.fixture(scope="module")
def found() -> list[Planned]:
    """One that does not fit, and two that do."""
    return [planned(8, batch=2000), planned(16), planned(32)]


@pytest.mark.parametrize("size", [8, 64])
def test_parts_add_up_to_the_step_and_to_the_memory(size: int) -> None:
    one = planned(size)
    assert sum(step_parts(one).values()) == pytest.approx(one.seconds)
    assert sum(memory_parts(one).values()) == pytest.approx(one.memory)
    assert min([*step_parts(one).values(), *memory_parts(one).values()]) >= 0


def test_the_page_says_plans_parts_memory_and_what_does_not_fit(found: list[Planned], tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", {"swin <b>": found}, PROFILE)
    page = parse_page((tmp_path / "p.html").read_text())
    assert loose_ends(page) == []
    assert (tmp_path / "p.html").stat().st_size < 60_000
    assert page.all("h2")[0].text == "swin <b>"
    memory = page.figure("Memory of a rank")
    said = [one.text for one in memory.all("span", "said")]
    assert [text.endswith("does not fit") for text in said] == [True, False, False]
    assert said[1] == f"{found[1].memory / 1e9:,.1f} GB"
    assert f"{USABLE_MEMORY * PROFILE.memory_bytes / 1e9:,.1f} GB" in memory.all("li")[-1].text
    assert len(page.figure("Parts of a step").all("div", "track")) == 3
    plans = {row[1] for row in page.figure("Plans").cells()[1:]}
    assert plans == {str(layer.plan) for one in found for layer in one.layers}
    marked = page.figure("Numbers").all("tr", "bad")
    assert [row.all("th")[0].text for row in marked] == ["8"]
    assert any("does not fit" in one.text for one in page.all("li", "bad"))


def test_the_line_of_the_limit_stands_where_a_bar_of_that_memory_would_end(
    found: list[Planned], tmp_path: Path
) -> None:
    write_page(tmp_path / "p.html", {"swin": found[1:]}, PROFILE)
    memory = parse_page((tmp_path / "p.html").read_text()).figure("Memory of a rank")

    def width(style: str) -> float:
        return float(style.partition(":")[2].rstrip("%"))

    limit = USABLE_MEMORY * PROFILE.memory_bytes
    for track, one in zip(memory.all("div", "track"), found[1:], strict=True):
        bar = sum(width(span.attributes["style"]) for span in track.all("div", "runs")[0].all("span"))
        (mark,) = track.all("span", "mark")
        assert bar / width(mark.attributes["style"]) == pytest.approx(one.memory / limit, rel=0.01)


def test_the_command_writes_a_page_of_a_hugging_face_model_that_nowhere_fits(
    mixtral: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    path = tmp_path / "p.html"
    given = ["--model", str(tmp_path / "config.json"), "--batch", "1", "--world", "2"]
    assert cli.main(["plan", *given, "--html", str(path)]) == 1
    assert str(path) in capsys.readouterr().out
    assert "on none of them" in parse_page(path.read_text()).text


@pytest.mark.parametrize(("width", "dark"), [(420, True), (420, False), (1280, True)])
def test_a_browser_shows_the_page_within_the_window_and_readable(
    found: list[Planned], tmp_path: Path, browser: Browser, width: int, dark: bool
) -> None:
    write_page(tmp_path / "p.html", {"swin": found}, PROFILE)
    seen = browser.laid_out(tmp_path / "p.html", width=width, dark=dark)
    assert (seen["width"], seen["content"], seen["outside"]) == (width, width, [])
    assert (seen["lines"]["Efficiency"], seen["lines"]["Speed"]) == (2, 2)
    assert seen["shapes"]["Memory of a rank"] >= 9
    assert seen["shapes"]["Parts of a step"] >= 12
    for text, size, color, behind in seen["words"]:
        assert size >= 10, text
        assert contrast(color, behind) >= 4.5, (text, color, behind)
