"""The Tutel paper's tables by simulation: its system and its baseline on its testbed, cell by cell, and beyond.

    .venv/bin/python benchmarks/paper.py            # every table: paper, here, ratio
    .venv/bin/python benchmarks/paper.py --json     # one JSON object per cell

Times come from the profile a100_hdr: published figures, and two calibrations that are named in it (the compute of
table 2 at 16 GPUs, the all-to-all of table 2 at 256), besides the dense model's speed for table 7 (its own dense
column at 8 GPUs) and one constant for the memory table (its first cell). No constant is fitted to any other cell.

The baseline is the paper's (Fairseq): dense einsum dispatch of a [T, E, C] mask, expert products over [W, L, C, D],
flat all-to-all, no overlap. The paper's own system is the plan g = max(1, W/E) on an even wire, as in its figure 14.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from synchromesh import Plan
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.shapes import SHAPES
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.cost import forward_and_backward, step_seconds
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.search import Candidate, predicted
from synchromesh.planning.shape import LayerKind
from synchromesh.types import Workload

A100 = load_profile("a100_hdr")
DEGREES, BOTH = (1, 2, 4, 8), (False, True)


@dataclass(frozen=True)
class Args:
    """What to print. json: one object per cell instead of tables."""

    json: bool = False


@dataclass(frozen=True)
class Cell:
    """One number of the paper. here: what the simulation says."""

    table: str
    row: str
    paper: float
    here: float

    @property
    def ratio(self) -> float:
        return self.here / self.paper


def layer(tokens: int, width: int, hidden: int, experts: int, k: int, dtype: torch.dtype, f: float = 1.0) -> Workload:
    capacity = math.ceil(f * k * tokens / experts)
    return Workload(tokens, k, width, hidden, experts, dtype, True, capacity=capacity)


def ranks_of(world: int) -> Ranks:
    return Ranks(world, min(8, world))


def products(work: Workload, world: int, *, flexible: bool, training: bool = True) -> float:
    """Seconds of the experts' products of a rank, of C rows of each source, or of all sources together."""
    speed, local = A100.rate_of(str(work.dtype).removeprefix("torch.")), work.experts / world
    assert work.capacity is not None
    rows, count = (world * work.capacity, local) if flexible else (work.capacity, world * local)
    passes = 3 if training else 1
    return passes * 2 * count * speed.seconds(rows, work.hidden, work.width)


def dense_dispatch(work: Workload, *, training: bool = True) -> float:
    """Seconds of the einsums of a [T, E, C] mask with the tokens, and of their gradients."""
    speed, element = A100.rate_of(str(work.dtype).removeprefix("torch.")), work.dtype.itemsize
    assert work.capacity is not None
    slots = work.experts * work.capacity
    one = max(speed.seconds(slots, work.width, work.rows), work.rows * slots * element / A100.memory_rate)
    building = 4 * work.rows * slots * element / A100.memory_rate  # the mask is made of one-hot tensors
    return building + one * (5 if training else 2)


