"""A Gluon kernel's own source, run on a CPU: its names mean what stands here, on a `Machine`, in place of Triton's.

Numerics are those of the kernel's arithmetic: operands as they are, products and sums in float32. Layouts, registers
and addresses in shared memory mean nothing here; what the compiler and the card make of a kernel is not tested so.
"""

from __future__ import annotations

import builtins
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from synchromesh.testing.gluon_machine import THREADS_PER_WARP, Barrier, Grid, Machine, ProtocolError, Shared
from synchromesh.testing.gluon_memory import Descriptor, Numbers, Pointer, Sums, TensorMemory, value_of


def run_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    programs: int,
    seed: int = 0,
    haste: float = 0.5,
    replaced: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Run every program of a kernel, all at once; return how often each number of each tensor was written.

    Args:
        kernel: made by gluon.jit.
        arguments: by name, as a launch takes them: tensors, TMA descriptors of them, numbers.
        programs: of the grid.
        seed: of the order of what happens at once.
        haste: as `Machine` takes it.
        replaced: functions of gluon.jit by name that the kernel calls instead of its own, to see it break.

    Raises:
        ProtocolError: the kernel breaks a rule of barriers or of memory.
    """
    given = {name: _argument(value) for name, value in arguments.items()}
    grid = Grid(seed)

    def run(program: int) -> None:
        machine = Machine(seed + program, haste=haste, between=lambda: grid.pause(program))
        with torch.no_grad():  # which a thread does not inherit
            _Language(machine, program, programs).emulated(kernel, dict(replaced or {}))(**given)

    grid.run([partial(run, program) for program in range(programs)])
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return {name: given[name].written.as_strided(value.shape, value.stride()) for name, value in tensors.items()}


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.to(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value.base.as_strided(list(value.shape), list(value.strides)), value.block_shape)
    return value


class _Language:
    """The names that kernels use, for one program."""

    def __init__(self, machine: Machine, program: int, programs: int) -> None:
        self.machine, self.own, self.known = machine, threading.local(), {}
        dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64")}
        both = {"minimum": _minimum, "maximum": _maximum, "where": _where, "zeros": _zeros, **dtypes}
        self.gl = SimpleNamespace(
            **both,
            load=lambda at, mask=None, other=0.0: at.load(mask, other),
            store=lambda at, value, mask=None: at.store(value_of(value), mask),
            arange=lambda start, end, layout: value_of(torch.arange(start, end), torch.int32),
            convert_layout=lambda value, layout: value,
            reshape=lambda value, shape: value.reshape(*shape),
            permute=lambda value, order: value.permute(*order),
            split=lambda value: value.unbind(-1),
            sum=lambda value, axis: value.sum(axis).to(value.dtype),
            full=lambda shape, value, dtype, layout: value_of(torch.full(tuple(shape), int(value), dtype=dtype)),
            num_warps=lambda: self.machine.current.warps,
            SliceLayout=lambda dim, parent: None,
            static_range=builtins.range,
            program_id=lambda axis: value_of(program, torch.int32),
            num_programs=lambda axis: value_of(programs, torch.int32),
            allocate_shared_memory=self._allocate,
            warp_specialize=self._specialize,
        )
        special = {"sigmoid": torch.sigmoid, "erf": torch.erf, "exp": torch.exp}
        self.tl = SimpleNamespace(
            **both,
            **special,
            static_assert=lambda *_: None,
            store=self.gl.store,
            num_programs=self.gl.num_programs,
            atomic_add=self._add,
        )
        self.tma = SimpleNamespace(async_copy_global_to_shared=self._tma, async_gather=self._gather)
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=self._init, expect=self._expect, arrive=self._arrive, wait=self._wait
        )
        self.async_copy = SimpleNamespace(async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_copied)
        self.plain = {
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._await_products,
            "allocate_tensor_memory": self._tensor_memory,
            "tcgen05_mma": self._multiply_into,
            "tcgen05_commit": self._commit,
            "fence_async_shared": self._fence,
            "range": _range,
        }

    def emulated(self, kernel: Any, replaced: dict[str, Any]) -> Callable[..., Any]:
        """Return a kernel's function with its names given the meaning they have here."""
        function = inspect.unwrap(kernel.fn)
        if function not in self.known:
            scope: dict[str, Any] = {"__builtins__": builtins.__dict__}
            self.known[function] = made = FunctionType(function.__code__, scope, argdefs=function.__defaults__)
            for name in (*_names(function), "range"):
                found = function.__globals__.get(name)
                own = self.emulated(replaced[name], {}) if name in replaced else self._meaning(name, found, replaced)
                scope[name] = own
            return made
        return self.known[function]

    def _meaning(self, name: str, found: Any, replaced: dict[str, Any]) -> Any:
        if name in self.plain:
            return self.plain[name]
        if name in ("gl", "tl", "tma", "mbarrier", "async_copy"):
            return getattr(self, name)
        if name.endswith("_layout"):
            return lambda *_: None
        if hasattr(found, "fn"):
            return self.emulated(found, replaced)
        if type(found).__name__ == "constexpr":
            return found.value
        return found if found is not None else builtins.__dict__.get(name)

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> Any:
        if dtype == torch.int64:
            return _Barriers(shape[0])
        if dtype == torch.int32:
            return Numbers(self.machine, shape[0])
        return Shared.allocated(shape, dtype)

    def _specialize(self, functions: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        runs = [lambda run=run, given=given: run(*given) for run, given in functions]
        self.machine.specialize(runs, [4, *warps], registers)

    def _init(self, barrier: Any, count: int) -> None:
        barrier.init(count)

    def _expect(self, barrier: Any, size: int) -> None:
        self.machine.pause()
        barrier.arrive(1, expected=size)

    def _arrive(self, barrier: Any, count: int = 1, pred: Any = True) -> None:
        self.machine.pause()
        if pred:
            barrier.arrive(count)

    def _wait(self, barrier: Any, phase: Any) -> None:
        self.machine.pause(lambda: barrier.passed(int(phase)))

    def _add(self, at: Pointer, number: int, sem: str) -> Tensor:
        self.machine.pause()
        return at.added(number)

    def _tma(self, descriptor: Descriptor, begin: Sequence[Any], barrier: Any, into: Shared) -> None:
        self._land(descriptor.block(begin), barrier, into)

    def _gather(self, descriptor: Descriptor, rows: Tensor, column: Any, barrier: Any, into: Shared) -> None:
        self._land(descriptor.rows(rows, column, descriptor.block_type.shape[1]), barrier, into)

    def _land(self, block: Tensor, barrier: Any, into: Shared) -> None:
        self.machine.pause()
        if list(block.shape) != into.shape:
            raise ProtocolError(f"TMA writes {list(block.shape)} to {into.shape}")
        into.begin_write()

        def land() -> None:
            into.end_write(block, time=0)
            barrier.landed(block.numel() * block.element_size())

        self.machine.later(land)

    def _copy(self, into: Shared, at: Pointer, mask: Any = None) -> None:
        self.machine.pause()
        block = at.load(mask)
        if list(block.shape) != into.shape:
            raise ProtocolError(f"threads write {list(block.shape)} to {into.shape}")
        into.begin_write()
        own = self.machine.current
        own.copies.append(self.machine.later(lambda: into.end_write(block, time=self.machine.time)))

    def _arrive_copied(self, barrier: Any, increment_count: bool) -> None:
        if increment_count:
            raise ProtocolError("the barrier's count holds the arrivals of the copies already")
        self.machine.pause()
        own = self.machine.current
        threads = own.warps * THREADS_PER_WARP
        self.machine.later(lambda: barrier.arrive(threads), after=own.copies)
        own.copies = []

    def _fence(self) -> None:
        if self.machine.partitions:  # before they begin there is nothing to order but barriers
            self.machine.current.fenced = self.machine.time

    def _multiply(self, left: Shared, right: Shared, sums: Tensor | Sums, is_async: bool) -> Sums:
        self.machine.pause()
        own = self.machine.current
        for block in (left, right):
            block.begin_read(fenced=own.fenced)
        sums = _sums(sums)
        total = sums.value

        def act() -> None:
            total.add_(left.data.float() @ right.data.float())
            for block in (left, right):
                block.readers -= 1

        event = self.machine.later(act, after=own.products[-1:])
        own.products.append(event)
        return Sums(total, (*sums.pending, event))

    def _tensor_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> TensorMemory:
        return TensorMemory(torch.full(tuple(shape), torch.nan, dtype=dtype), [[] for _ in range(shape[0])])

    def _multiply_into(self, left: Shared, right: Shared, sums: TensorMemory, use_acc: Any) -> None:
        self.machine.pause()
        own = self.machine.current
        for block in (left, right):
            block.begin_read(fenced=own.fenced)

        def act() -> None:
            before = sums.data if use_acc else 0.0
            sums.data.copy_(left.data.float() @ right.data.float() + before)
            for block in (left, right):
                block.readers -= 1

        event = self.machine.later(act, after=own.products[-1:])
        own.products.append(event)
        sums.events[0].append(event)

    def _commit(self, barrier: Any) -> None:
        self.machine.pause()
        own = self.machine.current  # what one thread commits, it arrives for in that order
        event = self.machine.later(lambda: barrier.arrive(1), after=[*own.products[-1:], *own.commits[-1:]])
        own.commits.append(event)

    def _await_products(self, num_outstanding: int, deps: Sequence[Any]) -> Any:
        own = self.machine.current
        due = own.products[: len(own.products) - num_outstanding]
        self.machine.pause(lambda: all(event.done for event in due))
        own.products = own.products[len(due) :]
        # A product that ended by chance was not waited for: its sums stay unreadable.
        found = [one if any(event in own.products for event in one.pending) else one.value for one in map(_sums, deps)]
        return found[0] if len(found) == 1 else tuple(found)


def _sums(given: Tensor | Sums) -> Sums:
    return given if isinstance(given, Sums) else Sums(given.clone())


class _Barriers:
    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, number: Any) -> Any:
        return self.each[int(number)]


def _names(function: FunctionType) -> Iterator[str]:
    yield from (name for name in function.__code__.co_names if name in function.__globals__)


def _range(*bounds: Any) -> Iterator[Tensor]:
    for number in builtins.range(*map(int, bounds)):
        yield value_of(number, torch.int32)


def _zeros(shape: Sequence[int], dtype: torch.dtype, layout: None = None) -> Tensor:
    return value_of(torch.zeros(tuple(shape), dtype=dtype))


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(*_pair(a, b))


def _maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(*_pair(a, b))


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), a, b)


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    kind = torch.promote_types(a.dtype, b.dtype) if a.dim() == b.dim() else (a if a.dim() else b).dtype
    return a.to(kind), b.to(kind)
