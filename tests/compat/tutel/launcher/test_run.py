"""mpiexec's words become torchrun's, and torchrun's ranks run the script."""

import os
import socket
import subprocess
import sys

import pytest

from synchromesh.compat.tutel.launcher.run import torchrun_arguments

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


def test_ranks_run_the_script(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from tutel import net, system\n"
        "env = system.init_data_model_parallel(backend='gloo')\n"
        "net.barrier()\n"
        "env.dist_print(env.global_size, sys.argv[1:])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "synchromesh.compat.tutel.launcher.run"]
    environment = {**os.environ, "LOCAL_SIZE": "2", "MASTER_PORT": str(port)}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120, "check": False}
    done = subprocess.run([*command, "-m", "script", "7"], cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 ['7']\n"
    assert subprocess.run(command, **options).stderr.startswith("usage:")