def paper_plan(work: Workload, world: int) -> Plan:
    return Plan(gather=max(1, world // work.experts), ragged=False)


def tutel(work: Workload, world: int, *, two_level: bool = False, chunks: int = 1) -> float:
    plan = dataclasses.replace(paper_plan(work, world), two_level=two_level and world > 8, chunks=chunks)
    return step_seconds(work, plan, ranks_of(world), A100)


def baseline(work: Workload, world: int) -> float:
    """Seconds of the same layer as Fairseq runs it."""
    plain = forward_and_backward(work, paper_plan(work, world), ranks_of(world), A100)
    sparse = sum(one.permute for one in plain)
    shape = products(work, world, flexible=False, training=work.training)
    shape -= products(work, world, flexible=True, training=work.training)
    return sum(one.total for one in plain) - sparse + dense_dispatch(work, training=work.training) + max(0.0, shape)


def figure_14() -> Iterator[Cell]:
    """One layer against the baseline, stage by stage: T 16,384, D = F = 2,048, 2 experts a GPU, k 2."""
    paper = {16: {"total": 4.96, "kernels": 3.52, "pipelining": 1.43}, 128: {"total": 3.11}}
    paper[2048] = {"total": 5.75, "kernels": 1.04, "two-level": 4.25, "flexible": 1.24, "pipelining": 1.04}
    for world, wanted in paper.items():
        work = layer(16384, 2048, 2048, 2 * world, 2, torch.float32)
        shape = max(0.0, products(work, world, flexible=False) - products(work, world, flexible=True))
        times = [baseline(work, world), tutel(work, world) + shape]
        times.append(min(times[-1], tutel(work, world, two_level=True) + shape))
        times.append(times[-1] - shape)
        times.append(min(tutel(work, world, two_level=a, chunks=d) for a in BOTH for d in DEGREES))
        here = {"kernels": times[0] / times[1], "two-level": times[1] / times[2], "flexible": times[2] / times[3]}
        here |= {"pipelining": times[3] / times[4], "total": times[0] / times[4]}
        for name, value in wanted.items():
            yield Cell("figure 14", f"{world} GPUs, {name}", value, here[name])


def table_2() -> Iterator[Cell]:
    """Where the time of a layer goes: D = F = 4,096, 2 experts a GPU, 65,536 tokens."""
    paper = {16: (560.9, 371.8, 189.1), 64: (698.9, 375.1, 323.8), 256: (866.4, 386.3, 491.3)}
    for world, wanted in paper.items():
        work = layer(65536, 4096, 4096, 2 * world, 2, torch.float32)
        passes = forward_and_backward(work, paper_plan(work, world), ranks_of(world), A100)
        exposed = sum(one.exposed for one in passes)
        total = sum(one.total for one in passes)
        names = ("total, ms", "compute, ms", "all-to-all, ms")
        for name, value, here in zip(names, wanted, (total, total - exposed, exposed), strict=True):
            yield Cell("table 2", f"{world} GPUs, {name}", value, 1e3 * here)


def table_6() -> Iterator[Cell]:
    """How much slower a static choice is than the best, on average over layers."""
    paper = {
        (16, False): (20, 2, 2, 11),
        (16, True): (101, 98, 100, 106),
        (64, False): (13, 1, 5, 15),
        (64, True): (28, 25, 27, 34),
        (256, False): (20, 27, 54, 107),
        (256, True): (12, 20, 34, 11),
    }
    sizes = (1024, 2048, 4096)
    for world in (16, 64, 256):
        slower: dict[tuple[bool, int], list[float]] = {}
        for per_gpu, width, hidden, tokens in itertools.product((0.5, 1, 2), sizes, sizes, (4096, 16384, 65536)):
            work = layer(tokens, width, hidden, round(per_gpu * world), 2, torch.float32)
            choices = itertools.product(BOTH, DEGREES)
            times = {(a, d): tutel(work, world, two_level=a, chunks=d) for a, d in choices}
            best = min(times.values())
            for choice, seconds in times.items():
                slower.setdefault(choice, []).append(seconds / best)
        for two_level in BOTH:
            for degree, value in zip(DEGREES, paper[world, two_level], strict=True):
                name = "two-level" if two_level else "flat"
                here = statistics.mean(slower[two_level, degree])
                row = f"{world} GPUs, {name}, {degree} chunks: over the best"
                yield Cell("table 6", row, 1 + value / 100, here)


def table_7() -> Iterator[Cell]:
    """SwinV2-MoE-B, images per second and GPU, one expert a GPU, k 1, f 1.25, batch 128 in float16."""
    paper = {
        8: ((291, 240, 274), (1198, 507, 1053)),
        16: ((290, 173, 253), (1198, 473, 943)),
        32: ((288, 162, 249), (1195, 455, 892)),
        64: ((285, 159, 234), (1187, 429, 835)),
        128: ((256, 146, 226), (1103, 375, 792)),
    }
    for world, both in paper.items():
        shape = SHAPES["swinv2_moe_b"](ExpertsConfig(num_experts=world))
        for training, wanted in zip((True, False), both, strict=True):
            passes, share = (3, shape.dense_share[1]) if training else (1, shape.dense_share[0])
            speed = A100.rate_of("float16")
            dense = passes * 2 * shape.dense_products * 128 / (speed.peak * share)
            twin = sum(ffn_seconds(kind) for kind in shape.layers)
            here = [128 / (dense + passes * twin)]
            for slow in (True, False):
                seconds = dense
                for kind in shape.layers:
                    work = dataclasses.replace(kind.work, rows=128 * kind.tokens, training=training)
                    work = dataclasses.replace(work, capacity=math.ceil(1.25 * work.rows / world))
                    best = min(tutel(work, world, two_level=a, chunks=d) for a in BOTH for d in DEGREES)
                    seconds += kind.count * (baseline(work, world) if slow else best)
                here.append(128 / seconds)
            what = "trained" if training else "inferred"
            for name, value, rate in zip(("dense", "Fairseq", "Tutel"), wanted, here, strict=True):
                yield Cell("table 7", f"{world} GPUs, {name}, {what} images/s", value, rate)


def ffn_seconds(kind: LayerKind) -> float:
    """Seconds of the forward of the feed-forwards that experts replace, on 128 images."""
    one = A100.rate_of("float16").seconds(128 * kind.tokens, kind.work.hidden, kind.work.width)
    return 2 * kind.count * one


def table_9() -> Iterator[Cell]:
    """Memory of a layer on one GPU, GiB: D = F = 4,096, k 2, 2 experts; a constant from the first cell."""
    paper = {4096: (3.7, 2.9), 8192: (6.2, 3.2), 16384: (16.3, 4.0), 32768: (57.9, 5.7)}

    def sparse(tokens: int) -> float:
        rows, weights = 2 * tokens, 2 * 2 * 4096 * 4096 * 4 * 4
        return weights + 4 * (tokens * 4096 + 3 * rows * 4096)  # tokens; rows, hidden rows and results of experts

    def dense(tokens: int) -> float:
        masks = 6  # both choices' weights, their sum, the mask in the tokens' dtype, two gradients; C = T
        return sparse(tokens) + 4 * masks * tokens * 2 * tokens

    constant = paper[4096][1] * 2**30 - sparse(4096)
    for tokens, (fairseq, own) in paper.items():
        yield Cell("table 9", f"{tokens} tokens, Fairseq, GiB", fairseq, (dense(tokens) + constant) / 2**30)
        yield Cell("table 9", f"{tokens} tokens, Tutel, GiB", own, (sparse(tokens) + constant) / 2**30)


@dataclass(frozen=True)
class Beyond:
    """One layer by the best of three sets of plans, each a part of the next.

    Attributes:
        row: which layer on how many GPUs.
        paper: the paper's plans: any degree and algorithm, near, g = W or a divisor of S.
        plain: all plans with a row for each choice.
        lattice: all plans.
    """

    row: str
    paper: Candidate
    plain: Candidate
    lattice: Candidate


def beyond() -> list[Beyond]:
    """The layer of figure 14, 16 to 65,536 GPUs; with 8 choices too."""
    found = []
    kinds = (
        (lambda world: 2 * world, 2, "2 a GPU"),
        (lambda _: 64, 2, "64 in all"),
        (lambda world: 2 * world, 8, "2 a GPU, k 8"),
        (lambda _: 256, 8, "256 in all, k 8"),
    )
    for experts_of, k, name in kinds:
        for world in (16, 64, 256, 1024, 4096, 16384, 65536):
            work = layer(16384, 2048, 2048, experts_of(world), k, torch.float16)
            ordered, shards = predicted(work, ranks_of(world), A100), max(1, world // work.experts)
            plain = [one for one in ordered if not one.plan.deduplicate]
            degrees = [one for one in plain if one.plan.gather == world or shards % one.plan.gather == 0]
            own = next(one for one in degrees if one.plan.near)
            found.append(Beyond(f"{world:,} GPUs, experts {name}", own, plain[0], ordered[0]))
    return found


def crossovers() -> list[str]:
    """Figure 12: which r is the best as the capacity grows; 16 experts, D 2,048, 64 GPUs."""
    said = []
    for name, tokens, hidden in (("base", 4096, 2048), ("large", 1024, 32768)):
        chosen = []
        for f in range(1, 9):
            work = layer(tokens, 2048, hidden, 16, 1, torch.float16, f)
            shards, candidates = 4, predicted(work, ranks_of(64), A100)
            padded = [one.plan for one in candidates if one.plan.gather == 64 or not one.plan.ragged]
            own = [plan for plan in padded if plan.near and plan.gather in (1, 2, 4, 64)]
            chosen.append("0" if own[0].gather == 64 else str(shards // own[0].gather))
        said.append(f"{name}: r = {', '.join(chosen)} for f = 1 to 8")
    return said


TABLES = (figure_14, table_2, table_6, table_7, table_9)


def main(args: Args) -> None:
    console = Console(width=110)
    cells = [cell for table in TABLES for cell in table()]
    if args.json:
        for cell in cells:
            print(json.dumps({**dataclasses.asdict(cell), "ratio": cell.ratio}))
        return
    for title, own in itertools.groupby(cells, key=lambda cell: cell.table):
        table = Table("", "paper", "here", "here / paper", title=title, title_justify="left")
        listed = list(own)
        for cell in listed:
            style = None if 0.8 <= cell.ratio <= 1.25 else "yellow"
            table.add_row(cell.row, f"{cell.paper:,.4g}", f"{cell.here:,.4g}", f"{cell.ratio:.2f}", style=style)
        console.print(table)
        within = sum(0.8 <= cell.ratio <= 1.25 for cell in listed)
        console.print(f"{within} of {len(listed)} within a factor of 1.25")
    names = ("paper's, ms", "plan", "a row a choice, ms", "plan", "all plans, ms", "plan", "gain")
    table = Table("", *names, title="beyond the paper, float16")
    for one in beyond():
        three = (one.paper, one.plain, one.lattice)
        cells_of_row = [text for best in three for text in (f"{1e3 * best.seconds:.1f}", str(best.plan))]
        table.add_row(one.row, *cells_of_row, f"{one.paper.seconds / one.lattice.seconds:.2f}x")
    Console(width=190).print(table)
    for line in crossovers():
        console.print(f"figure 12, {line}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
