"""mpiexec's words become torchrun's, and torchrun's ranks run the script."""

import os
import socket
import subprocess
import sys

import pytest

from synchromesh.compat.tutel.launcher.run import main, torchrun_arguments

EXECL = ["-m", "synchromesh.compat.tutel.launcher.execl"]


def test_alone_a_node_is_the_job():
    told = torchrun_arguments(["train.py", "-x"], {"LOCAL_SIZE": "8", "MASTER_ADDR": "elsewhere"})
    assert told == [
        "--nproc-per-node=8",
        "--nnodes=1",
        "--node-rank=0",
        "--master-addr=localhost",
        "--master-port=23232",
        *EXECL,
        "train.py",
        "-x",
    ]


def test_under_mpiexec_nodes_make_one_job():
    job = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    told = torchrun_arguments(["-m", "train"], {**job, "MASTER_ADDR": "first", "MASTER_PORT": "5"})
    assert told[:5] == ["--nproc-per-node=1", "--nnodes=4", "--node-rank=3", "--master-addr=first", "--master-port=5"]
    with pytest.raises(ValueError, match="no MASTER_ADDR"):
        torchrun_arguments(["train.py"], job)
    with pytest.raises(ValueError, match="LOCAL_SIZE is 'two'"):
        torchrun_arguments(["train.py"], {"LOCAL_SIZE": "two"})


SCRIPT = """
import sys
import torch
from tutel import net, system
env = system.init_data_model_parallel(group_count=2, backend="gloo")
assert (env.global_size, env.model_size, env.data_size, env.is_distributed) == (2, 1, 2, True)
assert env.local_device == torch.device("cpu")
total = net.simple_all_reduce(torch.tensor(env.global_rank + 1), env.data_group)
env.dist_print("total", int(total), sys.argv[1:])
"""


def test_ranks_run_the_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "synchromesh.compat.tutel.launcher.run", "-m", "script", "7"]
    environment = {**os.environ, "LOCAL_SIZE": "2", "MASTER_PORT": str(port)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "total 3 ['7']\n"


def test_without_a_script_nothing_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match="usage:"):
        main()
    monkeypatch.setattr(sys, "argv", ["run", "script.py"])
    monkeypatch.setenv("MASTER_PORT", "none")
    with pytest.raises(SystemExit, match="error: the environment variable MASTER_PORT is 'none', wanted a number"):
        main()
