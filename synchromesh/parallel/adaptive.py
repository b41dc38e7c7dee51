"""Adaptive: a strategy that asks a tuner. Every layer runs the plan that is best for its workload, and finds it itself.

Ranks must never run different plans in one forward, yet each sees its own tokens and its own clock. So a plan follows
from agreed numbers alone: between two steps all ranks take the maximum of what they saw (`Council`), and until they
have, a layer stays with what was agreed before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels import Kernels
from synchromesh.moe.capacity import Capacity
from synchromesh.moe.experts import Experts
from synchromesh.parallel.clock import Clock
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.parallel.wire import AS_IS, Wire
from synchromesh.planning.cluster import ClusterProfile, load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.search import Candidate, predicted, short_list
from synchromesh.planning.tuner import Tuner, bucket
from synchromesh.types import Plan, Routing, RowMap, Workload

SETTLED_EVERY = 16  # steps between two agreements of a model whose trials are over, unless its loop carries them
WATCH_EVERY = 4  # forwards between two that are timed, once trials are over
GPUS, CPUS = "h100_ndr", "cpu_gloo"  # shipped profiles
SKEW = 100  # parts of a power of two that skew is told in
CLEARLY = 0.75  # powers of two that skew must differ by to be another: it is noisy where tokens are few
REMEMBERED = 1024  # workloads, where tokens are of another number in every step
NUMBERS = 4  # of a layer in an agreement: tokens, skew, microseconds forward and backward


class Council:
    """Where the adaptive layers of one model agree with those of other ranks.

    Args:
        grid: the ranks.

    Without help it makes one small reduction of its own before a forward, at every step during trials and seldom
    after. A training loop that reduces something between its steps anyway spares it even that: it sends the numbers of
    `ask` along, takes their maximum over the ranks, and hands it to `tell`, at the same steps on all ranks.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._layers: list[Adaptive] = []
        self._carried = False
        self._ran: list[Adaptive] = []  # since the last step began
        self._steps = 0

    def join(self, layer: Adaptive) -> None:
        self._layers.append(layer)

    def ask(self) -> list[int]:
        """Return what this rank saw since the last agreement; all numbers are >= 0, `tell` wants their maxima."""
        self._carried = True
        return [number for layer in self._layers for number in layer.seen()]

    def tell(self, numbers: Sequence[int]) -> None:
        """Hand over the maxima over all ranks."""
        for index, layer in enumerate(self._layers):
            layer.agree(numbers[index * NUMBERS : (index + 1) * NUMBERS])

    def before_forward(self, layer: Adaptive) -> None:
        """Agree, where it is time to and nobody carries the numbers."""
        if self._carried:
            return
        if layer not in self._ran:
            self._ran.append(layer)
            return
        self._ran = [layer]  # it comes round again: a step is over
        self._steps += 1
        if all(layer.settled for layer in self._layers) and self._steps % SETTLED_EVERY:
            return
        numbers = [number for layer in self._layers for number in layer.seen()]
        gloo = dist.get_backend(self.grid.group) == "gloo"
        agreed = torch.tensor(numbers, device="cpu" if gloo else "cuda")
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.grid.group)
        self.tell(agreed.tolist())


@dataclass(frozen=True)
class Sample:
    """One timed forward: the workload it was taken for, its plan, its clock, and whether a backward is to follow."""

    work: Workload
    plan: Plan
    clock: Clock
    backward: bool


