import io
import re

import pytest
from rich.console import Console

from synchromesh import cli
from synchromesh.commands.tables import Column, Row, show_table
from synchromesh.testing.programs import run_program

COLUMNS = [Column("ranks"), Column("plan", words=True), *(Column(f"number {i}") for i in range(6))]
ROWS = [Row((f"{10**i:,}", f"g={i}", *(f"{i},{j}00,000" for j in range(6)))) for i in range(4)]
CELLS = {cell for row in ROWS for cell in row.cells}


def shown(width: int, *, terminal: bool) -> str:
    out = io.StringIO()
    show_table(Console(file=out, width=width, force_terminal=terminal, no_color=True), "numbers", COLUMNS, ROWS)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_cell_is_cut_off_at_any_width(width: int, terminal: bool) -> None:
    text = shown(width, terminal=terminal)
    assert all(cell in text for cell in CELLS)
    assert "…" not in text


def test_a_narrow_terminal_gets_parts_that_fit_and_a_pipe_one_table() -> None:
    narrow = shown(40, terminal=True)
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.count("ranks") > 1  # each part begins with the first column
    assert shown(40, terminal=False).count("ranks") == 1


@pytest.mark.parametrize("columns", ["80", "40"])
def test_plans_in_a_pipe_of_few_columns_hold_every_number(columns: str) -> None:
    given = ["plan", "--world", "8..16", "--batch", "4096", "--cluster", "h100_ndr"]
    narrow = run_program("-m", "synchromesh.cli", *given, environment={"COLUMNS": columns})
    wide = run_program("-m", "synchromesh.cli", *given, environment={"COLUMNS": "300"})
    numbers = re.compile(r"[\d.,]+")
    assert narrow.returncode == wide.returncode == 1
    assert numbers.findall(narrow.stdout) == numbers.findall(wide.stdout)
    assert "…" not in narrow.stdout


def test_the_plans_of_a_run_are_shown_whole_in_a_narrow_pipe(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["plan", "--layer", "4096", "512", "512", "8", "2", "--world", "4..8"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if re.match(r"\W+4\b", line))
    assert len(re.findall(r"[\d.,]+", row)) == 9
