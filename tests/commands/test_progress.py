import io

import pytest
from rich.console import Console

from synchromesh.commands.progress import RunProgress, load_bar
from synchromesh.tasks.classification import Classification
from synchromesh.training.job import Event

LINE = {
    "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "images_per_second": 900.0, "drop_rate": 0.02, "learning_rate": 1e-3,
    "load": {"backbone.stages.1.blocks.1.ffn": [0.6, 0.4, 0.0, 0.0]},
}  # fmt: skip


def events(steps: int) -> list[Event]:
    training = [Event("step", i, steps, {"loss": 1 / i}) for i in range(1, steps + 1)]
    lines = [Event("train", i, steps, LINE) for i in range(10, steps, 10)]
    return [*training, *lines, Event("note", steps, steps, text="left out: a.png"), Event("test", steps, steps, LINE)]


def test_no_thousands_of_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with RunProgress(Console(file=out, width=200), "MoE", Classification()) as progress:
        for event in events(5000):
            progress.tell(event)
    lines = out.getvalue().splitlines()
    assert len(lines) <= 4
    assert lines[0] == "left out: a.png"
    assert "accuracy 75.00%" in lines[-1]
    assert "dropped 2.0%" in lines[-1]


def test_a_terminal_shows_numbers_and_the_load_of_every_layer() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with RunProgress(console, "MoE", Classification()) as progress:
        for event in events(20):
            progress.tell(event)
        console.print(progress)
    shown = out.getvalue()
    assert "20/20" in shown
    assert "stage 2, block 2" in shown
    assert "load 0.0% to 60.0%" in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_breaks_lines_between_numbers_only(width: int) -> None:
    out = io.StringIO()
    progress = RunProgress(Console(file=io.StringIO(), width=width), "MoE", Classification())
    for event in events(20):
        progress.tell(event)
    Console(file=out, width=width).print(progress)
    lines = [line.replace("\u00a0", " ") for line in out.getvalue().splitlines()]
    for said in ("train accuracy 75.00%", "test accuracy 75.00%", "900 images/s", "dropped 2.0%", "lr 1.0e-03"):
        assert any(said in line for line in lines), said
    assert max(map(len, lines)) <= width


def test_the_bar_shows_the_load_against_its_fair_part() -> None:
    bar = load_bar([0.25, 0.25, 0.5, 0.0])
    assert bar.plain == "▅▅█▁"
    assert [str(span.style) for span in bar.spans] == ["cyan", "cyan", "cyan", "red"]
