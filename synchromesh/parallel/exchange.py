"""Rows on their way to experts and back, as two autograd nodes each: *start* and *finish*.

Start returns an empty token; the `Exchange` owns the buffer and the work until finish. Autograd runs finish's backward
first, which starts the gradients on the opposite way, and start's backward last, which waits for them: whatever was
issued between the two in forward has its own backward between the two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from synchromesh.parallel.comm.all_to_all import Relayed, Route
from synchromesh.parallel.comm.collectives import InFlight
from synchromesh.parallel.waiting import Waiting
from synchromesh.parallel.wire import Wire


class Exchange:
    """One piece of rows in one direction.

    Args:
        route: who gets how many.
        there: towards the experts; else back to where the tokens are.
        wire: how rows are written for the way.
        waiting: adds up the time until they arrive.

    Attributes:
        ahead: the piece that arrives at its experts after this one. On two levels it is sent on from the first to the
            second before they compute with this one, so that it crosses the network under their compute.
    """

    def __init__(self, route: Route, wire: Wire, waiting: Waiting, *, there: bool) -> None:
        self._route, self._wire, self._waiting, self._there = route, wire, waiting, there
        self._flight: InFlight | None = None
        self.ahead: Exchange | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send rows; return the token that `finish` wants."""
        return _Start.apply(rows, self)

    def finish(self, token: Tensor) -> Tensor:
        """Return the rows that arrived."""
        return _Finish.apply(token, self)

    def begin(self, rows: Tensor, *, forward: bool) -> None:
        """Send rows, or gradients the opposite way."""
        assert self._flight is None, "an exchange was started twice"
        send = self._route.there if self._there == forward else self._route.back
        self._dtype = rows.dtype
        self._flight = send(self._wire.write(rows))

    def end(self, *, forward: bool) -> Tensor:
        """Wait, and hold nothing any more."""
        assert self._flight is not None, "an exchange was finished before it was started"
        flight, self._flight = self._flight, None
        rows = self._waiting.during(flight.wait)
        if self._there == forward and self.ahead is not None:
            self.ahead.send_on()
        return self._wire.read(rows, self._dtype)

    def send_on(self) -> None:
        """Start the second level, where there is one."""
        if isinstance(self._flight, Relayed):
            self._waiting.during(self._flight.send_on)


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(rows, forward=True)
        return rows.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.end(forward=False), None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.end(forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.exchange.begin(grad, forward=False)
        return grad.new_zeros(0), None
