from pathlib import Path

import pytest
import torch

from synchromesh.errors import InputError
from synchromesh.planning.dictionary import Dictionary
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.tuner import Entry, Trial
from synchromesh.testing.pages import Node, parse_page
from synchromesh.training.page.elements import document
from synchromesh.training.plan_history import plan_figures
from synchromesh.types import Plan, Workload

ONE, TWO, CHUNKS = Plan(), Plan(gather=2), Plan(chunks=2)
NAME = "backbone.stages.1.blocks.0.ffn"


def written(folder: Path) -> None:
    """A layer that tried three plans, one of them never measured, and kept the second."""
    work = Workload(64, 1, 8, 16, 4, torch.float32, training=True)
    trials = [Trial(ONE, 0.010, [0.020, 0.024, 0.022]), Trial(TWO, 0.012, [0.011]), Trial(CHUNKS, 0.02)]
    seldom = {work: Entry(trials, TWO, settled=True)}
    tested = Workload(64, 1, 8, 16, 4, torch.float32, training=False)
    seldom[tested] = Entry([Trial(TWO, 0.001, [0.0001] * 9)], TWO, settled=True)
    record = [(0, ONE), (2, TWO), (5, CHUNKS), (6, ONE), (10, TWO)]
    (folder / "plans.json").write_text(Dictionary(Ranks(2, 2), {NAME: seldom}, {NAME: record}).to_json())


def page(figures: list) -> Node:
    return parse_page(document("t", figures))


def test_each_stretch_of_time_has_its_plan_and_what_it_cost(tmp_path: Path) -> None:
    written(tmp_path)
    figure = page(plan_figures(tmp_path, {"plans": {NAME: {"g=1": 6, "g=2": 33, "g=1, 2 chunks": 1}}}, 7)).figure(
        "Plans over time"
    )
    runs = figure.all("div", "runs")[0].all("span")
    assert [one.attributes["title"] for one in runs] == [
        "stage 2, block 1: g=1, 1 to 2; 22.00 ms",
        "stage 2, block 1: g=2, 3 to 5; 11.00 ms",
        "stage 2, block 1: g=1, 2 chunks, 6 to 6",
        "stage 2, block 1: g=1, 7 to 10; 22.00 ms",
        "stage 2, block 1: g=2, 11 to 40; 11.00 ms",
    ]
    assert "now g=2" in figure.text


def test_the_table_counts_forwards_and_compares_what_was_measured(tmp_path: Path) -> None:
    written(tmp_path)
    table = page(plan_figures(tmp_path, {"plans": {NAME: {"all": 40}}}, 7)).figure("What each plan cost")
    assert table.cells()[1:] == [
        ["stage 2, block 1", "g=2", "33", "12.00", "11.00", "1.00x"],
        ["", "g=1", "6", "10.00", "22.00", "2.00x"],
        ["", "g=1, 2 chunks", "1", "20.00", "-", "-"],
    ]
    assert [one.text for one in table.all("b")] == ["What each plan cost", "g=2"]


def test_an_unfinished_run_is_shown_to_its_last_logged_step(tmp_path: Path) -> None:
    written(tmp_path)
    figure = page(plan_figures(tmp_path, {}, 25)).figure("Plans over time")
    assert (
        figure.all("div", "runs")[0].all("span")[-1].attributes["title"].startswith("stage 2, block 1: g=2, 11 to 25")
    )


def test_a_run_of_fixed_plans_has_none_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert plan_figures(tmp_path, {}, 3) == []
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(InputError, match=r"plans\.json: the file of plans is no JSON"):
        plan_figures(tmp_path, {}, 3)
