"""The report, read as text and opened in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.report import write_report
from synchromesh.training.task import Bars, Curves, Sheet

pytest.importorskip("plotly")
LAYER = "backbone.stages.1.blocks.1.ffn"
PANELS = (
    Sheet("Sizes <of> boxes", ("size", "AP"), (("small", "0.250"), ("large", "-"))),
    Bars("AP of classes", "class", "AP in 1", ("cat", "dog"), {"boxes": (0.5, 0.25), "masks": (0.4, 0.2)}),
    Curves(
        "Precision, recall", "recall of all", "precision of all",
        {f"IoU {iou}": tuple((n / 8, 1 - iou * (n / 8) ** 2) for n in range(9)) for iou in (0.5, 0.75)},
    ),
)  # fmt: skip


def numbers(prefix: str) -> dict[str, float]:
    values = {
        "test_accuracy": 0.98765, "test_loss": 0.05, "train_seconds": 123.4, "images_per_second": 987.0,
        "evaluated_images_per_second": 2345.0, "parameters": 1234567, "active_parameters": 456789,
    }  # fmt: skip
    return {prefix + name: value for name, value in values.items()}


def write_run(folder: Path, config: TrainConfig, *, finished: bool = True) -> None:
    """Write what a run of six epochs with a twin leaves behind."""
    (folder / "dense").mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(encode(config)))
    lines = []
    for i in range(1, 13):
        common = {"step": i, "epoch": i / 2, "seconds": 1.0 * i, "accuracy": 1 - 0.5 / i, "loss": 1 / i}
        load = {LAYER: [0.25 + 0.01 * i, 0.25, 0.25, 0.25 - 0.01 * i]}
        train = {
            "kind": "train",
            "task_loss": 1 / i,
            "images_per_second": 900.0 + 50 * (i % 3),
            "drop_rate": 0.1 / i,
            "load": load,
        }
        lines.append({**common, **train})
        if i % 2 == 0:
            lines.append({**common, "kind": "test", "images_per_second": 2000.0, "drop_rate": 0.03 / i, "load": load})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dense = [{**line, "load": {}, "drop_rate": 0.0} for line in lines]
    (folder / "dense" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dense))
    if finished:
        summary = {
            **numbers(""), **numbers("dense_"), "recipe": "tiny", "seed": 0, "epochs": 6, "test_images": 1000,
            "device": "cpu", "dead_experts": 0, "test_load": {LAYER: [0.3, 0.25, 0.25, 0.2]},
            "panels": [encode(panel) for panel in PANELS],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))


def test_the_report_needs_nothing_from_outside(tiny: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path, tiny)
    page = write_report(tmp_path, CATALOG).read_text()
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "")  # without plotly itself
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", own)
    assert "98.77%" in own
    assert "No expert is dead." in own
    for title in ("Accuracy", "Loss", "Throughput of training", "Dropped tokens", "Expert load: stage 2, block 2"):
        assert title in own
    for unit in ("epoch", "accuracy, %", "loss, nats", "images per second", "expert"):
        assert unit in own


def test_the_panels_of_a_task_are_in_the_report(tiny: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path, tiny)
    page = write_report(tmp_path, CATALOG).read_text()
    assert "<h2>Sizes &lt;of&gt; boxes</h2>" in page
    assert "<tr><th>small</th><td>0.250</td></tr><tr><th>large</th><td>-</td></tr>" in page
    figures = [json.loads(one) for one in re.findall(r"<script type='application/json'>(.*?)</script>", page)]
    by_title = {one["layout"]["title"]["text"]: one for one in figures}
    bars, curves = by_title["AP of classes"], by_title["Precision"]
    assert [(one["name"], one["y"]) for one in bars["data"]] == [("boxes", [0.5, 0.25]), ("masks", [0.4, 0.2])]
    assert [one["name"] for one in curves["data"]] == ["IoU 0.5", "IoU 0.75"]
    assert {one["type"] for one in curves["data"]} == {"scatter"}
    assert [one["x"] for one in curves["data"]] == [[n / 8 for n in range(9)]] * 2
    assert [[one["y"][n] for n in (0, 4, 8)] for one in curves["data"]] == [[1, 0.875, 0.5], [1, 0.8125, 0.25]]
    axes = [curves["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert axes == ["recall of all", "precision of all"]


def test_an_unfinished_run_has_a_report_too(tiny: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path, tiny, finished=False)
    assert "not finished yet" in write_report(tmp_path, CATALOG).read_text()


def test_names_from_outside_cannot_break_out_of_the_page(tiny: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path, dataclasses.replace(tiny, name="</script><b>loud"))
    assert "<b>loud" not in write_report(tmp_path, CATALOG).read_text()


def change(folder: Path, **fields: object) -> None:
    file = folder / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_hostile_names_of_classes_and_captions_stay_text(tiny: TrainConfig, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    write_run(tmp_path, tiny)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"png")
    panels = [Sheet(evil, (evil,), ((evil,),)), Bars(evil, evil, evil, (evil, "b"), {evil: (1.0, 2.0)})]
    panels.append(Curves(evil, evil, evil, {evil: ((0.0, 1.0), (1.0, 0.0))}))
    change(tmp_path, panels=[encode(panel) for panel in panels], pictures={"a.png": evil}, device=evil)
    page = write_report(tmp_path, CATALOG).read_text()
    assert "alert(1)" in page  # it is there, as text
    assert "<script>alert" not in page
    assert "<img src=x" not in re.sub(r"<script type='application/json'>.*?</script>", "", page)


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/hostname", "link.png"])
def test_no_picture_leads_out_of_the_folder(name: str, tiny: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny)
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "run" / "pictures").mkdir()
    (tmp_path / "run" / "pictures" / "link.png").symlink_to(tmp_path / "secret.txt")
    change(tmp_path / "run", pictures={name: "x"})
    with pytest.raises(InputError, match="leads out of its folder"):
        write_report(tmp_path / "run", CATALOG)


@pytest.mark.parametrize("fields", [{"device": 5}, {"test_images": "x"}, {"panels": [1]}, {"test_load": 3}], ids=str)
def test_a_summary_of_another_program_is_refused_in_a_sentence(
    fields: dict[str, object], tiny: TrainConfig, tmp_path: Path
) -> None:
    write_run(tmp_path, tiny)
    change(tmp_path, **fields)
    with pytest.raises(InputError, match="that this version does not write"):
        write_report(tmp_path, CATALOG)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        write_report(tmp_path, CATALOG)


@pytest.fixture
def browser(request: pytest.FixtureRequest) -> str:
    """Find a Chromium; without one skip, or fail where --require-browser says so."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    reason = "no chromium in PATH to open the report with (Debian: apt-get install chromium)"
    if request.config.getoption("--require-browser"):
        pytest.fail(reason)
    pytest.skip(reason)  # optional on a user's machine; CI passes --require-browser


