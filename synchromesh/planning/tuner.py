"""Tuner: the dictionary from workload to plan (Tutel paper, section 3.3), filled in by timing the training steps.

A new workload starts with the plan that the cost model likes best. Its short list is then tried in turn, one plan a
step, round after round, so that whatever slows the machine for a while slows all; plans that cannot win any more leave
the rounds. When the rounds are over the fastest is kept, until its time drifts from what it was. Every plan gives the
same result, so no step is wasted on a trial.

The tuner is a plain state machine: the same calls in the same order give the same plans, on every rank.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from synchromesh.planning.search import Candidate
from synchromesh.types import Plan, Workload

ROUNDS = 4  # trials of each plan; the first does not count, because it makes process groups and buffers
HOPELESSLY_SLOWER = 1.3  # times the fastest plan's time: a plan leaves the rounds; twice that after one counted trial
CLEARLY_FASTER = 0.95  # of the time of the plan in use: a plan must take less to replace it
DRIFT = 1.3  # factor, up or down, by which a window must differ from the usual time of a settled plan
MOST_PATIENCE = 16  # windows in a row that must differ, after trials that changed nothing have doubled the patience
WATCHED_STEPS = 4  # timed steps in a window, whose median is compared
REMEMBERED_WORKLOADS = 1024  # whose buckets are not computed again


@dataclass
class Trial:
    """What is known of one plan for one workload.

    Attributes:
        plan: the plan.
        predicted: seconds of a step, by the cost model.
        seconds: measured forward and backward, of each trial that counts.
        warm: whether it has run before.
        hopeless: whether it left the rounds.
    """

    plan: Plan
    predicted: float
    seconds: list[float] = field(default_factory=list)
    warm: bool = False
    hopeless: bool = False

    @property
    def median(self) -> float:
        """Seconds of a step; infinite before the first trial that counts."""
        return statistics.median(self.seconds) if self.seconds else math.inf


@dataclass
class Entry:
    """One workload of the dictionary.

    Attributes:
        trials: of the short list, in the order of the cost model.
        best: the plan in use.
        settled: whether the rounds are over.
        next: index of the trial whose turn it is.
        watched: seconds of the settled plan in this window.
        usual: the median of the first window; None before it. Times in the rounds do not serve: other plans ran in
            between.
        strikes: windows in a row that differed from the usual time.
        patience: how many strikes it takes to begin trials again.
        was: the plan before these trials; None in the first ones.
    """

    trials: list[Trial]
    best: Plan
    settled: bool = False
    next: int = 0
    watched: list[float] = field(default_factory=list)
    usual: float | None = None
    strikes: int = 0
    patience: int = 1
    was: Plan | None = None

    def trial(self, plan: Plan) -> Trial | None:
        return next((trial for trial in self.trials if trial.plan == plan), None)


class Tuner:
    """Chooses plans for the workloads of one layer.

    Args:
        candidates: the short list of a workload, the best predicted first.

    >>> import torch
    >>> plans = [Candidate(Plan(), 1.0), Candidate(Plan(gather=2), 2.0)]
    >>> work = Workload(8, 1, 4, 4, 2, torch.float32, training=True)
    >>> tuner = Tuner(lambda work: plans)
    >>> for _ in range(8):
    ...     plan = tuner.choose(work)
    ...     tuner.observe(work, plan, 0.1 / plan.gather, 0.2 / plan.gather)
    >>> tuner.settled(work), tuner.choose(work).gather
    (True, 2)
    """

    def __init__(self, candidates: Callable[[Workload], Sequence[Candidate]]) -> None:
        self._candidates = candidates
        self.entries: dict[Workload, Entry] = {}
        self._buckets: dict[Workload, Workload] = {}

    def choose(self, work: Workload) -> Plan:
        """Return the plan for the next step with a workload."""
        entry = self._entry(self._bucket(work))
        return entry.best if entry.settled else entry.trials[entry.next].plan

    def settled(self, work: Workload) -> bool:
        """Tell whether the trials for a workload are over."""
        entry = self.entries.get(self._bucket(work))
        return entry is not None and entry.settled

    def observe(self, work: Workload, plan: Plan, forward: float, backward: float) -> None:
        """Take note of the seconds of a step; all ranks are told the same."""
        entry, seconds = self._entry(self._bucket(work)), forward + backward
        trial = entry.trial(plan)
        if trial is None or seconds <= 0:
            return  # a plan that the caller chose
        if entry.settled:
            self._watch(entry, trial, seconds)
            return
        if trial.warm or len(entry.trials) == 1:
            trial.seconds.append(seconds)
        trial.warm = True
        self._move_on(entry)

    def _bucket(self, work: Workload) -> Workload:
        if work not in self._buckets:
            if len(self._buckets) >= REMEMBERED_WORKLOADS:
                self._buckets.clear()
            self._buckets[work] = bucket(work)
        return self._buckets[work]

    def _entry(self, work: Workload) -> Entry:
        if work not in self.entries:
            trials = [Trial(one.plan, one.seconds) for one in self._candidates(work)]
            self.entries[work] = Entry(trials, trials[0].plan, settled=len(trials) == 1)
        return self.entries[work]

    def _move_on(self, entry: Entry) -> None:
        """Give the turn to the next plan in the round, or settle."""
        fastest = min(trial.median for trial in entry.trials)
        for trial in entry.trials:
            limit = HOPELESSLY_SLOWER * fastest * (2 if len(trial.seconds) == 1 else 1)
            # By the shortest time: one stalled step decides nothing.
            trial.hopeless |= bool(trial.seconds) and min(trial.seconds) > limit
        left = [index for index, trial in enumerate(entry.trials) if not trial.hopeless]
        unfinished = [index for index in left if len(entry.trials[index].seconds) < ROUNDS - 1]
        if not unfinished or len(left) == 1:
            self._settle(entry)
            return
        # Round after round: the next plan is the first among those with the fewest runs, warm-ups included.
        fewest = min(len(entry.trials[i].seconds) + entry.trials[i].warm for i in unfinished)
        entry.next = next(i for i in unfinished if len(entry.trials[i].seconds) + entry.trials[i].warm == fewest)

    def _settle(self, entry: Entry) -> None:
        """Keep the fastest plan; the one in use stays where the other is not clearly faster."""
        fastest = min(entry.trials, key=lambda trial: trial.median)
        used = entry.trial(entry.best)
        if used is None or not used.seconds or fastest.median < CLEARLY_FASTER * used.median:
            entry.best = fastest.plan
        # Trials that end with the plan they began with changed nothing: the next ones wait for twice as many strikes.
        vain = entry.was == entry.best
        entry.patience = min(MOST_PATIENCE, 2 * entry.patience) if vain else 1
        entry.settled, entry.watched, entry.usual, entry.strikes = True, [], None, 0

    def _watch(self, entry: Entry, trial: Trial, seconds: float) -> None:
        """Begin trials again where the plan in use takes longer, or shorter, than usual for several windows."""
        if trial.plan != entry.best:
            return
        entry.watched.append(seconds)
        if len(entry.watched) < WATCHED_STEPS:
            return
        now, entry.watched = statistics.median(entry.watched), []
        if entry.usual is None:
            entry.usual = now
            return
        entry.strikes = 0 if entry.usual / DRIFT <= now <= entry.usual * DRIFT else entry.strikes + 1
        if entry.strikes >= entry.patience:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """Begin the rounds again, with the plan in use; plans stay warm, so every new trial counts."""
        for trial in entry.trials:
            trial.seconds, trial.hopeless = [], False
        entry.was, entry.usual, entry.strikes = entry.best, None, 0
        entry.settled = len(entry.trials) == 1
        entry.next = next(i for i, trial in enumerate(entry.trials) if trial.plan == entry.best)


def bucket(work: Workload) -> Workload:
    """Round a workload to one that stands for its like: rows and capacity to powers of the square root of two."""
    capacity = None if work.capacity is None else _rounded(work.capacity)
    return dataclasses.replace(work, rows=_rounded(work.rows), capacity=capacity)


def _rounded(number: int) -> int:
    # Twice the logarithm, rounded, counts half powers of two.
    return 0 if number < 1 else round(2 ** (round(2 * math.log2(number)) / 2))
