"""A link that is cut ends the ranks on both sides with an error. Nodes are network namespaces, which need root."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from synchromesh.parallel.comm.heartbeat import Heartbeat
from synchromesh.testing.programs import HANG, job

RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from synchromesh.parallel.comm.job import LostRankError, joined
try:
    with joined(timeout=timedelta(seconds=15)) as grid:
        for step in range(10**6):
            dist.all_reduce(torch.ones(1000))
            if step == 50:
                print("exchanging", flush=True)
except LostRankError as error:
    print("lost:", error, flush=True)
    import os
    os._exit(5)
"""
LATE = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from synchromesh.parallel.comm.job import LostRankError, joined
try:
    with joined(timeout=timedelta(seconds=10)) as grid:
        if grid.rank == 1:
            os.kill(os.getpid(), 19)
        flights = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)]
        said = []
        for flight in flights:
            try:
                flight.wait()
            except RuntimeError as error:
                said.append(error)
        raise said[-1]
except LostRankError as error:
    print("lost:", error, flush=True)
    os._exit(5)
"""
NODES = ("smcut0", "smcut1")


def tool(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two nodes and a cable."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")  # a user's machine; as root it runs
    try:
        for node in NODES:
            tool(f"ip netns add {node}")
        tool(f"ip link add eth0 netns {NODES[0]} type veth peer name eth0 netns {NODES[1]}")
        for number, node in enumerate(NODES):
            tool(f"ip -n {node} addr add 10.78.0.{number + 1}/24 dev eth0")
            tool(f"ip -n {node} link set lo up")
            tool(f"ip -n {node} link set eth0 up")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        remove()
        pytest.skip(f"no network namespaces here: {error}")  # a container may forbid them, or lack `ip`
    yield
    remove()


def remove() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def test_a_cut_link_is_an_error_on_both_sides_and_not_a_hang(nodes):
    ranks = []
    for rank, node in enumerate(NODES):
        job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        job |= {"MASTER_ADDR": "10.78.0.1", "MASTER_PORT": 29501, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in job.items()}}
        command = ["ip", "netns", "exec", node, sys.executable, "-c", RANK]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "exchanging\n"
        tool(f"ip -n {NODES[1]} link set eth0 down")
        said = [rank.communicate(timeout=HANG)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [5, 5]
    assert "ranks [1] do not answer" in said[0]  # the first rank keeps the store
    assert "is the network cut?" in said[1]


def test_a_rank_that_stops_under_several_exchanges_is_named_by_the_last_one_too() -> None:
    """After its first time-out gloo closes the pair, and words what waited behind it in another way."""
    with job(2, "-c", LATE) as ranks:
        said = ranks[0].wait().stdout
    assert "ranks [1] do not answer (Application timeout caused pair closure)" in said


def test_a_heart_that_is_stopped_leaves_no_thread_behind() -> None:
    """A thread inside the store while the interpreter ends aborts the process, now and then."""
    heart = Heartbeat(dist.HashStore(), rank=0, size=2)
    assert any(thread.name == "heartbeat" for thread in threading.enumerate())
    heart.stop()
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
