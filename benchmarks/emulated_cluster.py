"""Every plan on an emulated cluster: nodes are network namespaces with rate-limited links, ranks are real, over gloo.

    sudo .venv/bin/python benchmarks/emulated_cluster.py                     # 2 and 4 nodes, three link rates
    sudo .venv/bin/python benchmarks/emulated_cluster.py --nodes 2 --rates 500 --workloads 0 4 --rounds 5
    .venv/bin/python benchmarks/emulated_cluster.py --show                   # only print and draw what was measured

Needs root, `ip` and `tc`. A step is forward and backward of one MoE layer. Plans run in turn, round after round, so
that whatever slows the machine for a while slows all of them; the first two rounds are left out. The links have no
latency, so two-level exchange can gain nothing here: it is run for its bytes.
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
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import save

from synchromesh import Dropless, Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter
from synchromesh.parallel.layout import Layout
from synchromesh.planning.framing import Framing
from synchromesh.types import Workload

FIGURE = ("nodes", "ranks", "mbit", "shape", "plan")  # what tells a record from others
RESULTS = Path(__file__).parent / "results" / "emulated_cluster.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "plans.svg"
PREFIX = "smesh"  # of all names made here
HEADERS = 1514 / 1448  # Ethernet, IP and TCP around a full segment


@dataclass(frozen=True)
class Shape:
    """One layer: tokens per rank, choices, width, hidden, experts; float32."""

    tokens: int
    choices: int
    width: int
    hidden: int
    experts: int


WORKLOADS = [
    Shape(tokens, 2, 128, hidden, experts)
    for experts in (16, 2)
    for tokens, hidden in ((2048, 64), (2048, 256), (512, 512), (64, 1024))
]


@dataclass(frozen=True)
class Args:
    """What to measure. nodes: of clusters, ranks share them evenly. rates: of links, Mbit/s. workloads: indices."""

    nodes: tuple[int, ...] = (2, 4)
    rates: tuple[int, ...] = (100, 500, 1000)
    workloads: tuple[int, ...] = tuple(range(len(WORKLOADS)))
    ranks: int = 4
    chunks: tuple[int, ...] = (1, 4)
    rounds: int = 9
    out: Path = RESULTS
    picture: Path = PICTURE
    show: bool = False
    job: str = ""  # set by this program for the ranks it starts


def plans_for(strategy: Sharded, shape: Shape, chunks: Sequence[int]) -> list[Plan]:
    """Return every legal layout with each number of chunks, and with two levels or gathering again unchunked.

    Plans that deduplicate are left out: a token of these shapes has two choices, on two or four ranks.
    """
    work = Workload(shape.tokens, shape.choices, shape.width, shape.hidden, shape.experts, torch.float32, True)
    legal = [plan for plan, reason in strategy.legal_plans(work, Dropless()).items() if reason is None]
    legal = [plan for plan in legal if not plan.deduplicate]
    return [p for p in legal if p.chunks in chunks and (p.chunks == 1 or not (p.two_level or p.regather))]


def bytes_leaving_a_node(shape: Shape, plan: Plan, grid: Grid) -> float:
    """Return what the busiest node must send in a step, by the formulas of docs/parallelism.md, without headers."""
    layout = Layout(grid.size, shape.experts, plan.gather, plan.near)
    rows = shape.tokens * shape.choices * layout.copies * shape.width * 4 / layout.members  # to each member
    numbers = 2 * shape.hidden * shape.width + shape.hidden + shape.width
    part = shape.experts * numbers * 4 / grid.size
    sent = [0.0] * grid.nodes
    for rank in range(grid.size):
        far = [other for other in layout.exchange_group(rank) if grid.node_of(other) != grid.node_of(rank)]
        sent[grid.node_of(rank)] += 4 * rows * len(far)  # there and back, forward and backward
        pool = layout.gather_group(rank)
        following = pool[(pool.index(rank) + 1) % len(pool)]  # gloo gathers in a ring, and sums all to all
        gathers = 2 if plan.regather else 1
        if grid.node_of(following) != grid.node_of(rank):
            sent[grid.node_of(rank)] += gathers * (plan.gather - 1) * part
        sent[grid.node_of(rank)] += part * sum(grid.node_of(other) != grid.node_of(rank) for other in pool)
    return max(sent)


def run_rank(job: dict[str, Any]) -> None:
    """Measure all workloads as one rank; the first one prints a JSON line per plan."""
    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], job["ranks"])
    dist.init_process_group(
        "gloo", store=store, rank=job["rank"], world_size=job["ranks"], timeout=timedelta(seconds=120)
    )
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=job["ranks"] // job["nodes"])
    for index in job["workloads"]:
        for record in measure(WORKLOADS[index], grid, job):
            if grid.rank == 0:
                print(json.dumps(record), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(shape: Shape, grid: Grid, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    strategy = Sharded(grid)
    experts = MLPExperts(shape.experts, shape.width, hidden=shape.hidden)
    layer = MoE(TopKRouter(shape.width, shape.experts, k=shape.choices), experts, strategy=strategy)
    torch.manual_seed(grid.rank)
    x = torch.randn(shape.tokens, shape.width, requires_grad=True)
    plans = plans_for(strategy, shape, job["chunks"])
    seconds: dict[Plan, list[float]] = {plan: [] for plan in plans}
    sent: dict[Plan, list[float]] = {plan: [] for plan in plans}
    for number in range(job["rounds"]):
        for plan in plans:
            numbers = step(layer, x, plan)
            if number >= 2:
                seconds[plan].append(numbers[0])
                sent[plan].append(numbers[1])
    for plan in plans:
        quarters = statistics.quantiles(seconds[plan], n=4)
        formula = bytes_leaving_a_node(shape, plan, grid) * HEADERS
        yield {
            "nodes": grid.nodes,
            "ranks": grid.size,
            "mbit": job["mbit"],
            "shape": astuple(shape),
            "plan": str(plan),
            "seconds": statistics.median(seconds[plan]),
            "quartiles": [quarters[0], quarters[2]],
            "steps": len(seconds[plan]),
            "bytes": statistics.median(sent[plan]),
            "formula_bytes": formula,
            "limit_seconds": formula * 8 / (job["mbit"] * 1e6),
        }


def step(layer: MoE, x: torch.Tensor, plan: Plan) -> list[float]:
    """Return the seconds of the slowest rank, and the bytes that left the busiest node."""
    layer.zero_grad()
    dist.barrier()
    before, start = transmitted(), now()
    layer(x, plan=plan).sum().backward()
    numbers = torch.tensor([now() - start, 0.0])
    dist.barrier()
    numbers[1] = transmitted() - before
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def now() -> float:
    """Return the seconds of a clock."""
    return time.perf_counter()


def transmitted() -> int:
    """Return the bytes that this node's link has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    raise RuntimeError("no link eth0: a rank must run inside a node")


