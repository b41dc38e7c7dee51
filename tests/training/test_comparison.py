import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.browser import Browser
from synchromesh.testing.pages import Node, loose_ends, parse_page
from synchromesh.training.comparison import names_of, write_comparison
from synchromesh.training.config import TrainConfig

Written = Callable[..., None]


@pytest.fixture
def runs(tiny: TrainConfig, written: Written, tmp_path: Path) -> list[Path]:
    """Three runs: the second is better and has another learning rate, the third is not finished and has no experts."""
    folders = [tmp_path / name for name in ("base", "better", "<b>going")]
    faster = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, lr=0.5), epochs=9)
    dense = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, experts=None))
    for folder, config in zip(folders, (tiny, faster, dense), strict=True):
        written(folder, config, twin=False, finished=config is not dense)
    path = folders[1] / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_accuracy": 0.995, "test_loss": 0.07}))
    return folders


def compared(runs: list[Path], path: Path) -> Node:
    write_comparison(runs, path, CATALOG)
    return parse_page(path.read_text())


def test_runs_stand_beside_one_another_and_the_best_is_marked(runs: list[Path], tmp_path: Path) -> None:
    page = compared(runs, tmp_path / "page.html")
    assert loose_ends(page) == []
    numbers = page.figure("Numbers")
    rows = {first: rest for first, *rest in numbers.cells()}
    assert rows[""] == ["base", "better", "<b>going"]
    assert rows["test accuracy"] == ["98.77%", "99.50%", "-"]
    assert rows["test loss, nats"] == ["0.0500", "0.0700", "-"]
    assert [one.text for one in numbers.all("b")] == ["Numbers", "99.50%", "0.0500"]  # more is better, and less


def test_every_run_has_a_curve_of_its_own_over_epochs_and_over_time(runs: list[Path], tmp_path: Path) -> None:
    page = compared(runs, tmp_path / "page.html")
    for title in ("Accuracy", "Loss", "Accuracy over time", "Training loss", "Throughput of training", "Learning rate"):
        curves = page.figure(title).all("path", "line")
        assert len(curves) == (1 if title == "Learning rate" else 3), title
    assert [one.text for one in page.figure("Accuracy").all("li")] == ["base", "better", "<b>going"]
    assert len(page.figure("Busiest expert").all("path", "line")) == 3


def test_settings_that_differ_are_listed_and_no_others(runs: list[Path], tmp_path: Path) -> None:
    rows = compared(runs, tmp_path / "page.html").figure("Recipes").cells()
    assert rows == [
        ["setting", "base", "better", "<b>going"],
        ["model.experts", "ExpertsConfig", "ExpertsConfig", "None"],
        ["optim.lr", "0.001", "0.5", "0.001"],
        ["epochs", "2", "9", "2"],
    ]


def test_runs_of_one_name_are_told_apart() -> None:
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/b/other"), Path("/b/other")]
    assert names_of(paths) == ["x/run", "y/run", "other (3)", "other (4)"]


def test_the_command_writes_one_page_of_several_runs(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(run) for run in runs]
    assert cli.main(["report", *given]) == 0
    assert str(tmp_path / "comparison.html") in capsys.readouterr().out
    assert cli.main(["report", *given, "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == (tmp_path / "comparison.html").read_text()
    assert not (runs[0] / "report.html").exists()
    assert cli.main(["report", given[0]]) == 0
    assert (runs[0] / "report.html").is_file()
    assert cli.main(["report"]) == 2
    assert cli.main(["report", given[0], "--out", "x.html"]) == 2
    assert "--out is for several runs" in capsys.readouterr().err


def test_what_is_no_run_is_named(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none is not the folder of a run"):
        write_comparison([*runs, tmp_path / "none"], tmp_path / "page.html", CATALOG)


def test_a_browser_shows_the_comparison_on_a_telephone(runs: list[Path], tmp_path: Path, browser: Browser) -> None:
    compared(runs, tmp_path / "page.html")
    seen = browser.laid_out(tmp_path / "page.html", width=420, dark=True)
    assert (seen["content"], seen["outside"], seen["lines"]["Accuracy"]) == (420, [], 3)


def test_folds_have_their_mean_on_the_page_and_in_the_terminal(
    tiny: TrainConfig, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / f"fold{fold}" for fold in range(2)]
    for fold, folder in enumerate(folders):
        written(folder, dataclasses.replace(tiny, folds=2, fold=fold), twin=False)
        path = folder / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "test_accuracy": (0.5, 0.7)[fold]}))
    assert cli.main(["report", *map(str, folders)]) == 0
    page = parse_page((tmp_path / "comparison.html").read_text())
    assert page.figure("Folds of tiny").cells()[1] == ["test accuracy", "60.00%", "14.14%"]
    assert "test accuracy 60.00% ± 14.14% · test loss" in capsys.readouterr().out


def test_a_twin_beside_its_run_has_its_own_numbers(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path / "run", tiny, twin=True)
    (tmp_path / "run" / "dense" / "recipe.json").write_text((tmp_path / "run" / "recipe.json").read_text())
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())
    page = compared([tmp_path / "run", tmp_path / "run" / "dense"], tmp_path / "page.html")
    rows = {first: rest for first, *rest in page.figure("Numbers").cells()}
    both = [whole["test_accuracy"], whole["dense_test_accuracy"]]
    assert rows["test accuracy"] == [f"{value:.2%}" for value in both]
    assert rows["parameters"] == [f"{whole[name]:,}" for name in ("parameters", "dense_parameters")]
