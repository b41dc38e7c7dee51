"""The report, read by a parser and laid out by a browser."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from synchromesh.adapt.adapting import Adapting
from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.browser import Browser, contrast
from synchromesh.testing.pages import Node, loose_ends, parse_page
from synchromesh.training.config import Start, TrainConfig
from synchromesh.training.report import write_report

Written = Callable[..., None]


def report(folder: Path) -> Node:
    return parse_page(write_report(folder, CATALOG).read_text())


def titles(page: Node) -> list[str]:
    return [figure.all("b")[0].text for figure in page.all("figure") if figure.all("b")]


def test_the_report_needs_nothing_from_outside_and_is_small(
    tiny: TrainConfig, written: Written, tmp_path: Path
) -> None:
    written(tmp_path, tiny)
    page = report(tmp_path)
    assert loose_ends(page) == []
    assert (tmp_path / "report.html").stat().st_size < 60_000
    assert "98.77%" in page.all("p", "lead")[0].text
    assert "No expert is dead." in page.all("p", "lead")[0].text
    wanted = ["Accuracy", "Loss", "Learning rate", "Throughput of training", "Stage 2, block 2", "Dropped tokens"]
    assert set(wanted) <= set(titles(page))
    for unit in ("epoch", "accuracy, %", "loss, nats", "images per second", "expert"):
        assert unit in page.text


def test_models_and_their_training_are_told_apart(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, tiny)
    page = report(tmp_path)
    names = ["MoE, test", "MoE, training", "dense twin, test", "dense twin, training"]
    assert [one.text for one in page.figure("Accuracy").all("li")] == names
    assert [len(page.figure(title).all("path", "line")) for title in ("Accuracy", "Loss")] == [4, 4]
    assert len(page.figure("Throughput of training").all("path", "line")) == 2
    assert len(page.figure("Learning rate").all("path", "line")) == 1  # that of the twin is the same
    rows = page.figure("Beside the dense twin").cells()
    assert rows[0] == ["", "MoE", "dense twin"]
    assert ["parameters", "1,234,567", "1,234,567"] in rows


def test_an_adapted_model_is_called_by_what_it_became(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, dataclasses.replace(tiny, start=Start(adapt=Adapting())))
    figure = report(tmp_path).figure("Beside the dense twin")
    assert figure.cells()[0] == ["", "SplitFFN", "dense twin"]
    assert "the same as it was, trained as long" in figure.text


def test_the_panels_of_a_task_are_in_the_report(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, tiny)
    page = report(tmp_path)
    assert page.figure("Sizes <of> boxes").cells() == [["size", "AP"], ["small", "0.250"], ["large", "-"]]
    assert len(page.figure("AP of classes").all("rect", "fill")) == 4
    assert [one.text for one in page.figure("Precision, recall").all("li")] == ["IoU 0.5", "IoU 0.75"]
    assert page.figure("Confusion matrix").cells()[1:] == [["cat", "7", "1"], ["dog", "0", "5"]]


def test_pictures_stand_in_the_page_with_what_is_said_of_them(
    tiny: TrainConfig, written: Written, tmp_path: Path
) -> None:
    written(tmp_path, tiny)
    page = report(tmp_path)
    (image,) = page.all("img")  # the file of the other one is gone
    assert image.attributes["src"].startswith("data:image/png;base64,iVBOR")
    (card,) = (one for one in page.all("figure") if one.all("img"))
    assert [one.text for one in card.all("p")] == ["4, taken for 9 (98.0%)", "worst 1: test images number 7"]
    heads = [one.text for one in page.all("h2")]
    assert any(head.startswith("Most confident mistakes") for head in heads)
    assert not any(head.startswith("Surest") for head in heads)


def test_what_is_empty_is_left_out(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, tiny, twin=False)
    file = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [{**line, "drop_rate": 0.0, "load": {}} for line in lines if line["kind"] == "train"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "panels": [], "pictures": {}, "test_load": {}}))
    page = report(tmp_path)
    assert [one.text for one in page.all("h2")] == ["Learning"]
    assert titles(page) == ["Accuracy", "Loss", "Learning rate", "Throughput of training"]
    assert all(len(figure.all("path", "line")) == 1 for figure in page.all("figure"))


def test_an_unfinished_run_has_a_report_too(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, tiny, finished=False)
    page = report(tmp_path)
    assert "not finished yet" in page.all("p", "lead")[0].text
    assert {"Accuracy", "Stage 2, block 2"} <= set(titles(page))


def test_names_from_outside_cannot_break_out_of_the_page(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    name = "</script></style><script>document.title='owned'</script><b onclick=x>loud"
    written(tmp_path, dataclasses.replace(tiny, name=name))
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["panels"][0]["rows"][0][0] = summary["panels"][1]["labels"][0] = summary["panels"][2]["names"][0] = name
    summary["pictures"]["worst-1.png"] = summary["device"] = name
    summary["test_load"] = {name: [0.5, 0.5]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path)
    assert loose_ends(page) == []
    assert page.all("h1")[0].text == name
    assert page.text.count(name) >= 6


def test_a_damaged_summary_is_named(tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path, tiny)
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "panels": [{"kind": "Sheet", "title": 3}]}))
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        write_report(tmp_path, CATALOG)


def change(folder: Path, **fields: object) -> None:
    file = folder / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/hostname", "link.png"])
def test_no_picture_leads_out_of_the_folder(name: str, tiny: TrainConfig, written: Written, tmp_path: Path) -> None:
    written(tmp_path / "run", tiny)
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "run" / "pictures").mkdir(exist_ok=True)
    (tmp_path / "run" / "pictures" / "link.png").symlink_to(tmp_path / "secret.txt")
    change(tmp_path / "run", pictures={name: "x"})
    with pytest.raises(InputError, match="leads out of its folder"):
        write_report(tmp_path / "run", CATALOG)


@pytest.mark.parametrize("fields", [{"test_images": "x"}, {"panels": [1]}], ids=str)
def test_a_summary_of_another_program_is_refused_in_a_sentence(
    fields: dict[str, object], tiny: TrainConfig, written: Written, tmp_path: Path
) -> None:
    written(tmp_path, tiny)
    change(tmp_path, **fields)
    with pytest.raises(InputError, match=r"that this version does not write|is damaged"):
        write_report(tmp_path, CATALOG)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        write_report(tmp_path, CATALOG)


@pytest.mark.parametrize(("width", "dark"), [(420, True), (420, False), (1280, False)])
def test_a_browser_shows_all_of_it_within_the_window_and_readable(
    tiny: TrainConfig, written: Written, tmp_path: Path, browser: Browser, width: int, dark: bool
) -> None:
    written(tmp_path, tiny)
    seen = browser.laid_out(write_report(tmp_path, CATALOG), width=width, dark=dark)
    assert (seen["width"], seen["content"], seen["outside"]) == (width, width, [])
    lines = {"Accuracy": 4, "Loss": 4, "Learning rate": 1, "Throughput of training": 2, "Dropped tokens": 2}
    assert {title: seen["lines"][title] for title in lines} == lines
    assert seen["shapes"]["AP of classes"] == 4
    assert seen["shapes"]["Stage 2, block 2"] >= 4 + 1
    assert seen["pictures"] == [9]
    assert len(seen["words"]) > 80
    for text, size, color, behind in seen["words"]:
        assert size >= 10, text
        assert contrast(color, behind) >= 4.5, (text, color, behind)


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_paints_curves_in_the_colours_of_the_legend(
    tiny: TrainConfig, written: Written, tmp_path: Path, browser: Browser, dark: bool
) -> None:
    written(tmp_path, tiny)
    picture = browser.picture(write_report(tmp_path, CATALOG), width=1000, height=900, dark=dark)
    colors = {color: count for count, color in picture.getcolors(1 << 24)}
    first, second, paper = (
        ((106, 162, 255), (245, 167, 66), (13, 17, 23)) if dark else ((37, 99, 235), (217, 119, 6), (244, 246, 249))
    )
    assert max(colors, key=colors.__getitem__) in (paper, (22, 28, 37), (255, 255, 255))
    assert colors[paper] > 10_000
    assert min(colors[first], colors[second]) > 300
