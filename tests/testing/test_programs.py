"""Programs for tests behave as those of a real `python`."""

import signal
import subprocess
import sys

import pytest

from synchromesh import seeds
from synchromesh.testing.programs import Program, run_job, run_program

SCRIPT = """
import os, sys, warnings
import beside
if __name__ == "__main__":
    print(beside.WORD, sys.argv[1:], os.getcwd(), os.environ.get("WORD"), flush=True)
    warnings.warn("odd")
    print("said to the other", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "beside.py").write_text("WORD = 'imported'")
    (tmp_path / "code" / "script.py").write_text(SCRIPT)
    return tmp_path / "code" / "script.py"


@pytest.mark.parametrize("options", [[], ["-W", "error"], ["-W", "error", "-W", "ignore:od:UserWarning"]], ids=str)
@pytest.mark.parametrize("how", ["script", "module", "code"])
def test_code_output_and_exit_code_are_those_of_python(script, how, options):
    what = {"script": [script], "module": ["-m", "script"], "code": ["-c", SCRIPT]}[how]
    cwd = script.parents[1] if how == "script" else script.parent
    arguments = [*options, *what, "7"]
    got = run_program(*arguments, cwd=cwd, environment={"WORD": "told"})
    command = [sys.executable, *map(str, arguments)]
    wanted = subprocess.run(command, cwd=cwd, env={"WORD": "told"}, capture_output=True, text=True, check=False)
    assert got.stdout == wanted.stdout
    assert got.returncode == wanted.returncode == (1 if options == ["-W", "error"] else 7)
    for said in ("UserWarning: odd", "said to the other", "Traceback"):
        assert (said in got.stderr) == (said in wanted.stderr), said


def test_a_program_without_trouble_ends_with_0():
    assert run_program("-c", "pass").returncode == 0


def test_a_module_that_the_server_has_imported_runs_as_a_program_without_a_warning():
    done = run_program("-W", "error", "-m", seeds.__name__)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_a_signal_ends_says_which():
    with Program(["-c", "import signal; signal.pause()"]) as program:
        program.send_signal(signal.SIGTERM)
        assert program.wait().returncode == -signal.SIGTERM


INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("stopped")
"""


def test_an_interrupt_reaches_the_program():
    assert run_program("-c", INTERRUPTED).stdout == "stopped\n"


def test_a_program_that_hangs_is_named_with_what_it_said():
    code = "import signal; signal.pause()"
    with (
        Program(["-c", code]) as program,
        pytest.raises(TimeoutError, match=r"signal\.pause.* still runs after 0\.1 s"),
    ):
        program.wait(timeout=0.1)


def test_a_program_knows_nothing_of_one_before_it():
    assert run_program("-c", "import torch; torch.relu = None; torch.set_default_dtype(torch.float64)").returncode == 0
    assert run_program("-c", "import torch; print(torch.relu, torch.get_default_dtype())").stdout.endswith("float32\n")
    assert "None" not in run_program("-c", "import torch; print(torch.relu)").stdout


JOB = """
import torch
from synchromesh.parallel.comm.job import joined
import torch.distributed as dist
with joined() as grid:
    total = torch.tensor(grid.rank)
    dist.all_reduce(total)
    print(grid.rank, grid.size, grid.nodes, int(total))
"""


def test_the_ranks_of_a_job_find_each_other():
    assert [done.stdout for done in run_job(3, "-c", JOB)] == [f"{rank} 3 1 3\n" for rank in range(3)]
