"""Rows on their way to experts and back, as two autograd nodes each: *start* and *finish*.

Start returns an empty token; the `Exchange` owns the buffer and the work until finish. Autograd runs finish's backward
first, which starts the gradients on the opposite way, and start's backward last, which waits for them: whatever was
issued between the two in forward has its own backward between the two.

Where tokens are, the pieces of an exchange lie in one buffer: they are sent out of it and come back into it, nothing
cuts them or joins them. So its starts there are one node, `start_all`, and its finishes, `finish_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from synchromesh.parallel.comm.all_to_all import Relayed, Route
from synchromesh.parallel.comm.collectives import InFlight
from synchromesh.parallel.waiting import Waiting
from synchromesh.parallel.wire import Wire


class Home:
    """The buffer in which pieces of rows, or of gradients, lie where the tokens are.

    Args:
        sizes: rows of each piece.
        num_rows: of the buffer; those after the last piece are 0.
    """

    def __init__(self, sizes: Sequence[int], num_rows: int) -> None:
        self.sizes, self._ends, self._num_rows = sizes, list(accumulate(sizes)), num_rows
        self._buffer: Tensor | None = None

    def place(self, piece: int, like: Tensor) -> Tensor:
        """Return where a piece is to be written; the first that is asked for makes the buffer."""
        if self._buffer is None:
            self._buffer = like.new_empty(self._num_rows, *like.shape[1:])
            self._buffer[self._ends[-1] :].zero_()
        return self._buffer[self._ends[piece] - self.sizes[piece] : self._ends[piece]]

    def take(self) -> Tensor:
        """Return the buffer when all has been written, and forget it."""
        assert self._buffer is not None, "rows were taken before they were sent"
        buffer, self._buffer = self._buffer, None
        return buffer

    def cut(self, rows: Tensor) -> Sequence[Tensor]:
        """Return the pieces of rows that lie as in the buffer."""
        return [rows[end - size : end] for size, end in zip(self.sizes, self._ends, strict=True)]


class Exchange:
    """One piece of rows in one direction.

    Args:
        route: who gets how many.
        there: towards the experts; else back to where the tokens are.
        wire: how rows are written for the way.
        waiting: adds up the time until they arrive.
        home: where it lies among other pieces, and its number there; None is alone.

    Attributes:
        ahead: the piece that arrives at its experts after this one. On two levels it is sent on from the first to the
            second before they compute with this one, so that it crosses the network under their compute.
    """

    def __init__(
        self, route: Route, wire: Wire, waiting: Waiting, *, there: bool, home: tuple[Home, int] | None = None
    ) -> None:
        self._route, self._wire, self._waiting, self._there, self._home = route, wire, waiting, there, home
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
        self._dtype, written = rows.dtype, self._wire.write(rows)
        if self._there == forward:
            self._flight = self._route.there(written)
        else:
            into = None if self._home is None else self._home[0].place(self._home[1], written)
            self._flight = self._route.back(written, into)

    def end(self, *, forward: bool) -> Tensor:
        """Wait, and hold nothing any more; return the rows."""
        return self.read(self.arrived(forward=forward))

    def arrived(self, *, forward: bool) -> Tensor:
        """Wait, and hold nothing any more; return what was written for the way."""
        assert self._flight is not None, "an exchange was finished before it was started"
        flight, self._flight = self._flight, None
        sent = self._waiting.during(flight.wait)
        if self._there == forward and self.ahead is not None:
            self.ahead.send_on()
        return sent

    def read(self, sent: Tensor) -> Tensor:
        """Return the rows that were written for the way, of this or of several pieces."""
        return self._wire.read(sent, self._dtype)

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


def start_all(rows: Tensor, exchanges: Sequence[Exchange], home: Home) -> Sequence[Tensor]:
    """Send the pieces of rows from their home; return the token of each."""
    return _StartAll.apply(rows, exchanges, home)


def finish_all(tokens: Sequence[Tensor], exchanges: Sequence[Exchange], home: Home) -> Tensor:
    """Return the rows of all pieces that came home."""
    return _FinishAll.apply(exchanges, home, *tokens)


class _StartAll(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchanges: Sequence[Exchange], home: Home) -> tuple[Tensor, ...]:
        ctx.exchanges, ctx.home = exchanges, home
        for exchange, piece in zip(exchanges, home.cut(rows), strict=True):
            exchange.begin(piece, forward=True)
        return tuple(rows.new_zeros(0) for _ in exchanges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for exchange in reversed(ctx.exchanges):
            exchange.arrived(forward=False)
        return ctx.exchanges[0].read(ctx.home.take()), None, None


class _FinishAll(Function):
    @staticmethod
    def forward(ctx: Any, exchanges: Sequence[Exchange], home: Home, *tokens: Tensor) -> Tensor:
        ctx.exchanges, ctx.home = exchanges, home
        for exchange in exchanges:
            exchange.arrived(forward=True)
        return exchanges[0].read(home.take())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for exchange, piece in zip(reversed(ctx.exchanges), reversed(ctx.home.cut(grad)), strict=True):
            exchange.begin(piece, forward=False)
        return None, None, *(grad.new_zeros(0) for _ in ctx.exchanges)
