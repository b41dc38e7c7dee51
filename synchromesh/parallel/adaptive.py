"""Adaptive: every layer runs the plan that is best for its workload, and finds it by itself.

`Tuned` chooses, from what ranks agreed on alone (`planning.agreement`); `Council` is where they agree, between two
steps, for all layers of a model at once.
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

from synchromesh.kernels import Kernels
from synchromesh.parallel.chooser import Chooser, Refusal
from synchromesh.parallel.clock import UNTIMED, Clock
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.parallel.wire import AS_IS, Wire
from synchromesh.planning.agreement import NUMBERS_PER_LAYER, Agreement, Timed
from synchromesh.planning.cluster import ClusterProfile, load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.search import Candidate, predicted, short_list
from synchromesh.planning.tuner import Tuner, bucket
from synchromesh.types import Plan, Workload

SETTLED_EVERY = 16  # steps between two agreements of a model whose trials are over, unless its loop carries them
WATCH_EVERY = 4  # forwards between two that are timed, once trials are over
GPUS, CPUS = "h100_ndr", "cpu_gloo"  # shipped profiles


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
        self._layers: list[Tuned] = []
        self._carried = False
        self._ran: list[Tuned] = []  # since the last step began
        self._steps = 0

    def join(self, layer: Tuned) -> None:
        self._layers.append(layer)

    def ask(self) -> list[int]:
        """Return what this rank saw since the last agreement; all numbers are >= 0, `tell` wants their maxima."""
        self._carried = True
        return [number for layer in self._layers for number in layer.numbers()]

    def tell(self, numbers: Sequence[int]) -> None:
        """Hand over the maxima over all ranks."""
        for index, layer in enumerate(self._layers):
            layer.agree(numbers[index * NUMBERS_PER_LAYER : (index + 1) * NUMBERS_PER_LAYER])

    def before_forward(self, layer: Tuned) -> None:
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
        numbers = [number for layer in self._layers for number in layer.numbers()]
        gloo = dist.get_backend(self.grid.group) == "gloo"
        agreed = torch.tensor(numbers, device="cpu" if gloo else "cuda")
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.grid.group)
        self.tell(agreed.tolist())


@dataclass(frozen=True)
class Sample:
    """One timed forward.

    Attributes:
        work: what ranks had agreed on when it ran.
        plan: by which it ran.
        clock: that timed it.
        backward: whether a backward is to follow.
    """

    work: Workload
    plan: Plan
    clock: Clock
    backward: bool


class Tuned(Chooser):
    """Chooses by a tuner: tries the plans that a cost model puts first, and keeps the fastest for each workload.

    Args:
        grid: the ranks.
        council: shared by the layers of a model; None makes one for this layer.
        profile: of the cluster, for what to try first; None takes the shipped one that is most like this machine.

    Attributes:
        tuner: what is known so far.
        record: (training forward, plan) wherever the plan changed.
        forwards: number of training forwards so far.
    """

    def __init__(self, grid: Grid, *, council: Council | None = None, profile: ClusterProfile | None = None) -> None:
        self.grid = grid
        self.council = Council(grid) if council is None else council
        self.council.join(self)
        self.tuner = Tuner(functools.partial(_candidates, ranks=grid.ranks, profile=profile))
        self.record: list[tuple[int, Plan]] = []
        self.forwards = 0
        self._agreement = Agreement()
        self._calls = 0
        self._replay: list[tuple[int, Plan]] = []
        self._sample: Sample | None = None  # the last forward that was timed
        self._next: Sample | None = None  # the forward that is about to run, where it is to be timed

    def replay(self, record: Sequence[tuple[int, Plan]]) -> None:
        """Run the training forwards by the plans of a record again: nothing is timed, numbers come out bit for bit."""
        self._replay = sorted(record, key=lambda entry: entry[0])

    @property
    def settled(self) -> bool:
        """Whether nothing is tried for the workload of the last forward."""
        if self.grid.size == 1 or self._replay or self._agreement.idle:
            return True
        current = self._agreement.current
        return current is not None and self.tuner.settled(current)

    def choose(self, workload: Workload, usual: Plan, refusal: Refusal) -> Plan:
        self.council.before_forward(self)
        plan = self._plan(workload, usual)
        plan = usual if refusal(plan) else plan
        self._agreement.see(workload)
        self._next = self._to_be_timed(workload, plan)
        self._sample = self._next or self._sample
        if workload.training:
            if not self.record or self.record[-1][1] != plan:
                self.record.append((self.forwards, plan))
            self.forwards += 1
        return plan

    def take_clock(self, plan: Plan) -> Clock:
        sample, self._next = self._next, None  # a recomputation finds none
        return UNTIMED if sample is None or sample.plan != plan else sample.clock

    def numbers(self) -> list[int]:
        """Return this rank's numbers for an agreement."""
        sample = self._sample
        if sample is None or not sample.clock.ready(wait=not self.settled, backward=sample.backward):
            return self._agreement.numbers(None)
        self._sample = dataclasses.replace(sample, clock=Clock())  # its times are told once
        return self._agreement.numbers(Timed(_skew(sample.clock.noted()), *sample.clock.seconds()))

    def agree(self, maxima: Sequence[int]) -> None:
        """Take the maxima of the numbers over all ranks."""
        agreed, sample = self._agreement.agree(maxima), self._sample
        if agreed is not None and sample is not None and agreed.forward and bucket(agreed.work) == bucket(sample.work):
            self.tuner.observe(agreed.work, sample.plan, agreed.forward, agreed.backward)

    def _plan(self, workload: Workload, usual: Plan) -> Plan:
        if self._replay and workload.training:
            return next((plan for first, plan in reversed(self._replay) if first <= self.forwards), usual)
        known = self._agreement.known(workload)
        return usual if known is None else self.tuner.choose(known)

    def _to_be_timed(self, workload: Workload, plan: Plan) -> Sample | None:
        """Time every forward during trials, every few after them; none that is neither training nor evaluation."""
        watched, known = self._calls % WATCH_EVERY == 0, self._agreement.known(workload)
        self._calls += 1
        plain = torch.is_grad_enabled() or not workload.training
        if known is None or not plain or self._replay or (self.tuner.settled(known) and not watched):
            return None
        return Sample(known, plan, Clock(), workload.training)