def tool(command: str, *, check: bool = True) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"`{command}` failed: {done.stderr.strip()}")


def burst(mbit: int) -> int:
    """Return how many KiB a limited link sends at once."""
    return max(32, mbit // 4)


def framing(mbit: int) -> Framing:
    """Return how a limited link counts: it passes the kernel's 64 KiB on in one where it may send so much at once."""
    return Framing() if burst(mbit) < 64 else Framing(segment=45 * 1448)


@contextmanager
def cluster(nodes: int, mbit: int) -> Iterator[None]:
    """Make nodes on a switch, every link limited in both directions; remove all of it at the end."""
    tear_down(nodes)
    try:
        tool(f"ip netns add {PREFIX}sw")
        tool(f"ip -n {PREFIX}sw link add br0 type bridge")
        tool(f"ip -n {PREFIX}sw link set br0 up")
        for node in range(nodes):
            name = f"{PREFIX}{node}"
            tool(f"ip netns add {name}")
            tool(f"ip link add {name}a netns {name} type veth peer name {name}b netns {PREFIX}sw")
            tool(f"ip -n {name} link set {name}a name eth0")
            tool(f"ip -n {name} addr add 10.77.0.{node + 1}/24 dev eth0")
            tool(f"ip -n {name} link set lo up")
            tool(f"ip -n {name} link set eth0 up")
            tool(f"ip -n {PREFIX}sw link set {name}b master br0 up")
            limit = f"tbf rate {mbit}mbit burst {burst(mbit)}kb latency 100ms"
            tool(f"ip netns exec {name} tc qdisc add dev eth0 root {limit}")
            tool(f"ip netns exec {PREFIX}sw tc qdisc add dev {name}b root {limit}")
            tool(f"ip netns exec {name} sysctl -qw net.ipv4.tcp_congestion_control=reno", check=False)
        yield
    finally:
        tear_down(nodes)


def tear_down(nodes: int) -> None:
    for name in [f"{PREFIX}sw", *(f"{PREFIX}{node}" for node in range(nodes))]:
        tool(f"ip netns del {name}", check=False)


def measure_cluster(nodes: int, mbit: int, args: Args, progress: Progress) -> list[dict[str, Any]]:
    """Start the ranks inside the nodes of one cluster, and collect what the first one prints."""
    task = progress.add_task(f"{nodes} nodes, {mbit} Mbit/s", total=None)
    with cluster(nodes, mbit), tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(args.ranks):
            job = {"rank": rank, "ranks": args.ranks, "nodes": nodes, "mbit": mbit, "store": f"{folder}/store"}
            job |= {"workloads": args.workloads, "chunks": args.chunks, "rounds": args.rounds}
            node = f"{PREFIX}{rank * nodes // args.ranks}"
            command = ["ip", "netns", "exec", node, sys.executable, __file__, "--job", json.dumps(job)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        records = []
        try:
            assert ranks[0].stdout is not None
            for line in ranks[0].stdout:
                records.append(json.loads(line))
                progress.advance(task)
            if any(process.wait() for process in ranks):
                raise SystemExit("a rank failed: see above")
        finally:
            for process in ranks:
                process.kill()
    progress.remove_task(task)
    return records


def show(records: list[dict[str, Any]]) -> None:
    """Print, for every cell, the best plan, the worst, the one that E and W alone would fix, and data parallel."""
    table = Table(title="milliseconds a step (median; quartiles)")
    for name in ("nodes", "Mbit/s", "T D F E", "best plan", "ms", "limit", "g=max(1,S)", "data parallel", "worst"):
        table.add_column(name, justify="left" if name in ("T D F E", "best plan") else "right")
    ratios: dict[str, list[float]] = {"worst": [], "g=max(1,S)": [], "data parallel": []}
    for cell, group in itertools.groupby(sorted(records, key=_cell), key=_cell):
        own = {record["plan"]: record for record in group}
        best = min(own.values(), key=lambda record: record["seconds"])
        nodes, mbit, (tokens, _, width, hidden, experts) = cell
        others = {
            "g=max(1,S)": own[f"g={max(1, best['ranks'] // experts)}"],
            "data parallel": own[f"g={best['ranks']}"],
            "worst": max(own.values(), key=lambda record: record["seconds"]),
        }
        low, high = best["quartiles"]
        time_of_best = f"{best['seconds'] * 1e3:.0f} ({low * 1e3:.0f}-{high * 1e3:.0f})"
        for name, record in others.items():
            ratios[name].append(record["seconds"] / best["seconds"])
        row = [str(nodes), str(mbit), f"{tokens} {width} {hidden} {experts}", best["plan"], time_of_best]
        row += [f"{best['limit_seconds'] * 1e3:.0f}"]
        table.add_row(*row, *(f"{record['seconds'] / best['seconds']:.2f}x" for record in others.values()))
    console = Console(width=150)
    console.print(table)
    for name, values in ratios.items():
        if values:
            mean = statistics.geometric_mean(values)
            console.print(f"{name} over best: {mean:.2f}x on average, {max(values):.1f}x at most")
    shares = [record["bytes"] / record["formula_bytes"] for record in records if record["formula_bytes"] > 1e5]
    if shares:
        middle = statistics.median(shares)
        console.print(f"bytes sent over the formula: {min(shares):.3f} to {max(shares):.3f}, median {middle:.3f}")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw every cell's plans as a heat map: time over the best plan's, from 1 (light) to 10 and more (dark)."""
    plans = [p for p in dict.fromkeys(r["plan"] for r in records) if "two-level" not in p and "regather" not in p]
    cells = [(c, {r["plan"]: r for r in g}) for c, g in itertools.groupby(sorted(records, key=_cell), key=_cell)]
    left, top, wide, high = 330, 56, 112, 20
    size = f'width="{left + wide * len(plans) + 10}" height="{top + high * len(cells) + 10}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    lines += [
        '<rect width="100%" height="100%" fill="white"/>',
        _text(10, 18, "time of a step over the best plan's", 14),
    ]
    lines += [_text(10, 46, "nodes, Mbit/s; tokens a rank, hidden width, experts")]
    lines += [_text(left + wide * i + 6, 46, plan) for i, plan in enumerate(plans)]
    for row, ((nodes, mbit, (tokens, _, _, hidden, experts)), own) in enumerate(cells):
        y, best = top + high * row, min(record["seconds"] for record in own.values())
        lines.append(_text(10, y + 14, f"{nodes} nodes, {mbit}; T {tokens}, F {hidden}, E {experts}"))
        for column, plan in enumerate(plans):
            if plan not in own:
                continue
            ratio = own[plan]["seconds"] / best
            dark = min(1.0, math.log10(ratio))
            red, green, blue = (round(a + (b - a) * dark) for a, b in ((232, 20), (244, 40), (234, 110)))
            box = f'x="{left + wide * column}" y="{y}" width="{wide - 2}" height="{high - 2}"'
            lines.append(f'<rect {box} fill="rgb({red},{green},{blue})"/>')
            colour = "white" if dark > 0.5 else "black"
            label = f"{own[plan]['seconds'] * 1e3:.0f} ms  {ratio:.1f}x"
            lines.append(_text(left + wide * column + 6, y + 14, label, colour=colour, bold=ratio == 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")


def _text(x: int, y: int, text: str, size: int = 12, *, colour: str = "black", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{weight}>{text}</text>'


def _cell(record: dict[str, Any]) -> tuple[int, int, tuple[int, ...]]:
    return record["nodes"], record["mbit"], tuple(record["shape"])


def main(args: Args) -> None:
    if args.job:
        run_rank(json.loads(args.job))
        return
    if not args.show:
        if os.geteuid() != 0:
            raise SystemExit("network namespaces need root: run this with sudo, or --show what was measured")
        with Progress(console=Console(stderr=True)) as progress:
            for nodes, mbit in itertools.product(args.nodes, args.rates):
                save(measure_cluster(nodes, mbit, args, progress), args.out, figure=FIGURE)
    if not args.out.exists():
        raise SystemExit(f"{args.out} does not exist: nothing was measured yet")
    records = [json.loads(line) for line in args.out.read_text().splitlines()]
    show(records)
    draw(records, args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
