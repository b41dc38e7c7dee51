"""Verification: every legal plan on these ranks against the definition, outputs and all gradients.

The definition (docs/design.md): one process with all experts routes, drops and computes each rank's slice separately,
as that rank would, and minimises L = (1/W) sum_i loss_i. Expert gradients equal dL; input and unreduced router
gradients are W * dL. Every rank computes it alone, in plain torch, from the same seed; nothing is sent for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synchromesh.moe.capacity import Capacity, Dropless, FixedCapacity, NeededCapacity
from synchromesh.moe.experts import Cut, MLPExperts
from synchromesh.moe.layer import MoE
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.testing.compare import TOLERANCE, relative_rms
from synchromesh.types import Plan, Routing, RowMap, Workload

WIDTH, HIDDEN, RATE = 24, 48, 0.1  # divisible by every number of shards up to 8, and by 12
TOKENS = (7, 0, 5, 9, 1, 3, 12, 4)  # of the ranks in turn: uneven, and one has none

Pattern = Callable[[int, int, int, torch.Generator], Tensor]


def spread(tokens: int, experts: int, choices: int, generator: torch.Generator) -> Tensor:
    """Draw each token's different experts at random."""
    return torch.rand(tokens, experts, generator=generator).topk(choices, dim=1).indices


def first_empty(tokens: int, experts: int, choices: int, generator: torch.Generator) -> Tensor:
    """Leave expert 0 without tokens, where there are others."""
    ids = spread(tokens, experts, choices, generator)
    return torch.where(ids == 0, experts - 1, ids)


def all_to_one(tokens: int, experts: int, choices: int, generator: torch.Generator) -> Tensor:
    """Send everything to the last expert."""
    return torch.full((tokens, choices), experts - 1)


def some_absent(tokens: int, experts: int, choices: int, generator: torch.Generator) -> Tensor:
    """Leave every third pair out."""
    ids = spread(tokens, experts, choices, generator)
    return torch.where(torch.arange(tokens * choices).view(tokens, choices) % 3 == 0, -1, ids)


PATTERNS: tuple[Pattern, ...] = (spread, first_empty, all_to_one, some_absent)


@dataclass(frozen=True)
class Trial:
    """One layer, its tokens, and how it is run.

    Attributes:
        num_experts: E.
        choices: K.
        capacity: of the experts.
        tokens: of each rank.
        pattern: draws the experts of tokens.
        recomputed: whether it runs under activation checkpointing.
        dtype: of all tensors.
        device: of all tensors.
    """

    num_experts: int
    choices: int
    capacity: Capacity
    tokens: tuple[int, ...]
    pattern: Pattern
    recomputed: bool = False
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __str__(self) -> str:
        capacity = type(self.capacity).__name__
        again = ", recomputed" if self.recomputed else ""
        return f"E={self.num_experts} K={self.choices} {capacity} {self.pattern.__name__}{again}"


@dataclass(frozen=True)
class Finding:
    """How far a plan was from the definition.

    Attributes:
        plan: that ran.
        trial: that it ran in.
        worst: largest relative RMS error over all results and ranks.
        where: name of the result with that error.
        seconds: of forward and backward on the slowest rank.
    """

    plan: Plan
    trial: Trial
    worst: float
    where: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.worst <= TOLERANCE[self.trial.dtype]


def trials_for(world: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Trial]:
    """Return trials of fewer, as many and more experts than ranks, over all capacities, choices and patterns."""
    tokens = tuple(TOKENS[rank % len(TOKENS)] for rank in range(world))
    capacities = (Dropless(), FixedCapacity(1.0, tokens=max(tokens)), NeededCapacity())
    fewer = max((e for e in range(1, world) if world % e == 0), default=2)
    trials = []
    for experts in sorted({fewer, world, 2 * world, 1}):
        for number, capacity in enumerate(capacities):
            for turn, pattern in enumerate(PATTERNS):
                choices = (1, min(2, experts), min(3, experts))[(number + turn) % 3]
                trials.append(
                    Trial(experts, choices, capacity, tokens, pattern, (number + turn) % 2 == 1, dtype, device)
                )
    return trials


