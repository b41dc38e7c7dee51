"""`synchromesh verify` as users run it: alone, on ranks of its own, and when something is broken."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest

from synchromesh import cli
from synchromesh.commands import verification
from synchromesh.testing.programs import run_job

BROKEN = """
import sys
from synchromesh import cli
from synchromesh.parallel.comm import all_to_all, collectives
class Broken:
    def __init__(self, flight): self.flight = flight
    def wait(self):
        rows = self.flight.wait()
        return rows * 1.001 if rows.is_floating_point() else rows
all_to_all.all_to_all = lambda *args: Broken(collectives.all_to_all(*args))
sys.exit(cli.main(["verify", "--quick"]))
"""


def test_one_process_verifies_its_one_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 0
    assert "24 of 24 results equal the definition" in capsys.readouterr().out


def test_ranks_of_its_own_verify_every_plan_and_say_so_in_json() -> None:
    command = [sys.executable, "-m", "synchromesh.cli", "verify", "--world=2", "--quick", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) > 20
    assert all(one["good"] and one["worst_error"] < 1e-10 for one in found)
    assert {one["plan"]["gather"] for one in found} == {1, 2}


def test_a_broken_exchange_ends_with_exit_code_1_and_names_the_plan() -> None:
    first, second = run_job(2, "-c", BROKEN)
    assert first.returncode == second.returncode == 1
    assert "g=1 differs in" in first.stdout
    assert "g=2 differs in" not in first.stdout


def test_a_wrong_result_of_one_process_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(verification, "relative_rms", lambda got, wanted: 1e-3):
        assert cli.main(["verify", "--quick"]) == 1
    assert "differs in" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--world=0"], ["--ranks-per-node=3"]], ids=str)
def test_senseless_numbers_of_ranks_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
