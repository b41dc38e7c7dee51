"""What a Gluon kernel runs on, in place of a GPU: partitions in turn, barriers, copies and products that end late.

Programs and their partitions run one at a time, and partitions change at every operation that others can see. What is
asynchronous on a GPU (TMA, cp.async, wgmma) waits in a list and happens later, when chance says so. A block of shared
memory knows what is in flight to it and who still reads it, so that a missing wait is an error, not a lucky result.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

THREADS_PER_WARP = 32
REGISTERS = 65536  # of a multiprocessor
SWITCHES = 0.1  # how often another program goes on, of the times that one might
WARPS_PER_GROUP = 4  # registers are handed from one group of warps to another


class ProtocolError(AssertionError):
    """A kernel that would read what is not there, overwrite what is still read, or wait for ever."""


class _Stopped(BaseException):
    """Raised inside partitions of a program that another one has broken."""


class Barrier:
    """An mbarrier: a phase is complete when all arrivals have come, and all bytes that were announced."""

    def __init__(self) -> None:
        self.count, self.pending, self.bytes, self.phase = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int, *, expected: int = 0) -> None:
        """Arrive, and announce bytes."""
        if self.pending < count:
            raise ProtocolError(f"{count} arrivals where {self.pending} of {self.count} are awaited")
        self.pending -= count
        self.bytes += expected
        self._completed()

    def landed(self, size: int) -> None:
        """Note bytes that have come; they may come before they are announced."""
        self.bytes -= size
        self._completed()

    def passed(self, phase: int) -> bool:
        """Tell whether the last phase of this parity is over."""
        return self.phase != phase

    def _completed(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


@dataclass
class Shared:
    """A part of shared memory.

    Attributes:
        data: its numbers; NaN until something lands there.
        absent: whether numbers are not there, or in flight.
        readers: products that have not read them yet.
        written: when threads wrote them, 0 where TMA did.
    """

    data: Tensor
    absent: Tensor
    readers: Tensor
    written: Tensor

    @staticmethod
    def allocated(shape: Sequence[int], dtype: torch.dtype) -> Shared:
        data = torch.full(tuple(shape), torch.nan, dtype=dtype)
        none = torch.zeros(tuple(shape), dtype=torch.int32)
        return Shared(data, torch.ones_like(data, dtype=torch.bool), none, none.clone())

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def _viewed(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(view(self.data), view(self.absent), view(self.readers), view(self.written))

    def index(self, number: Any) -> Shared:
        if not 0 <= int(number) < len(self.data):
            raise ProtocolError(f"block {int(number)} of {len(self.data)}")
        return self._viewed(lambda t: t[int(number)])

    def slice(self, start: int, length: int) -> Shared:
        return self._viewed(lambda t: t[start : start + length])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._viewed(lambda t: t.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._viewed(lambda t: t.permute(*order))

    def begin_write(self) -> None:
        """Take the block for a copy; its old numbers are lost from now on."""
        if self.readers.any():
            raise ProtocolError("a block is overwritten while a product still reads it")
        self.data.fill_(torch.nan)
        self.absent.fill_(True)

    def end_write(self, value: Tensor, *, time: int) -> None:
        self.data.copy_(value)
        self.absent.fill_(False)
        self.written.fill_(time)

    def begin_read(self, *, fenced: int) -> None:
        """Take the block for a product by a partition whose last fence was at a time."""
        if self.absent.any():
            raise ProtocolError("a product reads a block that has not arrived")
        if (self.written > fenced).any():
            raise ProtocolError("a product reads what threads wrote without a fence in between")
        self.readers += 1


@dataclass
class Event:
    """Something asynchronous: it may happen once `after` have."""

    act: Callable[[], None]
    after: Sequence[Event] = ()
    done: bool = False


@dataclass
class Partition:
    """Warps that run one function.

    Attributes:
        run: the function with its arguments.
        warps: of them.
        copies: by cp.async, that nobody was told of yet.
        products: begun and not waited for, oldest first.
        commits: arrivals that follow products.
        fenced: when it last fenced.
        condition: what it waits for.
        turn: released when it may run.
        result: what it broke with, if it did.
        over: whether it has returned.
    """

    run: Callable[[], None]
    warps: int
    copies: list[Event] = field(default_factory=list)
    products: list[Event] = field(default_factory=list)
    commits: list[Event] = field(default_factory=list)
    fenced: int = 0
    condition: Callable[[], bool] | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    result: Future[None] | None = None
    over: bool = False


class Grid:
    """Programs that run at once: one goes on at a time, and where it pauses chance says which one is next.

    Args:
        seed: of the order in which programs go on.
    """

    def __init__(self, seed: int) -> None:
        self.chance, self._back, self._stop = random.Random(seed), threading.Semaphore(0), False
        self._turns: list[threading.Semaphore] = []
        self._over = False

    def run(self, programs: Sequence[Callable[[], None]]) -> None:
        """Run all programs; raise what the first broken one breaks with."""
        self._turns = [threading.Semaphore(0) for _ in programs]
        with ThreadPoolExecutor(max(1, len(programs))) as threads:
            started = [threads.submit(self._body, *each) for each in enumerate(programs)]
            waiting = list(range(len(programs)))
            try:
                while waiting:
                    number = self.chance.choice(waiting)
                    self._turns[number].release()
                    self._back.acquire()
                    if self._over:
                        waiting.remove(number)
                        started[number].result()
            finally:
                self._stop = True
                for turn in self._turns:
                    turn.release()

    def pause(self, number: int) -> None:
        """Let a program stand still, now and then, while others go on."""
        if self.chance.random() < SWITCHES:
            self._hand_back(number, over=False)

    def _hand_back(self, number: int, *, over: bool) -> None:
        self._over = over
        self._back.release()
        if not over:
            self._turns[number].acquire()
            if self._stop:
                raise _Stopped

    def _body(self, number: int, program: Callable[[], None]) -> None:
        self._turns[number].acquire()
        try:
            if not self._stop:
                program()
        except _Stopped:
            pass
        finally:
            self._hand_back(number, over=True)


class Machine:
    """One program of a kernel on one multiprocessor.

    Args:
        seed: of the order in which partitions and events happen.
        haste: how likely an event that may happen happens before a partition goes on; 0 is as late as can be.
        between: called between two things that happen: others may go on there.
    """

    def __init__(self, seed: int, *, haste: float = 0.5, between: Callable[[], None] = lambda: None) -> None:
        self.chance, self.haste, self._between = random.Random(seed), haste, between
        self.time, self.events, self.partitions = 1, [], []
        self._back, self._stop = threading.Semaphore(0), False
        self._local = threading.local()

    @property
    def current(self) -> Partition:
        return self._local.partition

    def pause(self, condition: Callable[[], bool] | None = None) -> None:
        """Let others run, and go on when the condition holds."""
        own = self.current
        own.condition = condition
        self._back.release()
        own.turn.acquire()
        if self._stop:
            raise _Stopped
        own.condition = None

    def later(self, act: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        """Let something happen at some time from now on."""
        event = Event(act, after)
        self.events.append(event)
        return event

    def specialize(self, runs: Sequence[Callable[[], None]], warps: Sequence[int], registers: Sequence[int]) -> None:
        """Run partitions until all have returned. registers: of a thread of each but the first."""
        groups = [-(-count // WARPS_PER_GROUP) * WARPS_PER_GROUP for count in warps]
        taken = sum(group * THREADS_PER_WARP * count for group, count in zip(groups[1:], registers, strict=True))
        if taken >= REGISTERS:
            raise ProtocolError(f"the partitions want {taken} registers of {REGISTERS}")
        self.partitions = [Partition(run, count) for run, count in zip(runs, warps, strict=True)]
        with ThreadPoolExecutor(len(runs)) as threads:
            for own in self.partitions:
                own.result = threads.submit(self._body, own)
            try:
                while not all(own.over for own in self.partitions):
                    self._between()
                    self._step()
            finally:
                self._stop = True
                for own in self.partitions:
                    own.turn.release()
        self._settle()

    def _body(self, own: Partition) -> None:
        self._local.partition = own
        own.turn.acquire()
        try:
            if not self._stop:
                with torch.no_grad():  # which a thread does not inherit
                    own.run()
        except _Stopped:
            pass
        finally:
            own.over = True
            self._back.release()

    def _step(self) -> None:
        ready = [own for own in self.partitions if not own.over and (own.condition is None or own.condition())]
        events = [event for event in self.events if all(other.done for other in event.after)]
        if not ready and not events:
            raise ProtocolError("deadlock: every partition waits, and nothing is in flight")
        if events and (not ready or self.chance.random() < self.haste):
            self.happen(self.chance.choice(events))
            return
        own = self.chance.choice(ready)
        own.turn.release()
        self._back.acquire()
        if own.over and own.result is not None:
            own.result.result()  # raises what it broke with

    def happen(self, event: Event) -> None:
        self.time += 1
        self.events.remove(event)
        event.done = True
        event.act()

    def _settle(self) -> None:
        if self.events:
            raise ProtocolError(f"the program ends with {len(self.events)} copies or products in flight")
