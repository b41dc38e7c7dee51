"""Every Triton kernel against its reference in float64 on the same inputs: what `benchmarks/gpu.py --part check` runs.

Fresh memory is NaN. Where one fails no speed is measured.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_problem import TINY, Shape
from gpu_session import Record, Session
from rich.console import Console
from rich.table import Table
from torch import Tensor

from synchromesh.kernels import REFERENCE, Float8Products, Kernels, MLPWeights, MXFloat8Products, quantize
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.tiles import interpreted
from synchromesh.testing.cases import Case, evil_cases, zipf
from synchromesh.testing.compare import TOLERANCE, relative_rms
from synchromesh.testing.poison import poisoned_memory
from synchromesh.types import RowMap

MEDIUM = [Shape(1000, 200, 328, 7, 3), Shape(2048, 512, 1024, 16, 2)]  # checked
FEW = [Shape(64, 512, 1024, 128, 8), Shape(8, 200, 328, 7, 3)]  # checked of `direct_mlp`
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
KERNELS = [
    *[("fused_mlp", "plain", "gelu"), ("fused_mlp", "plain", "silu"), ("fused_mlp", "biased", "relu")],
    *[("fused_mlp", "gated", "silu"), ("fused_mlp", "gated", "relu"), ("fused_mlp", "gated_biased", "gelu")],
    *[("grouped_mm", "plain", ""), ("grouped_mm", "biased", ""), ("gather", "plain", ""), ("combine", "plain", "")],
    *[("direct_mlp", "gated", "silu"), ("direct_mlp", "biased", "gelu"), ("direct_mlp", "int8 gated_biased", "silu")],
    *[("marked_mlp", "gated", "silu"), ("marked_mlp", "biased", "gelu")],
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
    ids = case.expert_ids.to(rowmap.rows.device)
    if task.kernel == "marked_mlp":  # of some tokens a pair that was dropped, or all that were kept, are broken
        broken = ((rowmap.rows < 0) & (ids >= 0)).cpu()
        weights[broken & (torch.arange(tokens) % 2 == 0)[:, None]] = torch.nan

    def layer(k: Kernels, x: Tensor, weights: Tensor, **mlp: Tensor) -> Tensor:
        net, activation = MLPWeights(**mlp), ACTIVATIONS[task.activation]
        if task.kernel == "direct_mlp":
            net = quantize(net, torch.int8) if "int8" in task.kind else net
            return k.direct_mlp(x, weights, ids, net, activation)
        if task.kernel == "marked_mlp" and k.marked_mlp is not None:
            return k.marked_mlp(x, weights, rowmap, ids, net, activation)
        y = k.fused_mlp(x, weights, rowmap, net, activation)
        return k.mark(y, weights, ids) if task.kernel == "marked_mlp" else y

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


def bits_that_differ_alone(task: Task, case: Case, sizes: tuple[int, int], device: str) -> int:
    """Return in how many numbers the tokens of a batch differ from the same tokens, each run alone."""
    run, inputs = probe(task, case, sizes, case.rowmap())
    own = {name: tensor.to(device, task.dtype) for name, tensor in inputs.items()}
    with torch.no_grad():
        together, found = run(TRITON, **own), 0
        for token in range(len(case.expert_ids)):
            one = slice(token, token + 1)
            less = replace(case, expert_ids=case.expert_ids[one])
            alone, _ = probe(task, less, sizes, less.rowmap())
            y = alone(TRITON, **{**own, "x": own["x"][one], "weights": own["weights"][one]})
            found += int(((y != together[one]) & ~(y.isnan() & together[one].isnan())).sum())
    return found


def errors(task: Task, case: Case, sizes: tuple[int, int], device: str) -> dict[str, float]:
    """Return the error of each result of a kernel."""
    m, real = case.rowmap(), task.dtype.is_floating_point
    rowmap = RowMap(m.rows.to(device), m.pairs.to(device), m.ends.to(device), m.capacity)
    run, inputs = probe(task, case, sizes, rowmap)
    narrow = {name: tensor.to(device, task.dtype if real else tensor.dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double() if real else tensor for name, tensor in narrow.items()}
    own = replace(TRITON, grouped_mm=native.grouped_mm) if task.kernel == "torch's grouped_mm" else TRITON
    if task.kernel == "direct_mlp":  # which has no gradient
        with torch.no_grad():
            error = relative_rms(run(own, **narrow), run(REFERENCE, **wide))
        return {"output": error, "bits that differ alone": bits_that_differ_alone(task, case, sizes, device)}
    got, wanted = (outcome(partial(run, k), given, task.dtype) for k, given in ((own, narrow), (REFERENCE, wide)))
    strange = [name for name in wanted if (got[name].dtype, got[name].shape) != (task.dtype, wanted[name].shape)]
    assert not strange, f"dtype or shape of {strange} in {case.name}"
    return {name: relative_rms(got[name], wanted[name]) for name in wanted}


def checked(task: Task, device: str, tiny: bool) -> list[Record]:
    """Check one task on every case."""
    torch.manual_seed(0)
    truncates = 2 if interpreted() and task.dtype == torch.bfloat16 else 1  # where a GPU rounds
    limit = truncates * TOLERANCE.get(task.dtype, 0.0)
    shapes = TINY if tiny else FEW if task.kernel == "direct_mlp" else MEDIUM
    cases = [(Case(str(s), zipf(s.tokens, s.experts, s.choices), s.experts), (s.width, s.hidden)) for s in shapes]
    sizes = (16, 40) if task.kernel == "torch's grouped_mm" else (10, 37)  # it takes multiples of 8 alone
    cases += [(case, sizes) for case in evil_cases() if len(case.expert_ids) < 1000 or not tiny]
    if task.kernel == "direct_mlp":  # for few tokens of which none is dropped
        cases = [(case, sizes) for case, sizes in cases if case.expert_ids.numel() <= 512]
        cases = [(case, sizes) for case, sizes in cases if case.capacity is None and case.max_pairs is None]
    records = []
    with poisoned_memory():
        for case, sizes in cases:
            found = errors(task, case, sizes, device)
            about = {"case": case.name, "errors": found, "error": max(found.values()), "tolerance": limit}
            records.append({**task.record(), **about, "passed": max(found.values()) <= limit})
    return records


def lost(task: Task, error: object) -> list[Record]:
    return [{**task.record(), "case": "all", "error": repr(error), "passed": False}]


def attempted(given: tuple[Task, str, bool]) -> list[Record]:
    """Check one task; one that breaks down fails as a whole."""
    try:
        return checked(*given)
    except Exception as error:  # noqa: BLE001  a kernel may fail in any way, and the others are still checked
        return lost(given[0], error)


def tasks_of(dtypes: tuple[str, ...]) -> list[Task]:
    """Return what to check: the layer's own kernel in the first dtype first, so that a cut run knows of it."""
    tasks = [Task(*each, getattr(torch, name)) for name in dtypes for each in KERNELS]
    tasks += [Task("positions", kind, "", torch.int64) for kind in ("plain", "prioritized")]
    return tasks + [Task(*each, torch.bfloat16) for each in TORCHS if "bfloat16" in dtypes]


