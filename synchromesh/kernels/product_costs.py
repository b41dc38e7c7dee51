"""What products of matrices cost a CPU, measured; by it the ways of multiplying many experts are chosen."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from synchromesh.errors import InputError, parsed_json

FILE = "product_costs.json"
NOISE = 1.25  # times the other's seconds: what timings of equal work differ by on a busy machine
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cost:
    """Seconds of a product [n, I] x [I, O] of one or more experts: call + experts * I * O * (number + n * row).

    Attributes:
        call: of a call, whatever it multiplies.
        number: for each number of a matrix, to read it.
        row: for each number of a matrix and row.
    """

    call: float
    number: float
    row: float

    def __post_init__(self) -> None:
        for name in ("call", "number", "row"):
            got = getattr(self, name)
            if not 0 <= got < math.inf:
                raise ValueError(f"Cost.{name} is {got}, wanted finite seconds >= 0")

    def seconds(self, *, experts: int, rows: int, numbers: int) -> float:
        """Return the seconds for so many experts, rows of each and numbers of each one's matrix.

        >>> Cost(call=10.0, number=0.5, row=0.25).seconds(experts=2, rows=4, numbers=3)
        19.0
        """
        return self.call + experts * numbers * (self.number + rows * self.row)


@dataclass(frozen=True)
class ProductCosts:
    """The ways of multiplying in one dtype.

    Attributes:
        alone: an expert by a product of its own.
        batched: neighbours with equally many rows in one call.
        onednn: an expert by oneDNN, where torch itself takes another library; None where that gains nothing.
    """

    alone: Cost
    batched: Cost
    onednn: Cost | None = None

    def prefers_onednn(self, *, rows: int, rest: int, instead: int, numbers: int) -> bool:
        """Tell whether an expert's rows by oneDNN and a rest of them by torch take less time than torch takes.

        Args:
            rows: that oneDNN multiplies, padding among them.
            rest: that torch multiplies.
            instead: that torch would multiply by itself.
            numbers: of the expert's matrix.
        """
        if self.onednn is None or not rows:
            return False
        seconds = self.onednn.seconds(experts=1, rows=rows, numbers=numbers)
        if rest:
            seconds += self.alone.seconds(experts=1, rows=rest, numbers=numbers)
        return seconds < self.alone.seconds(experts=1, rows=instead, numbers=numbers)

    def batches(self, *, rows: int, numbers: int) -> bool:
        """Tell whether one call for two experts costs no more than two calls, or hardly more than can be measured."""
        ways = (self.alone,) if self.onednn is None else (self.alone, self.onednn)
        alone = 2 * min(way.seconds(experts=1, rows=rows, numbers=numbers) for way in ways)
        return self.batched.seconds(experts=2, rows=rows, numbers=numbers) <= NOISE * alone

    def joins(self, *, experts: int, rows: int, skipped: int, count: int, numbers: int) -> bool:
        """Tell whether a batch takes in a further expert: the call that it saves costs more than what it adds.

        Args:
            experts: of the batch.
            rows: of each.
            skipped: experts without rows between the batch and the further one, which it would read.
            count: rows of the further one; all get places for the most.
            numbers: of an expert's matrix.
        """
        most, cost = max(rows, count), self.alone
        places = (experts + skipped + 1) * most - experts * rows - count
        added = numbers * (skipped * cost.number + places * cost.row)
        saved = 2 * cost.call - self.batched.call if experts == 1 else cost.call
        return added <= saved and self.batches(rows=most, numbers=numbers)


@dataclass(frozen=True)
class Machine:
    """One CPU.

    Attributes:
        cpu: its model.
        threads: that torch computes with.
        torch: version of PyTorch.
        products: by dtype, such as "bfloat16".
    """

    cpu: str
    threads: int
    torch: str
    products: Mapping[str, ProductCosts]


@dataclass(frozen=True)
class Machines:
    """What was measured; the nearest stands for others.

    Attributes:
        measured: the first one stands for CPUs of unknown models.
    """

    measured: tuple[Machine, ...]

    def costs(self, cpu: str, threads: int, dtype: torch.dtype, *, wide: bool = True) -> ProductCosts:
        """Return the costs of a CPU, by the machine that is nearest to it.

        Which library is the faster one depends on how wide the units of a CPU's family compute: of families that nobody
        has measured, torch's own multiplies. A dtype that was not measured costs what float32 does where it has as
        many bytes or more, and is multiplied expert by expert where it has less: torch has no fast batched product of
        every short one.

        Args:
            cpu: its model.
            threads: that torch computes with.
            dtype: of the products.
            wide: whether the CPU has vectors of 512 bits, as those that were measured have.
        """
        machine = self.nearest(cpu, threads)
        own = machine.cpu == cpu or (wide and _family(machine.cpu) == _family(cpu))
        name = str(dtype).removeprefix("torch.")
        costs = machine.products.get(name, machine.products["float32"])
        if not own or name not in machine.products:
            costs = dataclasses.replace(costs, onednn=None)
        if name not in machine.products and dtype.itemsize < torch.float32.itemsize:
            return ProductCosts(costs.alone, dataclasses.replace(costs.alone, call=3 * costs.alone.call))
        return costs

    def nearest(self, cpu: str, threads: int) -> Machine:
        """Return what was measured of a CPU, else of one of its family, else of the first, nearest in threads."""
        family, first = _family(cpu), self.measured[0].cpu

        def distance(one: Machine) -> tuple[bool, bool, bool, float]:
            return one.cpu != cpu, _family(one.cpu) != family, one.cpu != first, abs(math.log2(one.threads / threads))

        return min(self.measured, key=distance)

    def with_machines(self, others: Iterable[Machine]) -> Machines:
        """Return these and others, in place of those of the same CPU and number of threads."""
        found = {(machine.cpu, machine.threads): machine for machine in (*self.measured, *others)}
        return Machines(tuple(found.values()))

    def to_json(self) -> str:
        """Return the table as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Machines:
        """Read what `to_json` wrote. Raises InputError that names what is missing, unknown or no number."""
        found = parsed_json(text, "a table of product costs")
        try:
            machines = tuple(map(_machine, _fields(found, {"measured": list})["measured"]))
        except ValueError as error:
            raise InputError(f"this is no table of product costs: {error}") from error
        if not machines:
            raise InputError("this is no table of product costs: it is empty")
        return Machines(machines)


