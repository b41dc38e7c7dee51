"""What a Gluon kernel's names for memory mean on a CPU: global, shared and tensor memory, and values in registers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from synchromesh.testing.gluon_machine import Event, Machine, ProtocolError


class Value(Tensor):
    """A number or a block of them: unlike a tensor it never changes, `x += y` makes another."""

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __imul__(self, other: Any) -> Any:
        return self * other


def value_of(given: Any, dtype: torch.dtype | None = None) -> Value:
    """Return a number or a tensor as a value."""
    return torch.as_tensor(given, dtype=dtype).as_subclass(Value)


class Pointer:
    """Addresses in the memory of a tensor, as `tensor + offsets`; every access must lie inside.

    Args:
        memory: one number after the other.
        offset: into it, one or many.
        written: how often each number was written.
    """

    def __init__(self, memory: Tensor, offset: Any, written: Tensor) -> None:
        self.memory, self.offset, self.written = memory, offset, written
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @staticmethod
    def to(tensor: Tensor) -> Pointer:
        """Return the address of a tensor's first number."""
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        memory = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))
        return Pointer(memory, 0, torch.zeros(len(memory), dtype=torch.int32))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.written)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def added(self, number: Any) -> Tensor:
        """Add to the number that lies here, at once; return it as it was."""
        before = self.load()
        self.store(before + number)
        return before

    def _at(self, mask: Any, shape: torch.Size) -> Tensor:
        at = torch.as_tensor(self.offset).expand(shape)[mask]
        if at.numel() and (int(at.min()) < 0 or int(at.max()) >= len(self.memory)):
            raise ProtocolError(f"addresses {int(at.min())} .. {int(at.max())} of {len(self.memory)} numbers")
        return at.long()

    def load(self, mask: Any = None, other: Any = 0.0) -> Tensor:
        mask, shape = _masked(mask, self.offset)
        found = torch.full(shape, other, dtype=self.memory.dtype)
        found[mask] = self.memory[self._at(mask, shape)]
        return value_of(found)

    def store(self, value: Tensor, mask: Any = None) -> None:
        mask, shape = _masked(mask, self.offset)
        at = self._at(mask, shape)
        self.memory[at] = value.expand(shape)[mask].to(self.memory.dtype)
        self.written[at] += 1


class Descriptor:
    """A TMA descriptor: blocks of a matrix, zeros where they reach outside."""

    def __init__(self, tensor: Tensor, block: Sequence[int]) -> None:
        """Raises ProtocolError where TMA cannot read the tensor."""
        steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
        if tensor.stride(-1) != 1 or any(step % 16 for step in steps):
            raise ProtocolError(f"TMA takes rows without gaps, and steps of 16 bytes, not {tensor.stride()}")
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        size = tensor.element_size() * int(torch.tensor(block).prod())
        self.block_type = SimpleNamespace(shape=list(block), nbytes=size)

    def block(self, begin: Sequence[Any]) -> Tensor:
        found = torch.zeros(self.block_type.shape, dtype=self.dtype)
        inside = self.tensor
        for dim, (start, size) in enumerate(zip(map(int, begin), found.shape, strict=True)):
            inside = inside.narrow(dim, min(start, inside.shape[dim]), max(0, min(size, inside.shape[dim] - start)))
        found[tuple(slice(0, size) for size in inside.shape)] = inside
        return found

    def rows(self, numbers: Tensor, column: Any, width: int) -> Tensor:
        """Return single rows from a column on, side by side; those outside of the matrix are zeros."""
        found, begin = torch.zeros(len(numbers), width, dtype=self.dtype), int(column)
        inside = self.tensor[:, begin : begin + width]
        own = (numbers >= 0) & (numbers < len(inside))
        found[own, : inside.shape[1]] = inside[numbers[own].long()]
        return found


class Sums:
    """What wgmma adds up: numbers once every product has been waited for."""

    def __init__(self, value: Tensor, pending: tuple[Event, ...] = ()) -> None:
        self.value, self.pending = value, pending

    def __getattr__(self, name: str) -> Any:
        raise ProtocolError(f"sums are used (.{name}) before their products were waited for")


class TensorMemory:
    """Sums in tensor memory: a tile's may be read once every product into it is over."""

    def __init__(self, data: Tensor, events: list[list[Event]]) -> None:
        self.data, self.events = data, events

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, number: Any) -> TensorMemory:
        return TensorMemory(self.data[int(number)], [self.events[int(number)]])

    def slice(self, start: int, length: int) -> TensorMemory:
        return TensorMemory(self.data[..., start : start + length], self.events)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> TensorMemory:
        """Return the same columns as more tiles of fewer columns."""
        many = shape[0] // len(self.data)
        parts = self.data.unflatten(-1, (many, shape[-1])).movedim(-2, 1).flatten(0, 1)
        return TensorMemory(parts, [events for events in self.events for _ in range(many)])

    def load(self, layout: None) -> Value:
        if not all(event.done for events in self.events for event in events):
            raise ProtocolError("sums in tensor memory are read before their products are over")
        return value_of(self.data.clone())


class Numbers:
    """Numbers in shared memory that threads write and read, one by one; none is there at first."""

    def __init__(self, machine: Machine, count: int) -> None:
        self.machine = machine
        self.each: list[int | None] = [None] * count

    def index(self, number: Any) -> Number:
        return Number(self, int(number))


class Number:
    """One of them."""

    def __init__(self, numbers: Numbers, place: int) -> None:
        self.numbers, self.place = numbers, place

    def load(self, layout: None) -> Tensor:
        self.numbers.machine.pause()
        found = self.numbers.each[self.place]
        if found is None:
            raise ProtocolError("a number is read that nobody has written")
        return value_of([found], torch.int32)

    def store(self, value: Tensor) -> None:
        self.numbers.machine.pause()
        self.numbers.each[self.place] = int(value)


def _masked(mask: Any, offset: Any) -> tuple[Tensor, torch.Size]:
    offset = torch.as_tensor(offset)
    mask = torch.tensor(True) if mask is None else torch.as_tensor(mask)
    shape = torch.broadcast_shapes(mask.shape, offset.shape)
    return mask.expand(shape), shape
