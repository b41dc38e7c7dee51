"""The life of a job's rank: it joins, says that it lives, names who is lost, and leaves."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from synchromesh.parallel.comm.grid import TIMEOUT, Grid
from synchromesh.parallel.comm.heartbeat import Heartbeat
from synchromesh.torch_private import job_store

# The threads of a back end need the interpreter once more, to free what they sent; where it is gone by then the process
# aborts. So a rank rests before it leaves.
_REST = 0.05  # seconds
_ANSWER = 2.0  # seconds that the job's store has to answer


class LostRankError(RuntimeError):
    """Other ranks are gone or silent; the message says which."""


@contextmanager
def joined(*, timeout: timedelta = TIMEOUT) -> Iterator[Grid]:
    """Join the job around this process, with its share of the machine's cores, and leave it at the end.

    Args:
        timeout: how long a collective waits for other ranks.

    Raises:
        LostRankError: a collective failed in the block, because another rank ended or does not answer.
    """
    grid = Grid.from_environment(timeout=timeout)
    if grid.group is None:
        yield grid
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // grid.ranks_per_node))
    heart, lost = Heartbeat(job_store().clone(), rank=grid.rank, size=grid.size), False
    try:
        yield grid
    except RuntimeError as error:
        if not _of_a_collective(error):
            raise
        lost, silent = True, heart.silent()
        named = "another rank has left the job, or was late"
        if silent is None:
            named = "the job's store does not answer either; is the network cut?"
        elif silent:
            named = f"ranks {silent} do not answer"
        said = str(error).partition("\n")[0]
        raise LostRankError(f"rank {grid.rank} lost its exchange with others: {named} ({said})") from error
    finally:
        if not lost:
            heart.stop()
        time.sleep(_REST)
    dist.destroy_process_group()


def first_to_say(text: str) -> bool:
    """Tell whether no other rank of the job around this process has asked this of the same text; alone, it is first.

    Where the job's store does not answer, each is: better said twice than never.
    """
    if not dist.is_initialized():
        return True
    key = f"said/{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    found: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError, dist.DistError):
            found.append(job_store().clone().add(key, 1))

    asking = threading.Thread(target=ask, daemon=True, name="first to say")
    asking.start()
    asking.join(timeout=_ANSWER)  # where the first rank of a job is gone, so is its store, and nothing answers
    return found in ([], [1])


def leave() -> None:
    """Leave the job around this process, as `joined` does at its end."""
    time.sleep(_REST)
    dist.destroy_process_group()


# What gloo says of a lost rank: with the path of its source, or nothing but this.
_LOST = ("gloo", "Application timeout caused pair closure", "Connection closed by peer")


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