class Adaptive(Sharded):
    """Runs each step of a layer by the plan that is best for its workload: `Sharded(grid, chooser=Tuned(grid))`.

    Args:
        grid: the ranks; see `Sharded`. On one rank there is one plan, and nothing is timed.
        council: see `Tuned`.
        profile: see `Tuned`.
        kernels: see `Sharded`.
        wire: see `Sharded`.

    Attributes:
        chooser: where what follows lives.
    """

    chooser: Tuned

    def __init__(
        self,
        grid: Grid,
        *,
        council: Council | None = None,
        profile: ClusterProfile | None = None,
        kernels: Kernels | None = None,
        wire: Wire = AS_IS,
    ) -> None:
        super().__init__(grid, chooser=Tuned(grid, council=council, profile=profile), kernels=kernels, wire=wire)

    @property
    def council(self) -> Council:
        """Where this layer agrees with those of other ranks."""
        return self.chooser.council

    @property
    def tuner(self) -> Tuner:
        """What is known so far."""
        return self.chooser.tuner

    @property
    def record(self) -> list[tuple[int, Plan]]:
        """(training forward, plan) wherever the plan changed."""
        return self.chooser.record

    @property
    def forwards(self) -> int:
        """The number of training forwards so far."""
        return self.chooser.forwards

    @property
    def settled(self) -> bool:
        """Whether nothing is tried for the workload of the last forward."""
        return self.chooser.settled

    def replay(self, record: Sequence[tuple[int, Plan]]) -> None:
        """Run the training forwards by the plans of a record again: see `Tuned.replay`."""
        self.chooser.replay(record)


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
