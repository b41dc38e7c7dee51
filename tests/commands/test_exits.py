"""What a user is told of errors, on several ranks."""

import os
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.parallel.comm.job import first_to_say
from synchromesh.testing.programs import run_job

BOTH = """
import sys
from synchromesh.parallel.comm.job import first_to_say, joined
with joined() as grid:
    print(first_to_say("the same"), first_to_say(f"rank {grid.rank} alone"))
"""


def test_an_error_of_all_ranks_is_one_line(tmp_path: Path) -> None:
    ranks = run_job(3, "-m", "synchromesh.cli", "train", "digits", "--batch-size=2", "--run=run", cwd=tmp_path)
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    said = [line for rank in ranks for line in rank.stderr.splitlines()]
    assert said == ["error: batch_size is 2, wanted at least one of the images for each of 3 ranks"]


def test_ranks_that_joined_say_one_thing_once_and_each_its_own(tmp_path: Path) -> None:
    said = [rank.stdout.split() for rank in run_job(2, "-c", BOTH, cwd=tmp_path)]
    assert sorted(same for same, _ in said) == ["False", "True"]
    assert [own for _, own in said] == ["True", "True"]


def test_alone_whatever_is_said_is_said_first() -> None:
    assert first_to_say("the same")
    assert first_to_say("the same")


@pytest.mark.parametrize("arguments", [["train", "digits", "--bogus"], ["train", "nothing"]], ids=str)
@pytest.mark.parametrize("place", ["0", "1", "many"])
def test_before_ranks_join_the_first_one_of_a_machine_speaks(
    arguments: list[str], place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": place, "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", {**os.environ, **job})
    monkeypatch.setattr("synchromesh.commands.exits._COME_UP", 0.0)
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert bool(out + err) == (place != "1")
