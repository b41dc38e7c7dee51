"""Which way a CPU multiplies the rows of many experts, and what its costs say of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from synchromesh.kernels.matmul import STEP, has_onednn
from synchromesh.kernels.product_costs import Machine, Machines, cpu_model, has_wide_vectors, here

ALONE, TOGETHER, ONEDNN = "one by one", "neighbours in one call", "one by one by oneDNN"


@dataclass(frozen=True)
class Weighed:
    """What the costs of products say of one product with even loads.

    Attributes:
        taken: the way that runs; calls that hardly differ are saved.
        seconds: by way: each expert by torch, neighbours in one call of torch, each expert by oneDNN where it may run.
        machine: whose costs these are.
        cpu: this one's model.
    """

    taken: str
    seconds: Mapping[str, float]
    machine: Machine
    cpu: str

    def __str__(self) -> str:
        times = ", ".join(f"{way} {1e3 * seconds:.3g} ms" for way, seconds in self.seconds.items())
        where = f"by costs measured on {self.machine.cpu}, threads {self.machine.threads}"
        stands = "" if self.machine.cpu == self.cpu else "; `synchromesh profile --products` measures this CPU"
        return f"{self.taken}: {times}, {where}{stands}"


def weighed(*, experts: int, rows: int, numbers: int, dtype: torch.dtype, machines: Machines | None = None) -> Weighed:
    """Weigh the ways of multiplying so many rows of each of some experts by a matrix of so many numbers, here.

    Args:
        machines: what was measured; None takes the package's own and this user's.
    """
    machines, cpu, threads = machines or here(), cpu_model(), torch.get_num_threads()
    costs = machines.costs(cpu, threads, dtype, wide=has_wide_vectors())
    if not has_onednn(dtype):
        costs = dataclasses.replace(costs, onednn=None)
    padded = -(-rows // STEP) * STEP
    seconds = {
        ALONE: experts * costs.alone.seconds(experts=1, rows=rows, numbers=numbers),
        TOGETHER: costs.batched.seconds(experts=experts, rows=rows, numbers=numbers),
    }
    if costs.onednn is not None:
        seconds[ONEDNN] = experts * costs.onednn.seconds(experts=1, rows=padded, numbers=numbers)
    taken = ALONE
    if costs.prefers_onednn(rows=padded, rest=0, instead=rows, numbers=numbers):
        taken = ONEDNN
    if experts > 1 and costs.batches(rows=rows, numbers=numbers):
        taken = TOGETHER
    return Weighed(taken, seconds, machines.nearest(cpu, threads), cpu)
