import io
import sys

import pytest

from synchromesh.commands.help_page import HERE, fitted, help_pages

PAGE = f"""usage: prog run [-h] PATH [--one {{None}}|INT] [--two {{None}}|PATH]

{HERE}

| [[PATH [PATH ...]]]  folders. (default: ) |
| --one {{None}}|INT     a number.            |
"""


def test_paragraphs_are_filled_and_no_word_is_broken() -> None:
    text = fitted("one two three\nfour five-six\n\n  an example", 14)
    assert text == "one two three\nfour five-six\n\n  an example"
    assert fitted("a-very-long-word-indeed here", 8).splitlines() == ["a-very-long-word-indeed", "here"]


def test_a_remark_goes_below_its_example_and_choices_break_behind_commas() -> None:
    assert fitted("  prog run one two       what it does", 24) == "  prog run one two\n      what it does"
    assert fitted("  prog run one two three four five six", 24) == "  prog run one two three four five six"  # to paste
    assert fitted("  --kind {first,second,third} (now: first)", 24).splitlines() == [
        "  --kind {first,second,",
        "      third} (now:",
        "      first)",
    ]


def test_a_parsers_page_says_the_text_in_frames_that_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with help_pages("Say\n\\1 it."):
        sys.stdout.write(PAGE)
    usage, about, table = capsys.readouterr().out.split("\n\n")
    assert usage == "usage: prog run [-h] PATH\n       [--one INT|None]\n       [--two PATH|None]"
    assert about == "Say \\1 it."
    assert table.splitlines() == [
        "| [PATH ...]           folders. (optional)  |",
        "| --one INT|None       a number.            |",
    ]


def test_nothing_is_printed_where_no_page_was(capsys: pytest.CaptureFixture[str]) -> None:
    with help_pages("Say it."):
        pass
    assert capsys.readouterr().out == ""


def test_an_output_that_knows_no_frames_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with help_pages("Say it."):
        assert sys.stdout.encoding == "ascii"