def verify(grid: Grid, trials: list[Trial], *, thorough: bool = True) -> Iterator[Finding]:
    """Run plans of each trial on the grid's ranks, one after the other on the same layer, and compare.

    Args:
        grid: the ranks; all of them call it.
        trials: what to run.
        thorough: every legal plan in every trial; else each plan once for each number of experts.
    """
    for trial, plans in _schedule(grid, trials, thorough=thorough):
        subject = _Subject(grid, trial)
        for plan in plans:
            yield subject.compare(plan)


def count_findings(grid: Grid, trials: list[Trial], *, thorough: bool = True) -> int:
    """Return how many findings `verify` makes."""
    return sum(len(plans) for _, plans in _schedule(grid, trials, thorough=thorough))


def _schedule(grid: Grid, trials: list[Trial], *, thorough: bool) -> Iterator[tuple[Trial, list[Plan]]]:
    """Yield each trial with the plans to run in it; where not thorough, plans take turns over the trials."""
    seen: set[tuple[int, Plan]] = set()
    for number, trial in enumerate(trials):
        legal = _legal(Sharded(grid), trial)
        if not thorough:
            # A third of the plans that are still to run in each trial, so that they meet different capacities and
            # patterns; the last trial with this number of experts takes all that are left.
            last = all(later.num_experts != trial.num_experts for later in trials[number + 1 :])
            legal = [plan for turn, plan in enumerate(legal) if last or (turn + number) % 3 == 0]
            legal = [plan for plan in legal if (trial.num_experts, plan) not in seen]
            seen |= {(trial.num_experts, plan) for plan in legal}
        yield trial, legal


class _PatternRouter(nn.Module):
    """Experts by pattern, weights by a learned gate."""

    def __init__(self, trial: Trial, rank: int, gate: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(100 + rank)
        self.ids = trial.pattern(trial.tokens[rank], trial.num_experts, trial.choices, generator).to(trial.device)
        self.gate = nn.Parameter(gate)
        self.num_experts, self.k = trial.num_experts, trial.choices

    def forward(self, x: Tensor, k: int | None = None) -> Routing:
        logits = x @ self.gate.T
        scores = logits.softmax(dim=1)
        return Routing(self.ids, scores.gather(1, self.ids.clamp(min=0)), scores, logits)


class _Subject:
    """A layer on the ranks of a grid, and what it must compute."""

    def __init__(self, grid: Grid, trial: Trial) -> None:
        self.grid, self.trial = grid, trial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            experts = MLPExperts(trial.num_experts, WIDTH, hidden=HIDDEN).to(trial.device, trial.dtype)
            gate = torch.randn(trial.num_experts, WIDTH).to(trial.device, trial.dtype)
            self.xs = [torch.randn(t, WIDTH).to(trial.device, trial.dtype) for t in trial.tokens]
            self.dys = [torch.randn(t, WIDTH).to(trial.device, trial.dtype) for t in trial.tokens]
        self.wanted = _defined(trial, experts, gate, self.xs, self.dys, grid)
        self.layer = MoE(
            _PatternRouter(trial, grid.rank, gate.clone()), experts, capacity=trial.capacity, strategy=Sharded(grid)
        )
        self.start = {name: p.detach().clone() for name, p in self.layer.named_parameters()}

    def compare(self, plan: Plan) -> Finding:
        got, seconds = self._run(plan)
        errors = {name: relative_rms(got[name], wanted) for name, wanted in self.wanted.items()}
        where, worst = max(errors.items(), key=lambda item: item[1])
        worst, where, seconds = _worst_of_ranks(self.grid, worst, where, seconds)
        return Finding(plan, self.trial, worst, where, seconds)

    def _run(self, plan: Plan) -> tuple[dict[str, Tensor], float]:
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(self.start[name])
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=RATE)
        optimizer.zero_grad()
        x = self.xs[self.grid.rank].clone().requires_grad_()
        started = time.perf_counter()
        run = self.layer if not self.trial.recomputed else _recomputing(self.layer)
        y = run(x, plan=plan)
        (y * self.dys[self.grid.rank]).sum().backward()
        seconds = time.perf_counter() - started
        grads = {f"gradient of {name}": _grad(p) for name, p in self.layer.named_parameters()}
        optimizer.step()
        after = {f"next {name}": p.detach() for name, p in self.layer.experts.named_parameters()}
        return {"output": y.detach(), "gradient of x": _grad(x), **grads, **after}, seconds