def drawn(browser: str, page: Path, profile: Path) -> str:
    """Return the page as it stands after its scripts have run."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,2400 --dump-dom"
    command = [browser, *quiet.split(), *more.split(), f"--user-data-dir={profile}", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_browser_draws_every_curve(tiny: TrainConfig, tmp_path: Path, browser: str) -> None:
    write_run(tmp_path / "run", tiny)
    dom = drawn(browser, write_report(tmp_path / "run", CATALOG), tmp_path / "profile")
    figures = re.split(r"<figure>", dom)[1:]
    titles = [re.search(r'class="gtitle"[^>]*>([^<]*)', figure) for figure in figures]
    by_title = {title.group(1): figure for title, figure in zip(titles, figures, strict=True) if title}
    lines = {
        title: [path for path in re.findall(r'<path class="js-line"[^>]* d="([^"]*)"', figure) if len(path) > 30]
        for title, figure in by_title.items()
    }
    assert len(lines["Accuracy"]) == 4  # two models, test and training
    assert len(lines["Loss"]) == 4
    assert len(lines["Throughput of training"]) == 2
    assert len(lines["Dropped tokens"]) == 2
    assert len(lines["Precision"]) == 2
    assert by_title["AP of classes"].count('class="point"') == 4
    assert 'class="hm"' in by_title["Expert load: stage 2, block 2"]
    assert by_title["Expert load in the last test"].count('class="point"') == 4
