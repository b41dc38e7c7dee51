"""`synchromesh profile`: what this cluster can do, measured in under a minute, for `synchromesh plan` and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import Progress

from synchromesh.commands.context import Context
from synchromesh.commands.profiling import STAGES, measure
from synchromesh.errors import InputError
from synchromesh.kernels import product_meter
from synchromesh.kernels.product_costs import Machine, Machines, own_file
from synchromesh.parallel.comm.grid import Grid
from synchromesh.planning.cluster import UNMEASURED, ClusterProfile, Link
from synchromesh.training.durable import write_atomically

SHOWN_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 24)  # of messages, in the table


ABOUT = """\
Measure these ranks in under a minute: products by shape, memory, links by message size, overlap.

  synchromesh profile here.json --world 2
  torchrun --nnodes 2 --nproc-per-node 8 ... -m -- synchromesh profile all.json
  synchromesh profile here.json --products
      also tune the products of this CPU's kernels
"""


@dataclass(frozen=True)
class Request:
    """Options of `profile`.

    Attributes:
        file: to write, NAME.json.
        world: ranks to start on this machine; under torchrun or SLURM, the job's ranks are taken.
        ranks_per_node: pretend that so many neighbours share a machine; the true number if not given.
        json: print the profile instead of a table.
        products: also measure the ways of multiplying many experts on this CPU, for its kernels, with as many threads
            as they get. They choose by what is kept in ~/.cache/synchromesh, in place of what the package brings.
    """

    file: tyro.conf.Positional[Path]
    world: int = 1
    ranks_per_node: int | None = None
    json: bool = False
    products: bool = False


def run(request: Request, context: Context) -> int:
    """Measure on some ranks, and write the file on the first one; return the exit code.

    Raises:
        InputError: ranks_per_node does not divide the ranks.
    """
    return context.on_ranks(request.world, lambda own, grid: measure_ranks(request, grid, own.console))


def measure_ranks(request: Request, grid: Grid, console: Console) -> int:
    """Measure the ranks of a grid, and write the file on the first one; return the exit code."""
    if request.ranks_per_node is not None:
        try:
            grid = Grid(grid.group, ranks_per_node=request.ranks_per_node)
        except ValueError as error:
            raise InputError(str(error)) from error
    if grid.rank == 0 and request.products:
        keep_products(own_file(), product_meter.measure())
    nccl = grid.group is not None and dist.get_backend(grid.group) == "nccl"
    device = torch.device("cuda" if nccl or (grid.group is None and torch.cuda.is_available()) else "cpu")
    with Progress(console=console, transient=True, disable=grid.rank > 0 or request.json) as progress:
        task = progress.add_task("", total=len(STAGES))

        def begins(stage: str) -> None:
            progress.update(task, description=stage, completed=STAGES.index(stage))

        found = measure(grid, request.file.stem, device=device, begins=begins)
    if grid.rank == 0:
        write_atomically(request.file, found.to_json())
        if request.json:
            console.print(found.to_json(), end="", soft_wrap=True, highlight=False, markup=False)
        else:
            _show(console, found)
            console.print(
                f"{request.file} · synchromesh plan --cluster {request.file} --dtype bfloat16",
                highlight=False,
                soft_wrap=True,
            )
    return 0


def keep_products(file: Path, machine: Machine) -> None:
    """Add the costs of a machine's products to a file; one that holds something else is replaced."""
    try:
        kept = Machines.from_json(file.read_text("utf-8", "replace")) if file.is_file() else Machines(())
    except InputError:
        kept = Machines(())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, kept.with_machines([machine]).to_json())


def _show(console: Console, found: ClusterProfile) -> None:
    console.print(f"{found.name}: {found.about}", style="italic", highlight=False, soft_wrap=True)
    for name, said in _lines(found):
        console.print(f"{name}: {said}", highlight=False, soft_wrap=True)


def _lines(found: ClusterProfile) -> Iterator[tuple[str, str]]:
    for dtype, law in found.matmul.items():
        peak = f"{law.peak / 1e9:,.1f} GFLOP/s at most"
        yield f"products in {dtype}", f"{peak}, half of it at {law.half:.0f} rows"
    yield "memory", f"{found.memory_rate / 1e9:,.1f} GB/s"
    yield "a layer's fixed time", f"{found.step[0] * 1e3:.2f} ms forward, {found.step[1] * 1e3:.2f} backward"
    yield "messages in a node", _messages(None if _unmeasured(found, "node") else found.node)
    yield "messages between nodes", _messages(found.network)
    if found.network is not None and found.network.node_rate is not None:
        yield "a node's link", f"{found.network.node_rate * 8 / 1e6:,.0f} Mbit/s"
    if found.cores is not None:
        waits = ": ranks wait for one, and times are of a rank that has it" if found.cores < 1 else ""
        yield "cores", f"{found.cores:g} for each rank{waits}"
    yield "compute beside exchange", f"{found.slowed[0]:.2f}x its time, exchange {found.slowed[1]:.2f}x"


def _unmeasured(found: ClusterProfile, field: str) -> bool:
    return found.sources[field].startswith(UNMEASURED)


def _messages(link: Link | None) -> str:
    if link is None:
        return "unknown: these ranks have none"
    times = ", ".join(f"{_size(size)} {link.message.at(size) * 1e3:.2f} ms" for size in SHOWN_BYTES)
    return f"{times}; start {link.start * 1e3:.2f} ms"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