def _recomputing(layer: MoE) -> Callable[..., Any]:
    return lambda x, plan: checkpoint(layer, x, plan=plan, use_reentrant=False)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "a parameter got no gradient"
    return tensor.grad.clone()


def _legal(strategy: Sharded, trial: Trial) -> list[Plan]:
    workload = Workload(max(trial.tokens), trial.choices, WIDTH, HIDDEN, trial.num_experts, trial.dtype, True)
    return [plan for plan, reason in strategy.legal_plans(workload, trial.capacity).items() if reason is None]


def _defined(
    trial: Trial, experts: MLPExperts, gate: Tensor, xs: list[Tensor], dys: list[Tensor], grid: Grid
) -> dict[str, Tensor]:
    """Compute what this rank must get, all ranks' slices one after the other in this process."""
    cut = Cut(grid.rank, grid.size)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in experts.named_parameters()}
    routers = [_PatternRouter(trial, rank, gate.clone()) for rank in range(grid.size)]
    counts = [routers[rank](x).tokens_per_expert().max() for rank, x in enumerate(xs)]
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs, losses = [], []
    for router, x, dy in zip(routers, inputs, dys, strict=True):
        routing = router(x)
        rowmap = trial.capacity(routing, lambda _: torch.stack(counts).max())
        outputs.append(_dense(x, routing, rowmap, leaves))
        losses.append((outputs[-1] * dy).sum())
    mean = torch.stack(losses).mean()
    own_x, own_gate = inputs[grid.rank], routers[grid.rank].gate
    d_x, d_gate, *d_experts = torch.autograd.grad(mean, [own_x, own_gate, *leaves.values()], materialize_grads=True)
    wanted = {"output": outputs[grid.rank].detach()}
    wanted |= {"gradient of x": d_x * grid.size, "gradient of router.gate": d_gate * grid.size}
    held = _held(trial.num_experts, cut)
    for (name, leaf), grad in zip(leaves.items(), d_experts, strict=True):
        wanted[f"gradient of experts.{name}"] = held(grad)
        wanted[f"next {name}"] = held(leaf.detach() - RATE * grad)
    return wanted


def _held(num_experts: int, cut: Cut) -> Callable[[Tensor], Tensor]:
    """Return what cuts this rank's part out of a whole [E, ...]: the index-th of equal ranges of all experts' rows.

    Written without the library's own cuts, which it is to check.
    """
    leading = max(1, num_experts // cut.count)

    def part(whole: Tensor) -> Tensor:
        rows = whole.reshape(-1, *whole.shape[2:])
        size = len(rows) // cut.count
        return rows[cut.index * size : (cut.index + 1) * size].reshape(leading, -1, *whole.shape[2:])

    return part


def _dense(x: Tensor, routing: Routing, rowmap: RowMap, leaves: dict[str, Tensor]) -> Tensor:
    """y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t]) over the kept pairs, every expert on every token."""
    y = torch.zeros_like(x)
    for expert in range(routing.num_experts):
        hidden = nn.functional.gelu(x @ leaves["up"][expert].T + leaves["up_bias"][expert])
        chosen = (routing.expert_ids == expert) & (rowmap.rows >= 0)
        weight = torch.where(chosen, routing.weights, 0).sum(dim=1, keepdim=True)
        y = y + weight * (hidden @ leaves["down"][expert] + leaves["down_bias"][expert])
    return y


def _worst_of_ranks(grid: Grid, worst: float, where: str, seconds: float) -> tuple[float, str, float]:
    if grid.group is None:
        return worst, where, seconds
    found: list[Any] = [None] * grid.size
    dist.all_gather_object(found, (worst, where, seconds), group=grid.group)
    top = max(range(grid.size), key=lambda rank: found[rank][0])
    return found[top][0], f"{found[top][1]} on rank {top}", max(item[2] for item in found)


def as_json(finding: Finding) -> dict[str, object]:
    """Return a finding as plain values."""
    return {
        "plan": dataclasses.asdict(finding.plan),
        "trial": str(finding.trial),
        "dtype": str(finding.trial.dtype).removeprefix("torch."),
        "worst_error": finding.worst,
        "where": finding.where,
        "seconds": finding.seconds,
        "good": finding.good,
    }
