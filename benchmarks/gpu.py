"""The Triton kernels on one GPU: checked against float64, timed beside other ways to the same numbers, tuned.

    python benchmarks/gpu.py                             # check every kernel, capture steps, time the fused kernel
    python benchmarks/gpu.py --part tune                 # try block sizes
    python benchmarks/gpu.py --part choose --minutes 20  # where torch's own grouped_mm is faster, it runs from then on
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny   # without a GPU, in Triton's interpreter

check: every kernel against the reference in float64 on the same inputs; fresh memory is NaN. Where one fails no speed
is measured. graphs: whole steps, forward alone and with backward and AdamW, are captured as CUDA graphs, replayed on
new inputs, compared with eager steps and timed beside them. time: contestants get one fixed routing and are first
compared with each other; rounds are interleaved, times are medians of CUDA events around eager calls: launches are
included, the L2 cache is not flushed. The limit is a bf16 product of two [8192, 8192] matrices in the same rounds. Peak
memory is above what was there before, gradients included; saved bytes are x and what else is kept for backward, without
weights. tune: tilings that Triton refuses are written down with its reason. choose: both ways to a product are compared
and then timed over loads and sizes; the table goes into the package. Each record is appended to the output as soon as
it is known.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from gpu_choice import choose_part
from gpu_graphs import graphs_part
from gpu_problem import (
    RIVALS,
    ROUTINGS,
    SHAPES,
    TINY,
    Shape,
    disagreement,
    fused,
    grouped,
    memory,
    padded,
    problem_of,
    timed,
)
from gpu_session import Args, Record, Session, session_of
from gpu_tilings import tune_part
from rich.console import Console
from rich.table import Table
from torch import Tensor

from synchromesh.kernels import REFERENCE, Float8Products, Kernels, MLPWeights, MXFloat8Products
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.tiles import interpreted
from synchromesh.moe.capacity import Dropless
from synchromesh.testing.cases import Case, evil_cases, zipf
from synchromesh.testing.compare import TOLERANCE, relative_rms
from synchromesh.testing.poison import poisoned_memory
from synchromesh.types import RowMap

MEDIUM = [Shape(1000, 200, 328, 7, 3), Shape(2048, 512, 1024, 16, 2)]  # checked
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
KERNELS = [
    *[("fused_mlp", "plain", "gelu"), ("fused_mlp", "plain", "silu"), ("fused_mlp", "biased", "relu")],
    *[("fused_mlp", "gated", "silu"), ("fused_mlp", "gated", "relu"), ("fused_mlp", "gated_biased", "gelu")],
    *[("grouped_mm", "plain", ""), ("grouped_mm", "biased", ""), ("gather", "plain", ""), ("combine", "plain", "")],
    *[("scaled_mm", "float8 biased", ""), ("scaled_mm", "mxfloat8 biased", "")],
]
TORCHS = [("torch's grouped_mm", "plain", ""), ("torch's grouped_mm", "biased", "")]  # in bfloat16 alone


@dataclass(frozen=True)
class Task:
    """A kernel in one variant and dtype."""

    kernel: str
    kind: str
    activation: str
    dtype: torch.dtype

    def record(self) -> Record:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


def probe(task: Task, case: Case, sizes: tuple[int, int], rowmap: RowMap) -> tuple[Callable[..., Any], Record]:
    """Return the kernel as (kernels, **tensors) -> what somebody may read of its result, and those tensors."""
    kept, biased, experts, tokens = int(rowmap.ends[-1]), "biased" in task.kind, case.num_experts, len(case.expert_ids)
    x, weights = case.tokens(sizes[0], torch.float64), case.weights(torch.float64)
    if task.kernel == "positions":
        priority = torch.tensor([0.0, 2.0, torch.nan, 2.0, torch.inf]).repeat(tokens)[:tokens]
        given = {"expert_ids": case.expert_ids, **({"priority": priority} if task.kind == "prioritized" else {})}
        return lambda k, **given: torch.cat([t.flatten() for t in k.positions(**given, num_experts=experts)]), given
    if task.kernel == "gather":
        return lambda k, x: k.gather(x, rowmap)[:kept], {"x": x}
    buffer = torch.randn(len(rowmap.pairs), sizes[0])
    buffer[kept:] = torch.nan
    if task.kernel == "combine":
        return lambda k, **given: k.combine(**given, rowmap=rowmap), {"buffer": buffer, "weights": weights}
    mlp = parts(experts, *sizes)
    if task.kernel.endswith("grouped_mm"):
        given = {"rows": buffer, "weight": mlp["up"].mT.contiguous(), **({"bias": mlp["up_bias"]} if biased else {})}
        return lambda k, **given: k.grouped_mm(**given, ends=rowmap.ends)[:kept], given
    if task.kernel == "scaled_mm":
        products = MXFloat8Products() if "mx" in task.kind else Float8Products()
        given = {"rows": buffer, "weight": mlp["up"].mT, "bias": mlp["up_bias"]}
        return lambda k, **given: k.scaled_mm(**given, ends=rowmap.ends, products=products)[:kept], given
    mlp = {n: t for n, t in mlp.items() if ("gated" in task.kind or "gate" not in n) and (biased or "bias" not in n)}

    def layer(k: Kernels, x: Tensor, weights: Tensor, **mlp: Tensor) -> Tensor:
        return k.fused_mlp(x, weights, rowmap, MLPWeights(**mlp), ACTIVATIONS[task.activation])

    return layer, {"x": x, "weights": weights, **mlp}


def parts(experts: int, width: int, hidden: int) -> dict[str, Tensor]:
    """Return what MLPWeights may hold."""
    matrices = {name: torch.randn(experts, hidden, width) / width**0.5 for name in ("up", "down", "gate")}
    sizes = {"up_bias": hidden, "gate_bias": hidden, "down_bias": width}
    return matrices | {name: torch.randn(experts, size) for name, size in sizes.items()}


def outcome(run: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Return the output, in inference too, and every gradient. dtype: what the output's gradient is rounded to."""
    own = {name: tensor.clone().requires_grad_(dtype.is_floating_point) for name, tensor in inputs.items()}
    y = run(**own)
    if not dtype.is_floating_point:
        return {"output": y}
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(y))
    with torch.no_grad():
        outputs = {"output": y.detach(), "output in inference": run(**own)}
    return outputs | {f"gradient of {name}": tensor.grad for name, tensor in own.items()}


