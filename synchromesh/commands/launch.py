"""Start ranks of this program on this machine, by torchrun's own interface."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence

from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(program: Sequence[str], arguments: Sequence[str], ranks: int, *, errors: Console, restarts: int = 0) -> int:
    """Run `python PROGRAM ARGUMENTS` on some ranks; return 0, or the exit code of the first that failed.

    A rank that dies ends the others; all then begin again, at most `restarts` times.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its reports are for its own debugging
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*program, *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        if code < 0:
            errors.print(f"error: rank {rank} was ended by signal {-code}; the other ranks were ended too", style="red")
            return 128 - code
        return code
    except SignalException as signalled:
        return 128 + signalled.sigval
    return 0
