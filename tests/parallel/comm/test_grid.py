"""Who this rank is, and which groups it makes."""

import copy
import subprocess
import sys

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from synchromesh.parallel.comm.environment import in_job
from synchromesh.parallel.comm.grid import Grid
from synchromesh.testing.distributed import run_ranks
from synchromesh.testing.programs import run_program


def test_without_a_job_a_process_is_a_grid_of_one():
    grid = Grid.from_environment({})
    assert (grid.size, grid.rank, grid.nodes, grid.group) == (1, 0, 1, None)
    assert grid.axis((0,)) is None
    assert not in_job({})


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'"),
        ({"SLURM_PROCID": "1", "MASTER_ADDR": "a"}, "SLURM_NTASKS"),
    ],
)
def test_a_broken_environment_is_named(environment, says):
    with pytest.raises(ValueError, match=says):
        Grid.from_environment(environment)


def groups_of_a_rank():
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    assert (grid.size, grid.nodes, grid.rank) == (4, 2, dist.get_rank())
    assert grid.node_of(3) == 1
    pair = (0, 2) if grid.rank in (0, 2) else (1, 3)
    group = grid.axis(pair)
    assert group is grid.axis(pair)
    assert dist.get_process_group_ranks(group) == list(pair)
    assert grid.axis((0, 1, 2, 3)) is grid.group
    assert copy.deepcopy(grid) is grid
    with pytest.raises(ValueError, match="divisor"):
        Grid.from_group(dist.group.WORLD, ranks_per_node=3)
    return len(dist.distributed_c10d._world.pg_map)


def test_a_rank_makes_only_groups_it_belongs_to_and_each_once():
    assert run_ranks(groups_of_a_rank, 4) == [2, 2, 2, 2]  # the world, and its own pair


def grid_of_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    with pytest.raises(ValueError, match="mesh\\['name'\\]"):
        Grid.from_mesh(mesh)
    grid = Grid.from_mesh(mesh["expert"])
    return grid.rank, grid.size


def test_one_axis_of_a_mesh_is_a_grid():
    assert run_ranks(grid_of_a_mesh, 4) == [(0, 2), (1, 2), (0, 2), (1, 2)]


LEAVING = """
import os, socket, sys
import torch
from synchromesh.parallel.comm.collectives import all_to_all
from synchromesh.parallel.comm.job import joined

def start_two():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ.update(place, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
            return None
    return [os.waitpid(child, 0)[1] for child in children]

for _ in range(int(sys.argv[1])):  # without a rest one in ten aborts
    codes = start_two()
    if codes is None or any(codes):
        break
if codes is None:
    sys.setswitchinterval(100)  # threads that want the interpreter wait until somebody gives it up
    with joined() as grid:
        for _ in range(3):
            all_to_all(torch.randn(4, 1000), grid.group).wait()
else:
    sys.exit(max(codes))
"""


def test_a_rank_that_ends_right_after_an_exchange_does_not_abort(pytestconfig):
    times = "12" if pytestconfig.getoption("--all") else "4"
    done = subprocess.run([sys.executable, "-c", LEAVING, times], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


JOINING = """
import os, socket
import torch.distributed as dist
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.comm.job import leave

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
Grid.from_environment({"RANK": "0", "WORLD_SIZE": "1"}, backend="gloo")
assert dist.get_backend() == "gloo"
leave()
assert not dist.is_initialized()
"""


def test_a_job_is_joined_with_the_back_end_that_is_wanted_and_left():
    done = run_program("-c", JOINING)
    assert done.returncode == 0, done.stderr
