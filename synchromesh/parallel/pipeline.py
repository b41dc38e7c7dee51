"""Pipeline: rows to their experts and back, in pieces whose exchange runs under the compute of others.

Issued in the order start_0..start_d, finish_c, compute_c, start_back_c per piece, finish_back_0..d, autograd's reverse
order overlaps the backward in the same way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels import Kernels
from synchromesh.kernels.grouped_mm import equal
from synchromesh.moe.experts import Experts
from synchromesh.parallel.arrivals import Arrivals
from synchromesh.parallel.comm.all_to_all import AllToAll, Route
from synchromesh.parallel.comm.collectives import on_host
from synchromesh.parallel.comm.segments import Segments
from synchromesh.parallel.comm.uncompiled import uncompiled
from synchromesh.parallel.dispatch import SendMap, Slots, even_map, ragged_map, rows_per_slot
from synchromesh.parallel.exchange import Exchange, Home, finish_all, start_all
from synchromesh.parallel.waiting import Waiting
from synchromesh.parallel.wire import Wire
from synchromesh.types import Routing, RowMap


@dataclass(frozen=True)
class Traffic:
    """What one forward exchanges.

    Attributes:
        send: where rows lie in the send buffer.
        sizes: rows of the send buffer in each piece.
        routes: of each piece.
        arrivals: of each piece, how its rows lie when they have arrived.
        kernels: that suit what experts receive.
    """

    send: SendMap
    sizes: list[int]
    routes: list[Route]
    arrivals: list[Arrivals]
    kernels: Kernels


@uncompiled  # reads numbers, of which its graph could make nothing
def ragged_traffic(
    routing: Routing, rowmap: RowMap, slots: Slots, between: AllToAll, *, chunks: int, kernels: Kernels
) -> Traffic:
    """Exchange counts, and read them once on the host: only real rows travel."""
    counts = rows_per_slot(rowmap, slots)
    numbers = torch.cat([counts.flatten(), between.exchange_counts(counts)])
    known = Segments(on_host(numbers), numbers)
    sent = known.of(lambda both: both[: counts.numel()].reshape(*counts.shape))
    read = known.of(lambda both: both[counts.numel() :])
    routes, received = between.routes(read, sent, chunks), between.received(read).device
    arrivals = [
        Arrivals(
            kernels.segment_map(received, num_rows=int(route.received.sum()), part=chunk, parts=chunks),
            in_order=1 in route.received.shape,
        )
        for chunk, route in enumerate(routes)
    ]
    sizes = [route.num_sent for route in routes]
    return Traffic(ragged_map(routing, rowmap, slots, chunks), sizes, routes, arrivals, kernels)


def even_traffic(
    routing: Routing, rowmap: RowMap, slots: Slots, between: AllToAll, *, chunks: int, kernels: Kernels
) -> Traffic:
    """Send equal, padded parts: every shape is known beforehand, and nothing is read on the host."""
    assert isinstance(rowmap.capacity, int)
    rows = max(1, math.ceil(rowmap.capacity / chunks))
    layout = slots.layout
    route = between.even_route(layout.local_experts, rows)
    counts = torch.full((layout.members, layout.local_experts), rows, device=rowmap.ends.device)
    arrivals = Arrivals(kernels.segment_map(counts, num_rows=route.num_sent), in_order=1 in counts.shape)
    return Traffic(
        even_map(routing, rowmap, slots, chunks=chunks, rows=rows),
        [route.num_sent] * chunks,
        [route] * chunks,
        [arrivals] * chunks,
        dataclasses.replace(kernels, grouped_mm=equal.grouped_mm),
    )


@uncompiled  # which traces no asynchronous collective; one break, not one for each
def exchange_and_compute(
    rows: Float[Tensor, "R D"],
    traffic: Traffic,
    experts: Experts,
    *,
    wire: Wire,
    waiting: Waiting,
    weights: Callable[[], Mapping[str, Tensor]],
) -> Float[Tensor, "S D"]:
    """Send rows to their experts, compute there, return the results to where the rows lay; the tail is left out.

    `weights` is called once the rows are on their way, and waits for what the experts compute with.
    """

    def exchanges(home: Home, *, there: bool) -> list[Exchange]:
        numbered = enumerate(traffic.routes)
        return [Exchange(route, wire, waiting, there=there, home=(home, number)) for number, route in numbered]

    gradients, results = Home(traffic.sizes, len(rows)), Home(traffic.sizes, sum(traffic.sizes))
    going, coming = exchanges(gradients, there=True), exchanges(results, there=False)
    # On two levels a piece is relayed when the one before it arrives, so that its second hop runs under compute too.
    for first, second in pairwise(going):
        first.ahead = second
    for first, second in pairwise(reversed(coming)):  # gradients go there in the other order
        first.ahead = second
    tokens = start_all(rows, going, gradients)
    ready, sent_back = weights(), []
    for there, token, arrivals, back in zip(going, tokens, traffic.arrivals, coming, strict=True):
        sent_back.append(back.start(arrivals.through(there.finish(token), experts, ready, traffic.kernels)))
    return finish_all(sent_back, coming, results)