def shipped() -> Machines:
    """Return the table that comes with the package."""
    return Machines.from_json(resources.files("synchromesh.kernels").joinpath(FILE).read_text())


def own_file() -> Path:
    """Return where `synchromesh profile` keeps what it measured on this user's machines."""
    return Path.home() / ".cache" / "synchromesh" / FILE


def known(file: Path) -> Machines:
    """Return the shipped table and what a file adds to it, where it exists.

    Raises:
        InputError: the file holds no table; it says how to make it anew.
    """
    if not file.is_file():
        return shipped()
    try:
        return shipped().with_machines(Machines.from_json(file.read_text("utf-8", "replace")).measured)
    except InputError as error:
        raise InputError(f"{file}: {error}; delete it, or measure again by `synchromesh profile`") from error


@functools.cache
def here() -> Machines:
    """Return what is known to this process: read once."""
    return known(own_file())


@functools.cache
def costs_here(threads: int, dtype: torch.dtype) -> ProductCosts:
    """Return the costs on this machine."""
    return here().costs(cpu_model(), threads, dtype, wide=has_wide_vectors())


def has_wide_vectors() -> bool:
    """Tell whether this CPU has vectors of 512 bits, and torch may use them."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def cpu_model() -> str:
    """Return this CPU's model: its name, family and model number, as Linux says it; elsewhere what Python knows."""
    if not CPU_INFO.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in CPU_INFO.read_text().split("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    parts = [said.get("model name", platform.machine())]
    parts += [f"{name} {said[name]}" for name in ("cpu family", "model") if name in said]
    return ", ".join(parts)


def _family(cpu: str) -> tuple[str, ...]:
    """Return a CPU's maker and family, of what `cpu_model` says."""
    name, *about = cpu.split(", ")
    return (*name.split()[:1], *(part for part in about if part.startswith("cpu family")))


def _fields(found: Any, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the fields that are found, if they are those of these names and kinds. Raises ValueError."""
    if not isinstance(found, dict) or set(found) != set(kinds):
        raise ValueError(f"wanted the fields {sorted(kinds)}, got {str(found)[:80]}")
    for name, kind in kinds.items():
        if type(found[name]) is not kind:  # isinstance would take True for an int
            raise ValueError(f"{name} is {str(found[name])[:80]}, wanted of {kind.__name__}")
    return found


def _machine(found: Any) -> Machine:
    about = _fields(found, {"cpu": str, "threads": int, "torch": str, "products": dict})
    if about["threads"] < 1 or "float32" not in about["products"]:
        raise ValueError("a machine has 1 thread or more, and costs of float32")
    products = {dtype: _costs(costs) for dtype, costs in about["products"].items()}
    return Machine(**{**about, "products": products})


def _costs(found: Any) -> ProductCosts:
    names = ["alone", "batched"]
    if isinstance(found, dict) and found.get("onednn", 0) is None:
        found = {name: costs for name, costs in found.items() if name != "onednn"}
    elif isinstance(found, dict) and "onednn" in found:
        names.append("onednn")
    ways = _fields(found, dict.fromkeys(names, dict))
    kinds: dict[str, type] = dict.fromkeys(("call", "number", "row"), float)
    return ProductCosts(**{way: Cost(**_fields(costs, kinds)) for way, costs in ways.items()})