class Adaptive(Sharded):
    """Runs each step of a layer by the plan that is best for its workload.

    Args:
        grid: the ranks; see `Sharded`. On one rank there is one plan, and nothing is timed.
        council: shared by the layers of a model; None makes one for this layer.
        profile: of the cluster, for what to try first; None takes the shipped one that is most like this machine.
        kernels, wire: see `Sharded`.

    Attributes:
        tuner: what is known so far. record: (training forward, plan) wherever the plan changed.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        council: Council | None = None,
        profile: ClusterProfile | None = None,
        kernels: Kernels | None = None,
        wire: Wire = AS_IS,
    ) -> None:
        super().__init__(grid, kernels=kernels, wire=wire)
        self.council = Council(grid) if council is None else council
        self.council.join(self)
        self.tuner = Tuner(functools.partial(_candidates, ranks=grid.ranks, profile=profile))
        self.record: list[tuple[int, Plan]] = []
        self.forwards = 0  # of training
        self._calls = 0
        self._replay: list[tuple[int, Plan]] = []
        self._kinds: dict[Workload, Workload] = {}
        self._agreed: dict[Workload, Workload] = {}
        self._elsewhere: Workload | None = None  # a bucket seen once, not yet believed
        self._now: Workload | None = None  # the largest of its kind since the last agreement, as this rank sees it
        self._told = True
        self._sample: Sample | None = None
        self._clock: Clock | None = None  # of the forward that is about to run

    def replay(self, record: Sequence[tuple[int, Plan]]) -> None:
        """Run the training forwards by the plans of a record again: nothing is timed, numbers come out bit for bit."""
        self._replay = sorted(record, key=lambda entry: entry[0])

    @property
    def settled(self) -> bool:
        """Whether nothing is tried for the workload of the last forward."""
        if self.grid.size == 1 or self._replay or self._now is None:
            return True
        known = self._agreed.get(self._kind(self._now))
        return known is not None and self.tuner.settled(known)

    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        if self.grid.size == 1 or torch.compiler.is_compiling():  # in a compiled graph the plan is a constant
            return super().choose(workload, capacity)
        self.council.before_forward(self)
        plan, self._now, self._clock = self._choose(workload, capacity), self._largest(workload), None
        known = self._agreed.get(self._kind(workload))
        watched = self._calls % WATCH_EVERY == 0
        counts = torch.is_grad_enabled() or not workload.training  # else it is timed as neither
        if known is not None and counts and not self._replay and (watched or not self.tuner.settled(known)):
            self._clock = Clock()
            self._sample = Sample(known, plan, self._clock, workload.training)
        self._calls += 1
        if workload.training:
            if not self.record or self.record[-1][1] != plan:
                self.record.append((self.forwards, plan))
            self.forwards += 1
        return plan

    def _choose(self, workload: Workload, capacity: Capacity) -> Plan:
        plain = super().choose(workload, capacity)
        if self._replay and workload.training:
            return next((plan for first, plan in reversed(self._replay) if first <= self.forwards), plain)
        known = self._agreed.get(self._kind(workload))
        plan = plain if known is None else self.tuner.choose(known)
        return plain if self.refusal(plan, workload, capacity) else plan

    def _largest(self, work: Workload) -> Workload:
        same = self._now is not None and not self._told and self._kind(self._now) == self._kind(work)
        self._told = False
        return max(self._now, work, key=lambda one: one.rows) if self._now is not None and same else work

    def _kind(self, work: Workload) -> Workload:
        """Return what ranks know of a workload without agreeing."""
        if work not in self._kinds:
            if len(self._kinds) >= REMEMBERED:
                self._kinds.clear()
            self._kinds[work] = dataclasses.replace(bucket(work), rows=0, skew=0)
        return self._kinds[work]

    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        if self._clock is not None:
            self._clock.note(rowmap.ends)
        try:
            return super().run(x, routing, rowmap, experts, plan)
        finally:
            self._clock = None  # a recomputation is not timed

    def entering(self, x: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self._clock is None:
            return x, own
        x, *parts = self._clock.enter([x, *own.values()])
        return x, dict(zip(own, parts, strict=True))

    def leaving(self, y: Tensor) -> Tensor:
        return y if self._clock is None else self._clock.leave(y)

    def seen(self) -> list[int]:
        """Return this rank's numbers for an agreement, each 0 where there is nothing to say."""
        if self._now is None:
            return [0] * NUMBERS
        rows, sample, self._told = self._now.rows + 1, self._sample, True
        if sample is None or not sample.clock.ready(wait=not self.settled, backward=sample.backward):
            return [rows, 0, 0, 0]
        self._sample = dataclasses.replace(sample, clock=Clock())  # its numbers are told once
        forward, backward = sample.clock.seconds()
        return [rows, 1 + round(SKEW * _skew(sample.clock.noted())), round(forward * 1e6), round(backward * 1e6)]

    def agree(self, numbers: Sequence[int]) -> None:
        """Take what all ranks agreed on, in the order of `seen`."""
        rows, skew, forward, backward = numbers
        if self._now is None or not rows:
            return
        kind = self._kind(self._now)
        before = self._agreed.get(kind)
        old = before.skew if before else 0
        now = (skew - 1) / SKEW if skew else float(old)
        work = dataclasses.replace(kind, rows=rows - 1, skew=old if abs(now - old) < CLEARLY else round(now))
        if self._sample is not None and forward and bucket(work) == bucket(self._sample.work):
            self.tuner.observe(work, self._sample.plan, forward / 1e6, backward / 1e6)
        if before is None or bucket(work) in (bucket(before), self._elsewhere):
            self._agreed[kind], self._elsewhere = work, None  # the second of its kind: no mere last batch of an epoch
        else:
            self._elsewhere = bucket(work)


def _candidates(work: Workload, *, ranks: Ranks, profile: ClusterProfile | None) -> Sequence[Candidate]:
    """Return the short list of a workload."""
    if profile is None:
        profile = load_profile(GPUS if torch.cuda.is_available() else CPUS)
    known = profile if _dtype(work) in profile.matmul else _with_dtype(profile, _dtype(work))
    return short_list(predicted(work, ranks, known))


def _with_dtype(profile: ClusterProfile, dtype: str) -> ClusterProfile:
    """Let a dtype that a profile says nothing of be as fast as float32; the trials will tell."""
    return dataclasses.replace(profile, matmul={**profile.matmul, dtype: profile.rate_of("float32")})


def _dtype(work: Workload) -> str:
    return str(work.dtype).removeprefix("torch.")


def _skew(ends: list[int]) -> float:
    """Return the logarithm to base 2 of the largest over the mean number of rows of an expert."""
    counts = [end - start for start, end in pairwise([0, *ends])]
    return math.log2(max(counts) * len(counts) / ends[-1]) if ends[-1] else 0.0
