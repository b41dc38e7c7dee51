"""`synchromesh verify`: every legal plan on these ranks and devices, against the definition."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from synchromesh.commands.verification import Finding, as_json, count_findings, trials_for, verify
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.types import Plan

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify.

    Attributes:
        ranks_per_node: as if so many neighbours shared a machine; None takes the truth.
        dtype: of all tensors; its tolerance is that of `synchromesh.testing.compare`.
        quick: each plan once, not in every trial. as_json: one JSON object a line, one for each plan and trial.
    """

    ranks_per_node: int | None = None
    dtype: torch.dtype = torch.float64
    quick: bool = False
    as_json: bool = False


def run_verify(request: VerifyRequest, grid: Grid, *, console: Console) -> int:
    """Verify on the ranks of this job; return 0 where all is equal, 1 where it is not.

    Raises:
        InputError: ranks_per_node does not divide the ranks.
    """
    grid = _grid(request, grid)
    device = "cuda" if torch.cuda.is_available() and _backend(grid) == "nccl" else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    trials = trials_for(grid.size, dtype=request.dtype, device=device)
    total = count_findings(grid, trials, thorough=not request.quick)
    shown = console if grid.rank == 0 else Console(quiet=True)
    running: Iterable[Finding] = verify(grid, trials, thorough=not request.quick)
    if grid.rank == 0 and not request.as_json:
        running = track(running, f"{grid.nodes} nodes, {grid.size} ranks, {device}", total=total, console=console)
    findings = []
    for finding in running:
        findings.append(finding)
        if request.as_json:
            shown.print(json.dumps(as_json(finding)), soft_wrap=True, highlight=False, markup=False)
    bad = [finding for finding in findings if not finding.good]
    if not request.as_json:
        _show(shown, grid, findings, bad)
    return 1 if bad else 0


def _grid(request: VerifyRequest, grid: Grid) -> Grid:
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
