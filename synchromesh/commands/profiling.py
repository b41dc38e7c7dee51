"""Measure a cluster: links by message size, products by shape, memory, and what does not depend on the size.

All ranks measure at once, as they work at once in training; a profile holds their mean.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.moe.experts import MLPExperts
from synchromesh.moe.layer import MoE
from synchromesh.moe.routing import TopKRouter
from synchromesh.parallel.comm.collectives import all_to_all
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.planning.cluster import UNMEASURED, ClusterProfile, Curve, Link, Matmul
from synchromesh.types import Plan, Workload

MATMUL_SHAPES = [(16, 256, 256), (64, 512, 256), (256, 256, 512), (128, 1024, 512), (512, 512, 512), (1024,) * 3]
MESSAGE_BYTES = [1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24]
BUSY_BYTES = 1 << 19  # of the message whose work is counted
LONGEST_MESSAGE = 0.5  # seconds; larger messages are extrapolated from the last two
ROUNDS = 7  # of a measurement, whose median counts
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one for all that share a machine, containers too
STAGES = ("products", "links", "layer", "overlap")


def measure(grid: Grid, name: str, *, device: torch.device, begins: Callable[[str], None]) -> ClusterProfile:
    """Return this cluster's profile; every rank calls it, and all get the same.

    Args:
        grid: the ranks.
        name: of the profile.
        device: of the ranks.
        begins: called with each of `STAGES` as it begins.
    """
    meter = _Meter(grid, device, cores_of_a_rank(grid, device))
    begins("products")
    dtypes = [torch.float32, torch.bfloat16]
    matmul = {str(dtype).removeprefix("torch."): meter.matmul(dtype) for dtype in dtypes}
    begins("links")
    node, network = meter.links()
    begins("layer")
    start = (node if network is None else network).start
    alone = meter.layer(4, 16, 16, 16)
    kernel = meter.kernel()
    memory_rate = meter.memory_rate(matmul["float32"], kernel, alone)
    step, chunk = alone, (0.0, 0.0)
    if grid.size > 1:  # without the start of 3 exchanges in forward (counts, rows there and back) and 2 in backward
        plain, pieces = meter.exchanging(1), meter.exchanging(4)
        start *= min(1.0, (node if network is None else network).busy) if meter.contended else 1.0
        step = (max(alone[0], plain[0] - 3 * start), max(alone[1], plain[1] - 2 * start))
        chunk = tuple(max(0.0, (many - one) / 3 - 2 * start) for many, one in zip(pieces, plain, strict=True))
    begins("overlap")
    slowed = meter.slowed() if grid.size > 1 and not meter.contended else (1.0, 1.0)
    seen = (
        f"measured on {device_name(device)}, torch {torch.__version__}, {grid.size} ranks, {grid.ranks_per_node} a node"
    )
    links = {"node": seen if grid.ranks_per_node > 1 else f"{UNMEASURED}: one rank a node"}
    links["network"] = seen if grid.nodes > 1 else f"{UNMEASURED}: one node"
    fields = ("memory_bytes", "memory_rate", "kernel", "step", "chunk", "matmul", "slowed", "cores")
    return ClusterProfile(
        name=name,
        about=f"{grid.nodes} nodes of {grid.ranks_per_node} ranks",
        per_node=grid.ranks_per_node,
        backend="nccl" if device.type == "cuda" else "gloo",
        memory_bytes=_memory_bytes(device, grid.ranks_per_node),
        memory_rate=memory_rate,
        kernel=kernel,
        step=step,
        chunk=(chunk[0], chunk[1]),
        matmul=matmul,
        node=node,
        network=network,
        slowed=slowed,
        sources={**dict.fromkeys(fields, seen), **links},
        cores=meter.cores,
    )


def cores_of_a_rank(grid: Grid, device: torch.device) -> float | None:
    """Return the cores of this machine for each rank on it, whatever nodes they pretend to be; None on GPUs."""
    if device.type == "cuda":
        return None
    own = BOOT_ID.read_text() if BOOT_ID.exists() else platform.node()
    machines = [own]
    if grid.group is not None:
        machines = [""] * grid.size
        dist.all_gather_object(machines, own, group=grid.group)
    return len(os.sched_getaffinity(0)) / machines.count(own)


def device_name(device: torch.device) -> str:
    """Return what a measurement ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def fitted(seconds: Sequence[tuple[tuple[int, int, int], float]]) -> Matmul:
    """Return the `Matmul` that fits measured products (m, n, k) best: by the variance of the logarithms of ratios."""

    def errors(half: float) -> tuple[float, float]:
        bare = Matmul(peak=1.0, half=half)
        logs = [math.log(bare.seconds(*shape) / taken) for shape, taken in seconds]
        return statistics.pvariance(logs), math.exp(statistics.mean(logs))

    # For a given half the best peak is the mean ratio, and the variance is the error that is left.
    half = min((2 ** (power / 4) for power in range(48)), key=lambda half: errors(half)[0])
    return Matmul(peak=errors(half)[1], half=half)


