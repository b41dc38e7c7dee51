"""A training whose batch, capacity and links change on the way: adaptive, an oracle, and every static plan.

    sudo .venv/bin/python benchmarks/adaptive.py                # four ranks on two emulated nodes, about eight minutes
    .venv/bin/python benchmarks/adaptive.py --show              # only print what was measured

The layer is told nothing of the phases. In each phase it first takes its steps as a training would, trials of plans
included; then every static plan is timed, in turn, in rounds, the first two left out. The oracle knows the best plan of
each phase. Settled is the median of the last quarter of a phase, over the oracle's median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from emulated_cluster import PREFIX, Shape, cluster, plans_for, tool
from rich.console import Console
from rich.table import Table

from synchromesh import Adaptive, Capacity, Dropless, FixedCapacity, Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter
from synchromesh.planning.cluster import load_profile

RESULTS = Path(__file__).parent / "results" / "adaptive.jsonl"
PROFILE = Path(__file__).parent / "results" / "profiles" / "emulated_2x_500mbit.json"
RANKS, NODES, WIDTH, HIDDEN, EXPERTS = 4, 2, 128, 256, 16


@dataclass(frozen=True)
class Phase:
    """What a part of the training is like. factor: of the capacity; 0 drops nothing."""

    name: str
    tokens: int
    mbit: int
    factor: float = 0.0

    @property
    def capacity(self) -> Capacity:
        return FixedCapacity(self.factor) if self.factor else Dropless()


PHASES = (
    Phase("large batch", 2048, 500),
    Phase("small batch", 128, 500),
    Phase("slow links", 128, 100),
    Phase("large batch, slow links", 2048, 100),
    Phase("a quarter of the capacity", 2048, 500, 0.25),
    Phase("large batch again", 2048, 500),
)


@dataclass(frozen=True)
class Args:
    """What to do. steps: of each phase. rounds: of the static plans. show: measure nothing."""

    steps: int = 200
    rounds: int = 9
    out: Path = RESULTS
    show: bool = False
    job: str = ""  # set by this program for the ranks it starts


def run_rank(job: dict[str, Any]) -> None:
    """Train through all phases as one rank; the first one prints a JSON line for each."""
    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], RANKS)
    dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=RANKS, timeout=timedelta(seconds=120))
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=RANKS // NODES)
    torch.manual_seed(0)
    strategy = Adaptive(grid, profile=load_profile(PROFILE))
    layer = MoE(TopKRouter(WIDTH, EXPERTS, k=2), MLPExperts(EXPERTS, WIDTH, hidden=HIDDEN), strategy=strategy)
    for phase in PHASES:
        if grid.rank == 0:
            set_rate(phase.mbit)
        dist.barrier()
        x = torch.randn(phase.tokens, WIDTH, requires_grad=True)
        before = len(strategy.record)
        taken = [step(layer, x, phase, None) for _ in range(job["steps"])]
        chosen = str(strategy.record[-1][1])
        changes = len(strategy.record) - before
        shape = Shape(phase.tokens, 2, WIDTH, HIDDEN, EXPERTS)
        plans = [plan for plan in plans_for(Sharded(grid), shape, (1, 2, 4)) if not plan.regather]
        static: dict[str, list[float]] = {str(plan): [] for plan in plans}
        for number in range(job["rounds"]):
            for plan in plans:
                seconds = step(layer, x, phase, plan)
                if number >= 2:
                    static[str(plan)].append(seconds)
        if grid.rank == 0:
            found = {"phase": asdict(phase), "steps": taken, "chosen": chosen, "changes": changes, "static": static}
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def step(layer: MoE, x: torch.Tensor, phase: Phase, plan: Plan | None) -> float:
    """Return the seconds of the slowest rank."""
    layer.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    layer(x, plan=plan, capacity=phase.capacity).sum().backward()
    own = [round(1e6 * (time.perf_counter() - start))]
    strategy = layer.strategy
    if plan is None and isinstance(strategy, Adaptive):
        own += strategy.council.ask()  # carried along, as the training loop does
    numbers = torch.tensor(own)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    if plan is None and isinstance(strategy, Adaptive):
        strategy.council.tell(numbers[1:].tolist())
    return float(numbers[0]) / 1e6


def set_rate(mbit: int) -> None:
    limit = f"tbf rate {mbit}mbit burst {max(32, mbit // 4)}kb latency 100ms"
    for node in range(NODES):
        tool(f"ip netns exec {PREFIX}{node} tc qdisc change dev eth0 root {limit}")
        tool(f"ip netns exec {PREFIX}sw tc qdisc change dev {PREFIX}{node}b root {limit}")


def measure(args: Args) -> list[dict[str, Any]]:
    with cluster(NODES, PHASES[0].mbit), tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(RANKS):
            job = {"rank": rank, "store": f"{folder}/store", "steps": args.steps, "rounds": args.rounds}
            node = f"{PREFIX}{rank * NODES // RANKS}"
            command = ["ip", "netns", "exec", node, sys.executable, __file__, "--job", json.dumps(job)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        try:
            assert ranks[0].stdout is not None
            found = [json.loads(line) for line in ranks[0].stdout]
            if any(process.wait() for process in ranks):
                raise SystemExit("a rank failed: see above")
        finally:
            for process in ranks:
                process.kill()
    return found


def show(found: Sequence[dict[str, Any]]) -> None:
    table = Table(title="seconds of a phase; over the oracle that knows its best plan", title_justify="left")
    for name in ("phase", "oracle's plan", "seconds", "adaptive", "settled", "its plan", "changes", "worst static"):
        table.add_column(name, justify="right" if name in ("seconds", "adaptive", "settled", "changes") else "left")
    oracle = adaptive = 0.0
    totals: dict[str, float] = {}
    spread = []
    for one in found:
        medians = {plan: statistics.median(own) for plan, own in one["static"].items()}
        best = min(medians, key=medians.__getitem__)
        count = len(one["steps"])
        for plan, seconds in medians.items():
            totals[plan] = totals.get(plan, 0.0) + count * seconds
        oracle, adaptive = oracle + count * medians[best], adaptive + sum(one["steps"])
        settled = statistics.median(one["steps"][-count // 4 :])
        worst = max(medians.values()) / medians[best]
        spread.append(worst)
        row = [one["phase"]["name"], best, f"{count * medians[best]:.1f}"]
        row += [f"{sum(one['steps']) / (count * medians[best]):.2f}x", f"{settled / medians[best]:.2f}x"]
        table.add_row(*row, one["chosen"], str(one["changes"]), f"{worst:.1f}x")
    console = Console(width=150)
    console.print(table)
    fixed = min(totals, key=totals.__getitem__)
    console.print(f"all phases: adaptive {adaptive:.1f} s, oracle {oracle:.1f} s: {adaptive / oracle:.3f}x")
    console.print(f"best static plan ({fixed}) {totals[fixed]:.1f} s: {totals[fixed] / adaptive:.2f}x adaptive's time")
    console.print(f"worst static plan {max(totals.values()):.1f} s: {max(totals.values()) / adaptive:.2f}x")
    console.print(f"worst over best plan of a phase: {min(spread):.2f}x to {max(spread):.2f}x (paper: 1.35x to 14.57x)")


def main(args: Args) -> None:
    if args.job:
        run_rank(json.loads(args.job))
        return
    if not args.show:
        if os.geteuid() != 0:
            raise SystemExit("network namespaces need root: run this with sudo, or --show what was measured")
        found = measure(args)
        aside = args.out.with_suffix(".part")
        aside.write_text("".join(json.dumps(one) + "\n" for one in found))
        aside.replace(args.out)
    if not args.out.exists():
        raise SystemExit(f"{args.out} does not exist: nothing was measured yet")
    show([json.loads(line) for line in args.out.read_text().splitlines()])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