def outcomes(tasks: list[Task], session: Session) -> Iterator[tuple[Task, list[Record]]]:
    """Yield what each task found while there is time: from processes that share the GPU, or from this one."""
    given = [(task, session.device, session.args.tiny) for task in tasks]
    if session.device == "cpu":
        yield from ((one[0], attempted(one)) for one in given if not session.late())
        return
    torch.cuda.empty_cache()
    with multiprocessing.get_context("spawn").Pool(session.args.workers, maxtasksperchild=1) as pool:
        waiting = {pool.apply_async(attempted, (one,)): one[0] for one in given}
        while waiting and not session.late():
            for done in [each for each in waiting if each.ready()]:
                yield waiting.pop(done), done.get()
            time.sleep(0.05)


def check_part(session: Session) -> bool:
    """Check every kernel, show what fails, tell whether nothing does. What there was no time for is named."""
    table, count = Table("kernel", "kind", "activation", "dtype", "case", "error", title="failures"), 0
    left = tasks_of(session.args.dtypes)
    for task, records in outcomes(left.copy(), session):
        left.remove(task)
        for record in records:
            session.write("check", record)
            count += 1
            if not record["passed"]:
                table.add_row(*map(str, task.record().values()), record["case"], str(record["error"]))
    for task in left:
        session.write("check", {**task.record(), "left_out": "no time is left"})
    if table.row_count:
        Console(width=200).print(table)
    print(f"{count - table.row_count} of {count} checks passed, {len(left)} tasks were left out")
    return not table.row_count
