"""The cost model against steps that were measured on emulated clusters; nothing is fitted to them.

    sudo .venv/bin/python benchmarks/prediction.py             # profile each cluster, then compare
    .venv/bin/python benchmarks/prediction.py --show           # only compare with the profiles that are there
    .venv/bin/python benchmarks/prediction.py --show --profiles benchmarks/results/profiles/by_cores    # with others
    .venv/bin/python benchmarks/prediction.py --local 2 4      # ranks of this machine, profiled and measured in one run
    .venv/bin/python benchmarks/prediction.py --local 4 --core-time    # the same where others use the machine too

A profile holds what `synchromesh profile` measured inside the cluster, of messages and products alone; the steps are
those of benchmarks/emulated_cluster.py, of other message sizes and shapes. Per cell (cluster, rate, workload): the
bytes, the time of every plan, and the regret of the plan that is predicted to be the best, over the best measured.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulated_cluster
import torch
import torch.distributed as dist
import tyro
from emulated_cluster import PREFIX, RESULTS, WORKLOADS, Shape, cluster, framing, measure, plans_for
from rich.console import Console
from rich.progress import track
from rich.table import Table

from synchromesh import Grid, Plan, Sharded
from synchromesh.commands import profile
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.cost import step_seconds
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.search import SHORT_LIST_LENGTH, Candidate, short_list
from synchromesh.planning.traffic import traffic
from synchromesh.types import Workload

PROFILES = Path(__file__).parent / "results" / "profiles"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "prediction.svg"
LOCAL = Path(__file__).parent / "results" / "local_ranks.jsonl"
CORE_TIME = Path(__file__).parent / "results" / "local_core_time.jsonl"


@dataclass(frozen=True)
class Args:
    """What to do. nodes, rates: of the emulated clusters. show: measure nothing. local: ranks of this machine.

    profiles: folder of those of clusters, to write or to compare with.
    core_time: of local ranks that are more than cores, count a step as the time of the cores that it used over a rank's
    share of them: what it takes where cores never rest, however busy others keep them at the moment.
    """

    nodes: tuple[int, ...] = (2, 4)
    rates: tuple[int, ...] = (100, 500, 1000)
    ranks: int = 4
    show: bool = False
    local: tuple[int, ...] = ()
    core_time: bool = False
    profiles: Path = PROFILES
    steps: Path = RESULTS
    picture: Path = PICTURE
    job: str = ""  # set by this program for the ranks it starts


@dataclass(frozen=True)
class Point:
    """One plan in one cell."""

    cell: tuple[int, int, tuple[int, ...]]
    plan: Plan
    measured: float
    predicted: float
    bytes_measured: float
    bytes_predicted: float

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured


def profile_cluster(nodes: int, mbit: int, ranks: int, profiles: Path) -> None:
    """Run what `synchromesh profile` runs on ranks inside the nodes of an emulated cluster, one thread each."""
    file = profile_file(nodes, mbit, profiles=profiles)
    file.parent.mkdir(parents=True, exist_ok=True)
    with cluster(nodes, mbit), tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(ranks):
            job = {"rank": rank, "ranks": ranks, "nodes": nodes, "store": f"{folder}/store", "file": str(file)}
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            node = f"{PREFIX}{rank * nodes // ranks}"
            command = ["ip", "netns", "exec", node, sys.executable, __file__, "--job", json.dumps(job)]
            log = (Path(folder) / f"{rank}").open("w")
            jobs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [job.wait(timeout=300) for job in jobs]
        if any(codes):
            raise SystemExit((Path(folder) / str(codes.index(next(filter(None, codes))))).read_text())


def measure_local(ranks: int, *, core_time: bool) -> list[dict[str, Any]]:
    """Profile and measure ranks of this machine, without any shaping."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(ranks):
            job = {"rank": rank, "ranks": ranks, "nodes": 1, "store": f"{folder}/store", "steps": True}
            job |= {"file": str(profile_file(1, 0, ranks, core_time=core_time)), "core_time": core_time}
            command = [sys.executable, __file__, "--job", json.dumps(job)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            jobs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert jobs[0].stdout is not None
        found = [json.loads(line) for line in jobs[0].stdout]
        if any(job.wait(timeout=600) for job in jobs):
            raise SystemExit("a rank failed: see above")
    return found


def run_rank(job: dict[str, Any]) -> None:
    """Measure as one rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], job["ranks"])
    dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["ranks"])
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=job["ranks"] // job["nodes"])
    console = Console(stderr=True)
    profile.measure_ranks(profile.Request(Path(job["file"])), grid, console)
    for shape in WORKLOADS if job.get("steps") else []:
        emulated_cluster.transmitted = lambda: 0  # nothing leaves this machine
        if job["core_time"]:
            share = min(1.0, len(os.sched_getaffinity(0)) / grid.size)
            emulated_cluster.now = lambda share=share: time.process_time() / share
        for record in measure(shape, grid, {"chunks": (1, 4), "rounds": 9, "mbit": 1}):
            if grid.rank == 0:
                print(json.dumps({**record, "mbit": 0, "core_time": job["core_time"]}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def profile_file(nodes: int, mbit: int, ranks: int = 0, *, core_time: bool = False, profiles: Path = PROFILES) -> Path:
    local = f"local_{ranks}_core_time.json" if core_time else f"local_{ranks}.json"
    return profiles / (f"emulated_{nodes}x_{mbit}mbit.json" if mbit else local)


def points(records: Sequence[dict[str, Any]], profiles: Path = PROFILES) -> Iterator[Point]:
    """Predict every measured step."""
    for record in records:
        core_time = record.get("core_time", False)
        file = profile_file(record["nodes"], record["mbit"], record["ranks"], core_time=core_time, profiles=profiles)
        if not file.exists():
            continue
        profile, shape = load_profile(file), Shape(*record["shape"])
        ranks = Ranks(record["ranks"], record["ranks"] // record["nodes"])
        work = workload(shape)
        plan = next(plan for plan in plans_of(shape, ranks) if str(plan) == record["plan"])
        sent = traffic(work, plan, ranks).leaving_a_node("gloo", framing=framing(record["mbit"]))
        seconds = step_seconds(work, plan, ranks, profile)
        cell = (record["nodes"] if record["mbit"] else -record["ranks"], record["mbit"], tuple(record["shape"]))
        yield Point(cell, plan, record["seconds"], seconds, record["bytes"], sent)


def workload(shape: Shape) -> Workload:
    vectors = (shape.hidden, shape.width)
    return Workload(
        shape.tokens, shape.choices, shape.width, shape.hidden, shape.experts, torch.float32, True, vectors=vectors
    )


def plans_of(shape: Shape, ranks: Ranks) -> list[Plan]:
    grid = Grid(None)
    grid.size, grid.ranks_per_node = ranks.size, ranks.per_node
    return plans_for(Sharded(grid), shape, (1, 4))


def regrets(own: Sequence[Point]) -> tuple[float, float, float]:
    """Return, over the best measured: the best predicted, the best of three predicted, of the tuner's short list."""
    tried = [point for point in own if not point.plan.regather]
    best = min(point.measured for point in tried)
    ordered = sorted(tried, key=lambda point: point.predicted)
    by_plan = {point.plan: point.measured for point in tried}
    chosen = short_list([Candidate(point.plan, point.predicted) for point in ordered])
    of_short_list = min(by_plan[one.plan] for one in chosen)
    three = min(point.measured for point in ordered[:3])
    return ordered[0].measured / best, three / best, of_short_list / best


def show(found: Sequence[Point]) -> None:
    cells = {cell: list(own) for cell, own in itertools.groupby(found, key=lambda point: point.cell)}
    table = Table(title="predicted against measured, by cluster; nothing fitted", title_justify="left")
    for name in ("cluster", "cells", "median error", "90 %", "regret", "worst", "of three", f"of {SHORT_LIST_LENGTH}"):
        table.add_column(name, justify="right" if name != "cluster" else "left")
    groups: dict[str, list[list[Point]]] = {}
    for (nodes, mbit, _), own in cells.items():
        name = f"{nodes} nodes, {mbit} Mbit/s" if mbit else f"{-nodes} ranks of one machine"
        groups.setdefault(name, []).append(own)
    groups["all"] = list(cells.values())
    for name, several in groups.items():
        errors = sorted(point.error for own in several for point in own)
        first, three, listed = zip(*map(regrets, several), strict=True)
        row = [f"{statistics.median(errors):.0%}", f"{errors[int(0.9 * len(errors))]:.0%}"]
        row += [f"{statistics.geometric_mean(first):.3f}", f"{max(first):.2f}"]
        row += [f"{statistics.geometric_mean(three):.3f}", f"{statistics.geometric_mean(listed):.3f}"]
        table.add_row(name, str(len(several)), *row)
    console = Console(width=120)
    console.print(table)
    shares = [p.bytes_measured / p.bytes_predicted for p in found if p.bytes_predicted > 1e5]
    if shares:
        middle = statistics.median(shares)
        near = sum(abs(share - 1) <= 0.02 for share in shares)
        console.print(f"bytes measured over predicted: median {middle:.3f}, {min(shares):.3f} to {max(shares):.3f}")
        console.print(f"{near} of {len(shares)} within 2 %")


def draw(found: Sequence[Point], path: Path) -> None:
    """Draw predicted over measured seconds, both logarithmic; the line is equality, the band 25 %."""
    size, margin = 520, 60
    low, high = -2.2, 1.3  # of log10 seconds

    def at(x: float, y: float) -> tuple[float, float]:
        scale = size / (high - low)
        return margin + (math.log10(x) - low) * scale, margin + size - (math.log10(y) - low) * scale

    whole = size + 2 * margin
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{whole}" font-family="sans-serif"'
    lines = [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    for factor, colour in ((1.0, "#888"), (1.25, "#ddd"), (0.8, "#ddd")):
        (a, b), (c, d) = at(0.01, 0.01 * factor), at(10, 10 * factor)
        lines.append(f'<line x1="{a:.0f}" y1="{b:.0f}" x2="{c:.0f}" y2="{d:.0f}" stroke="{colour}"/>')
    for tick in (0.01, 0.1, 1.0, 10.0):
        x, y = at(tick, 10**low)
        lines.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{tick:g} s</text>')
        x, y = at(10**low, tick)
        lines.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{tick:g} s</text>')
    colours = {1: "#1b6ca8", 2: "#2a9d5c", 4: "#d1495b"}
    for point in found:
        x, y = at(point.measured, point.predicted)
        fill = colours.get(point.plan.gather, "#555")
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{fill}" fill-opacity="0.6"/>')
    lines.append(
        f'<text x="{margin}" y="24">predicted over measured seconds of a step; blue g=1, green g=2, red g=4</text>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")


def main(args: Args) -> None:
    if args.job:
        run_rank(json.loads(args.job))
        return
    if args.local:
        records = [record for ranks in args.local for record in measure_local(ranks, core_time=args.core_time)]
        (CORE_TIME if args.core_time else LOCAL).write_text("".join(json.dumps(record) + "\n" for record in records))
        show(list(points(records)))
        return
    if not args.show:
        if os.geteuid() != 0:
            raise SystemExit("network namespaces need root: run this with sudo, or --show what was measured")
        cells = list(itertools.product(args.nodes, args.rates))
        for nodes, mbit in track(cells, "profiles", console=Console(stderr=True)):
            profile_cluster(nodes, mbit, args.ranks, args.profiles)
    records = [json.loads(line) for line in args.steps.read_text().splitlines()]
    found = list(points(records, args.profiles))
    if not found:
        raise SystemExit(f"{args.profiles} holds no profile of a measured cluster: run this without --show first")
    show(found)
    if args.profiles == PROFILES:
        draw(found, args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
