"""Ranks for tests: real processes with gloo between them, on one machine, ready in a second."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synchromesh.testing.forks import fork
from synchromesh.testing.poison import poisoned_memory


class RankError(AssertionError):
    """A rank failed, died or did not end; the message says which, with its traceback."""


def rank_device() -> torch.device:
    """Return the device of this rank, where `run_ranks` started it."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def run_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: int = 600, device: str = "cpu"
) -> list[Any]:
    """Run `function(*arguments)` on `world` ranks at once, one thread each; return what they return, by rank.

    The function stands at the top of its file, and finds the default process group initialised (gloo; NCCL and a GPU
    of its own, `rank_device()`, for each rank where the device is "cuda") and fresh memory poisoned. Arguments and
    results travel pickled.

    Raises:
        RankError: a rank raised, died, or was not done in time; the others are ended.
    """
    target = (function.__code__.co_filename, function.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        ranks, ends = [], []
        for rank in range(world):
            ours, theirs = Pipe(duplex=False)
            place = (rank, world, folder, device)
            ranks.append(fork(_rank_main, target, place, theirs, arguments, timeout, daemon=True))
            theirs.close()
            ends.append(ours)
        try:
            return _results(ends, Path(folder), time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _results(ends: list[Connection], folder: Path, deadline: float) -> list[Any]:
    """Collect the result of each rank; the first that ends without one ends it all."""
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = {end: rank for rank, end in enumerate(ends) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} were not done in time")
        for end in ready:
            assert isinstance(end, Connection)
            rank = waiting[end]
            try:
                results[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                said = _errors_of(folder, rank).read_text()
                raise RankError(f"rank {rank} of {len(ends)} failed or died\n{said}") from None
    return [results[rank] for rank in range(len(ends))]


def _errors_of(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"


def _rank_main(
    target: tuple[str, str], place: tuple[int, int, str, str], end: Connection, arguments: tuple[Any, ...], timeout: int
) -> None:
    rank, world, folder, device = place
    with _errors_of(Path(folder), rank).open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    with poisoned_memory():
        # Plain bytes: a tensor sent as it is would be fetched later from this process, which may be gone by then.
        end.send_bytes(pickle.dumps(_load(*target)(*arguments)))
    end.close()
    dist.barrier()  # a rank that leaves while others still connect a group would break their connection
    dist.destroy_process_group()


def _load(path: str, name: str) -> Callable[..., Any]:
    """Load a function from a file, whether or not its folder can be imported from here."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == path:
            return getattr(module, name)
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
