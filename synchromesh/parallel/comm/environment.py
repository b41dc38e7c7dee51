"""What torchrun or SLURM said to this process of the job that it is part of. The only rank discovery."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# What torchrun says, and the same in SLURM's words.
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def job_of(environment: Mapping[str, str] | None) -> dict[str, int] | None:
    """Return the numbers of the job this process is part of; None where it is alone. Without variables, its own."""
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        names = {name: name for name in _SLURM}
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        names = _SLURM
    else:
        return None
    per_node = environment.get("SLURM_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]  # such as 8(x2)
    alone = environment.get(names["WORLD_SIZE"], "1")
    defaults = {"LOCAL_WORLD_SIZE": per_node if names is _SLURM and per_node else alone, "LOCAL_RANK": "0"}
    job = {}
    for wanted, name in names.items():
        got = environment.get(name, defaults.get(wanted, ""))
        if not got.isdecimal():
            raise ValueError(f"the environment variable {name} is {got!r}, wanted a number, as torchrun sets it")
        job[wanted] = int(got)
    job["RESTART"] = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return job


def join_job(job: dict[str, int], timeout: timedelta, backend: str | None) -> None:
    """Create the default process group of a job: NCCL where there is a GPU per local rank, else gloo."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bound = count == 1 and "SLURM_PROCID" in os.environ  # SLURM shows each task its own GPU alone
    if backend is None:
        backend = "nccl" if bound or 0 < job["LOCAL_WORLD_SIZE"] <= count else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(0 if bound else job["LOCAL_RANK"])
    store, rank, world = next(rendezvous("env://", rank=job["RANK"], world_size=job["WORLD_SIZE"], timeout=timeout))
    # Restarted ranks must not meet the addresses that dead ones left in the same store.
    store = dist.PrefixStore(f"attempt_{job['RESTART']}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def in_job(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether torchrun or SLURM started this process."""
    return job_of(environment) is not None


def first_of_node(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process speaks for its machine: it is the first rank there, or alone."""
    job = job_of(environment)
    return job is None or job["LOCAL_RANK"] == 0


def restarted(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether torchrun restarted this job because a rank died."""
    job = job_of(environment)
    return job is not None and job["RESTART"] > 0


def job_name(environment: Mapping[str, str] | None = None) -> str:
    """Return what all attempts of a job have in common, and other jobs have not; "" where nobody gave it a name."""
    name = (os.environ if environment is None else environment).get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name
