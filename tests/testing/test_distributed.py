"""Ranks for tests: what they return, how they fail, and that no call knows anything of the one before."""

import os
import random
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from synchromesh.testing.distributed import RankError, run_ranks

SEEN = []


def numbered(offset):
    return offset + dist.get_rank(), dist.get_world_size()


def test_results_come_in_the_order_of_ranks():
    assert run_ranks(numbered, 3, 10) == [(10, 3), (11, 3), (12, 3)]


def rank_1_raises():
    if dist.get_rank() == 1:
        raise KeyError("nothing under this name")
    signal.pause()


def test_a_rank_that_raises_is_named_with_its_traceback():
    with pytest.raises(RankError, match="rank 1 of 2 failed") as caught:
        run_ranks(rank_1_raises, 2)
    assert "in rank_1_raises" in str(caught.value)
    assert "KeyError: 'nothing under this name'" in str(caught.value)


def rank_0_dies():
    print(f"the last words of rank {dist.get_rank()}", file=sys.stderr, flush=True)  # noqa: T201
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_a_rank_that_dies_is_named_with_what_it_said_and_no_other_said():
    with pytest.raises(RankError, match="rank 0 of 2 failed or died\nthe last words of rank 0") as caught:
        run_ranks(rank_0_dies, 2)
    assert "rank 1" not in str(caught.value)


def never_ends():
    signal.pause()


def test_a_rank_that_hangs_is_named_and_ended_and_the_next_call_runs():
    with pytest.raises(RankError, match=r"ranks \[0\] were not done in time"):
        run_ranks(never_ends, 1, timeout=1)
    assert run_ranks(numbered, 2, 0) == [(0, 2), (1, 2)]


def spoils_its_process():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_autocast_enabled("cpu", True)
    torch.set_num_threads(2)
    torch.manual_seed(1)
    random.seed(1)
    torch.relu = None
    os.environ["SPOILT"] = "yes"
    SEEN.append(1)


def how_it_starts():
    """Everything that a test could have left behind."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "patched": torch.relu is None,
        "environment": os.environ.get("SPOILT"),
        "of the module": list(SEEN),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "poisoned": bool(torch.empty(3).isnan().all()),
    }


def test_a_call_finds_nothing_that_another_left_behind():
    first = run_ranks(how_it_starts, 2)
    run_ranks(spoils_its_process, 2)
    assert run_ranks(how_it_starts, 2) == first
    assert (
        first
        == [
            {
                "default dtype": torch.float32,
                "gradients": True,
                "deterministic": False,
                "autocast": False,
                "threads": 1,
                "patched": False,
                "environment": None,
                "of the module": [],
                "groups": 1,
                "poisoned": True,
            }
        ]
        * 2
    )


def not_yet_imported():
    return sorted({"torch._dynamo", "synchromesh.testing.distributed"} - sys.modules.keys())


def test_ranks_need_not_import_what_takes_seconds():
    assert run_ranks(not_yet_imported, 2) == [[], []]