class _Meter:
    """Times things on all ranks of a grid.

    Where ranks are more than cores, how long one waits for a core depends on what the others do at the moment, which is
    not what they do in training. So what a core does is counted in its own time, of exchanges the quickest counts, and
    the waiting is added where plans are timed.
    """

    def __init__(self, grid: Grid, device: torch.device, cores: float | None) -> None:
        self.grid, self.device, self.cores = grid, device, cores

    @property
    def contended(self) -> bool:
        """Whether ranks wait for a core."""
        return self.cores is not None and self.cores < 1

    def seconds(self, run: Callable[[], object], *, rounds: int = ROUNDS) -> float:
        """Return the median time of a run, the mean over ranks; of cores where ranks wait for one."""
        clock = time.process_time if self.contended else time.perf_counter
        run()
        times = []
        for _ in range(rounds):
            self._together()
            start = clock()
            run()
            self._finished()
            times.append(clock() - start)
        return self._mean(statistics.median(times))

    def matmul(self, dtype: torch.dtype) -> Matmul:
        found = []
        for m, n, k in MATMUL_SHAPES:
            a, b = (torch.randn(size, device=self.device, dtype=dtype) for size in ((m, k), (k, n)))
            out = torch.empty(m, n, device=self.device, dtype=dtype)
            count = max(1, round(2e8 / (m * n * k)))

            def products(a: Tensor = a, b: Tensor = b, out: Tensor = out, count: int = count) -> None:
                for _ in range(count):
                    torch.mm(a, b, out=out)

            found.append(((m, n, k), self.seconds(products) / count))
        return fitted(found)

    def kernel(self) -> float:
        """Return what one more expert costs a forward, for each of its two products."""
        many, few = (self.layer(experts, 64, 16, 16)[0] for experts in (64, 4))
        return max(1e-7, (many - few) / 60 / 2)  # 60 more experts of 2 products

    def memory_rate(self, matmul: Matmul, kernel: float, step: tuple[float, float]) -> float:
        """Return the bytes per second that a layer moves besides its products, as `planning.cost` counts them."""
        work = Workload(4096, 2, 256, 256, 4, torch.float32, training=True)
        taken = sum(self.layer(work.experts, work.rows, work.width, work.hidden, k=work.choices)) - sum(step)
        each = matmul.seconds(work.rows * work.choices / work.experts, work.hidden, work.width) + kernel
        # Three times the products of forward, of which each expert has two, make forward and backward.
        bare = taken - 3 * 2 * work.experts * each
        rows = work.rows * work.choices
        numbers = 2 * (2 * work.rows * work.width + 2 * rows * work.width + 2 * rows * work.hidden)
        return 4 * numbers / max(bare, taken / 10)

    def layer(self, experts: int, tokens: int, width: int, hidden: int, *, k: int = 1) -> tuple[float, float]:
        """Return the seconds of forward and backward of a layer in this process alone."""
        layer = MoE(TopKRouter(width, experts, k=k), MLPExperts(experts, width, hidden=hidden)).to(self.device)
        return self._passes(layer, tokens, width)

    def exchanging(self, chunks: int) -> tuple[float, float]:
        """Return the seconds of forward and backward of a layer over all ranks with next to nothing to do."""
        experts, strategy = self.grid.size, Sharded(self.grid, plan=Plan(chunks=chunks))
        layer = MoE(TopKRouter(16, experts), MLPExperts(experts, 16, hidden=16), strategy=strategy).to(self.device)
        return self._passes(layer, 16, 16)

    def _passes(self, layer: MoE, tokens: int, width: int) -> tuple[float, float]:
        x = torch.randn(tokens, width, device=self.device, requires_grad=True)
        kept: list[Tensor] = []

        def forward() -> None:
            kept[:] = [layer(x).sum()]

        def both() -> None:
            forward()
            kept[0].backward()

        taken = self.seconds(forward, rounds=3 * ROUNDS)
        return taken, max(0.0, self.seconds(both, rounds=3 * ROUNDS) - taken)

    def links(self) -> tuple[Link, Link | None]:
        """Measure the links in a node and between nodes; None for what these ranks do not have."""
        grid = self.grid
        node, place = divmod(grid.rank, grid.ranks_per_node)
        found: dict[str, Link] = {}
        if grid.ranks_per_node > 1:
            inside = tuple(range(node * grid.ranks_per_node, (node + 1) * grid.ranks_per_node))
            found["node"] = self._link(grid.axis(inside), place, sends=True)
        if grid.nodes > 1:
            comb = grid.axis(tuple(range(place, grid.size, grid.ranks_per_node)))
            across = self._link(comb, node, sends=place == 0)
            found["network"] = dataclasses.replace(across, node_rate=self._node_rate(comb))
        alone = Link(0.0, Curve(((0.0, 0.0), (1.0, 0.0))))
        return found.get("node", found.get("network", alone)), found.get("network")

    def slowed(self) -> tuple[float, float]:
        """Return how much longer products, and an exchange, take while both run."""
        a = torch.randn(512, 512, device=self.device)
        sent = torch.zeros(self.grid.size, 1 << 16, device=self.device)

        def exchange() -> None:
            all_to_all(sent, self.grid.group).wait()

        alone = self.seconds(exchange)
        one = self.seconds(lambda: a @ a, rounds=3 * ROUNDS)
        count = max(1, round(alone / one))

        def work() -> None:
            for _ in range(count):
                a @ a  # pyright: ignore[reportUnusedExpression]

        times: list[float] = []

        def both() -> None:
            flight = all_to_all(sent, self.grid.group)
            start = time.perf_counter()
            work()
            self._finished()
            times.append(time.perf_counter() - start)
            flight.wait()

        working, together = self.seconds(work), self.seconds(both)
        beside = self._mean(statistics.median(times))
        return max(1.0, beside / working), max(1.0, together / max(alone, beside))

    def _link(self, group: ProcessGroup | None, place: int, *, sends: bool) -> Link:
        """Measure messages between the first two members of a group; all others take part and send nothing."""
        assert group is not None
        to = [int(sends and place < 2 and other == 1 - place) for other in range(group.size())]

        def seconds(size: int) -> float:
            rows, splits = torch.zeros(sum(to), max(1, size // 4), device=self.device), list(to)
            return self._exchanged(lambda: all_to_all(rows, group, splits, splits).wait(), counts=sum(to) > 0)

        start, points = seconds(8), [(0.0, 0.0)]
        for size in MESSAGE_BYTES:
            taken = seconds(size)
            points.append((float(size), max(points[-1][1], taken - start)))
            if taken > LONGEST_MESSAGE:
                break
        return Link(start, Curve(tuple(points)), busy=self._busy(group, to))

    def _busy(self, group: ProcessGroup, to: list[int]) -> float:
        """Return the share of a message's time in which it keeps a core of its rank busy."""
        if not self.contended:
            return 1.0
        rows = torch.zeros(sum(to), BUSY_BYTES // 4, device=self.device)

        def exchange() -> None:
            all_to_all(rows, group, to, to).wait()

        taken = self._exchanged(exchange, counts=sum(to) > 0)
        worked = self._exchanged(exchange, counts=sum(to) > 0, clock=time.process_time)
        return min(1.0, worked / taken)

    def _node_rate(self, group: ProcessGroup | None) -> float:
        """Return the bytes per second that all ranks of a node send to the others together."""
        size, taken = 1 << 18, 0.0
        while taken < LONGEST_MESSAGE / 10 and size < 1 << 26:
            size *= 2
            rows = torch.zeros(self.grid.nodes, size // 4, device=self.device)
            taken = self._exchanged(lambda rows=rows: all_to_all(rows, group).wait(), counts=True)
        return self.grid.ranks_per_node * (self.grid.nodes - 1) * size / taken

    def _exchanged(
        self, exchange: Callable[[], object], *, counts: bool, clock: Callable[[], float] = time.perf_counter
    ) -> float:
        """Return the median seconds of an exchange, the mean over the ranks that count."""
        times = []
        for _ in range(ROUNDS):
            self._together()
            start = clock()
            exchange()
            self._finished()
            times.append(clock() - start)
        taken = min(times[2:]) if self.contended else statistics.median(times[2:])
        return self._mean(taken, counts=counts)

    def _together(self) -> None:
        self._finished()
        if self.grid.group is not None:
            dist.barrier(self.grid.group)

    def _finished(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mean(self, value: float, *, counts: bool = True) -> float:
        if self.grid.group is None:
            return value
        numbers = torch.tensor([value if counts else 0.0, float(counts)], device=self.device, dtype=torch.float64)
        dist.all_reduce(numbers, group=self.grid.group)
        return float(numbers[0] / numbers[1])


def _memory_bytes(device: torch.device, ranks: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