def errors(task: Task, case: Case, sizes: tuple[int, int], device: str) -> dict[str, float]:
    """Return the error of each result of a kernel."""
    m, real = case.rowmap(), task.dtype.is_floating_point
    rowmap = RowMap(m.rows.to(device), m.pairs.to(device), m.ends.to(device), m.capacity)
    run, inputs = probe(task, case, sizes, rowmap)
    narrow = {name: tensor.to(device, task.dtype if real else tensor.dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double() if real else tensor for name, tensor in narrow.items()}
    own = replace(TRITON, grouped_mm=native.grouped_mm) if task.kernel == "torch's grouped_mm" else TRITON
    got, wanted = (outcome(partial(run, k), given, task.dtype) for k, given in ((own, narrow), (REFERENCE, wide)))
    strange = [name for name in wanted if (got[name].dtype, got[name].shape) != (task.dtype, wanted[name].shape)]
    assert not strange, f"dtype or shape of {strange} in {case.name}"
    return {name: relative_rms(got[name], wanted[name]) for name in wanted}


def checked(task: Task, device: str, tiny: bool) -> list[Record]:
    """Check one task on every case."""
    torch.manual_seed(0)
    truncates = 2 if interpreted() and task.dtype == torch.bfloat16 else 1  # where a GPU rounds
    limit, shapes = truncates * TOLERANCE.get(task.dtype, 0.0), TINY if tiny else MEDIUM
    cases = [(Case(str(s), zipf(s.tokens, s.experts, s.choices), s.experts), (s.width, s.hidden)) for s in shapes]
    sizes = (16, 40) if task.kernel == "torch's grouped_mm" else (10, 37)  # it takes multiples of 8 alone
    cases += [(case, sizes) for case in evil_cases() if len(case.expert_ids) < 1000 or not tiny]
    records = []
    with poisoned_memory():
        for case, sizes in cases:
            found = errors(task, case, sizes, device)
            about = {"case": case.name, "errors": found, "error": max(found.values()), "tolerance": limit}
            records.append({**task.record(), **about, "passed": max(found.values()) <= limit})
    return records


def check_part(session: Session) -> bool:
    """Check every kernel, show what fails, tell whether nothing does. A task that breaks down fails as a whole."""
    table, count = Table("kernel", "kind", "activation", "dtype", "case", "error", title="failures"), 0
    tasks = [Task(*each, dtype) for each in KERNELS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    tasks += [Task(*each, torch.bfloat16) for each in TORCHS]
    tasks += [Task("positions", kind, "", torch.int64) for kind in ("plain", "prioritized")]
    with session.workers() as workers:
        futures = {workers.submit(checked, task, session.device, session.args.tiny): task for task in tasks}
        for future in as_completed(futures):
            about, broken = futures[future].record(), future.exception()
            lost = {**about, "case": "all", "error": repr(broken), "passed": False}
            for record in [lost] if broken else future.result():
                session.write("check", record)
                count += 1
                if not record["passed"]:
                    table.add_row(*map(str, about.values()), record["case"], str(record["error"]))
    if table.row_count:
        Console(width=200).print(table)
    print(f"{count - table.row_count} of {count} checks passed")
    return not table.row_count


def measure(shape: Shape, routing: str, session: Session) -> list[Record]:
    """Return one record for the forward and one for forward and backward."""
    p, side, about = problem_of(shape, routing, session.device), 64 if session.args.tiny else 8192, {}
    found = (fused(p), grouped(p, scatter=True), grouped(p, scatter=False), padded(p))
    entries = dict(zip(["fused", *RIVALS], found, strict=True))
    runs = {name: entry for name, entry in entries.items() if not isinstance(entry, str)}
    about = {"skipped": {name: entry for name, entry in entries.items() if isinstance(entry, str)}}
    error = disagreement(p, runs)
    if error > TOLERANCE[torch.bfloat16] * (2 if interpreted() else 1):
        return [{"left_out": f"contestants differ by {error:.3g}"}]
    a, b = torch.randn(2, side, side, device=session.device).bfloat16()
    x, weights, rows = p.x.detach(), p.routing.weights.detach(), TRITON.gather(p.x.detach(), p.rowmap)
    steps = {"dense": lambda: a @ b, "map": lambda: Dropless()(p.routing, max)}
    steps |= {"gather": lambda: TRITON.gather(x, p.rowmap), "combine": lambda: TRITON.combine(rows, weights, p.rowmap)}
    records = []
    for backward in (False, True):
        every = {name: partial(p.run, run, backward=backward) for name, run in runs.items()}
        seconds = timed(every | steps, session.args.seconds)
        used = {} if interpreted() else {name: memory(p, run, backward=backward) for name, run in runs.items()}
        record = {"pass": "both" if backward else "forward", "seconds": seconds, "memory": used}
        records.append(about | record | verdict(shape, seconds, 2 * side**3, backward=backward))
    return records


def verdict(shape: Shape, seconds: dict[str, float], dense_flops: int, *, backward: bool) -> Record:
    """Compare the fused kernels with the limit and with the others. Permuting, in part inside them, counts on top."""
    rate = shape.product_flops * (3 if shape.gated else 2) * (3 if backward else 1) / seconds["fused"]
    return {
        "tflops": rate / 1e12,
        "of_dense": rate * seconds["dense"] / dense_flops,
        "over_best_other": seconds["fused"] / min(seconds[name] for name in RIVALS if name in seconds),
        "permuting": sum(seconds[n] for n in ("map", "gather", "combine")) / (seconds["map"] + seconds["fused"]),
        "saved_formula": 2 * (shape.tokens * shape.width + shape.rows * shape.hidden * (2 if shape.gated else 1)),
    }


def time_part(session: Session) -> None:
    """Time every shape, balanced and then skewed."""
    columns = ["TFLOP/s", "of dense", "over best", "permuting", "over balanced", "saved / formula, peak MiB"]
    table = Table("T D F E K", "routing", "pass", *(f"{name}, ms" for name in ("fused", *RIVALS)), *columns)
    shapes, even = TINY if session.args.tiny else SHAPES, {}
    for index, routing in itertools.product(session.args.shapes or range(len(shapes)), ROUTINGS):
        about = {"shape": str(shapes[index]), "gated": shapes[index].gated, "routing": routing}
        try:
            records = [] if session.late() else measure(shapes[index], routing, session)
        except torch.OutOfMemoryError as error:
            records = [{"left_out": str(error)}]
        for record in records:
            if "left_out" in record:
                print(about, record["left_out"])
            else:
                mine = record["seconds"]["fused"]
                record["over_balanced"] = mine / even.setdefault((index, record["pass"]), mine)
                table.add_row(*cells(about | record))
            session.write("time", about | record)
    Console(width=220).print(table)


def cells(record: Record) -> list[str]:
    ms = [f"{1e3 * record['seconds'][n]:.2f}" if n in record["seconds"] else "-" for n in ("fused", *RIVALS)]
    ratios = [f"{record[name]:.2f}" for name in ("of_dense", "over_best_other", "permuting", "over_balanced")]
    used = record["memory"].get("fused", {"saved": 0, "peak": 0})
    saved, formula, peak = (f"{n / 2**20:.0f}" for n in (used["saved"], record["saved_formula"], used["peak"]))
    sizes = f"{saved} / {formula}, {peak}"
    return [record["shape"], record["routing"], record["pass"], *ms, f"{record['tflops']:.1f}", *ratios, sizes]


def main(args: Args) -> int:
    """Return the exit code."""
    if not (interpreted() and args.tiny) and not torch.cuda.is_available():
        print("No GPU here. To try this script on the CPU: TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny")
        return 1
    session = session_of(args)
    print(", ".join(f"{name} {value}" for name, value in session.about.items()), f"-> {session.out}")
    if interpreted():
        torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
        print("Speeds in the interpreter mean nothing.")
    if "check" in args.part and not check_part(session):
        return 1
    if "graphs" in args.part and not graphs_part(session):
        return 1
    if "time" in args.part:
        time_part(session)
    if "tune" in args.part:
        tune_part(session)
    if "choose" in args.part and not choose_part(session):
        return 1
    if session.late():
        print(f"{args.minutes} minutes are over: the rest was left out, choose it with --shapes or --part.")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
