"""`synchromesh verify`: every legal plan on these ranks and devices, against the definition."""

from __future__ import annotations

import dataclasses
import json as to_json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from synchromesh.commands.context import Context
from synchromesh.commands.verification import Finding, as_json, count_findings, trials_for, verify
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.types import Plan

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


ABOUT = """\
Run every legal parallel plan of a layer on these ranks and devices, and compare outputs and all gradients with the
definition, computed in one process.

  synchromesh verify --world 4 --ranks-per-node 2
  torchrun --nnodes 2 --nproc-per-node 8 ... -m -- synchromesh verify
"""


@dataclass(frozen=True)
class Request:
    """Options of `verify`.

    Attributes:
        world: ranks to start on this machine; under torchrun or SLURM, the job's ranks are taken.
        ranks_per_node: pretend that so many neighbours share a machine; the true number if not given.
        dtype: of all tensors; its tolerance is that of `synchromesh.testing.compare`.
        quick: each plan once, instead of in every trial.
        json: print one JSON object a line, one for each plan and trial.
    """

    world: int = 1
    ranks_per_node: int | None = None
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    quick: bool = False
    json: bool = False


def run(request: Request, context: Context) -> int:
    """Verify on some ranks; return 0 where all is equal, 1 where it is not.

    Raises:
        InputError: ranks_per_node does not divide the ranks.
    """
    return context.on_ranks(request.world, lambda own, grid: _verify(request, grid, own.console))


def _verify(request: Request, grid: Grid, console: Console) -> int:
    grid = _grid(request, grid)
    device = "cuda" if torch.cuda.is_available() and _backend(grid) == "nccl" else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    trials = trials_for(grid.size, dtype=DTYPES[request.dtype], device=device)
    total = count_findings(grid, trials, thorough=not request.quick)
    running: Iterable[Finding] = verify(grid, trials, thorough=not request.quick)
    if grid.rank == 0 and not request.json:
        running = track(running, f"{grid.nodes} nodes, {grid.size} ranks, {device}", total=total, console=console)
    findings = []
    for finding in running:
        findings.append(finding)
        if request.json:
            console.print(to_json.dumps(as_json(finding)), soft_wrap=True, highlight=False, markup=False)
    bad = [finding for finding in findings if not finding.good]
    if not request.json:
        _show(console, grid, findings, bad)
    return 1 if bad else 0


def _grid(request: Request, grid: Grid) -> Grid:
    if request.ranks_per_node is None:
        return grid
    try:
        return Grid(grid.group, ranks_per_node=request.ranks_per_node)
    except ValueError as error:
        raise InputError(str(error)) from error


def _backend(grid: Grid) -> str:
    return "none" if grid.group is None else dist.get_backend(grid.group)


def _show(console: Console, grid: Grid, findings: list[Finding], bad: list[Finding]) -> None:
    by_plan: dict[Plan, list[Finding]] = {}
    for finding in findings:
        by_plan.setdefault(finding.plan, []).append(finding)
    title = f"plans on {grid.nodes} nodes of {grid.ranks_per_node} ranks"
    table = Table("plan", "trials", "worst error", "milliseconds", title=title, title_justify="left")
    for plan, own in sorted(by_plan.items(), key=lambda item: dataclasses.astuple(item[0])):
        worst = max(finding.worst for finding in own)
        milliseconds = statistics.median(finding.seconds for finding in own) * 1e3
        style = None if all(finding.good for finding in own) else "red"
        table.add_row(str(plan), str(len(own)), f"{worst:.1e}", f"{milliseconds:.1f}", style=style)
    console.print(table)
    for finding in bad[:10]:
        text = f"{finding.plan} differs in {finding.where} by {finding.worst:.1e} at {finding.trial}"
        console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
    good = len(findings) - len(bad)
    console.print(f"{good} of {len(findings)} results equal the definition", style="red" if bad else "green")
