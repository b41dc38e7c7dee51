"""Tags on their way to the hosts of their experts, and the gradients of their weights on the way back.

All pieces travel at once, ahead of their rows. Two autograd nodes, as those of `exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from synchromesh.parallel.comm.collectives import InFlight, all_to_all
from synchromesh.parallel.comm.segments import Segments
from synchromesh.parallel.token_map import Pairs, TokenMap
from synchromesh.parallel.waiting import Waiting


@dataclass(frozen=True)
class Ways:
    """How many rows of each piece go where.

    Attributes:
        group: of the members; None is one alone.
        sent: [d, X] rows of each piece to each member.
        received: [d, X] rows of each piece from each member.
        pairs: of each piece that are received.
    """

    group: ProcessGroup | None
    sent: Segments
    received: Segments
    pairs: Sequence[int]

    def start(self, tags: Tensor, *, there: bool) -> InFlight:
        """Send what lies by (piece, member); it arrives by (member, piece)."""
        out, into = (self.sent, self.received) if there else (self.received, self.sent)
        splits = into.host.sum(0).tolist(), out.host.sum(0).tolist()
        return all_to_all(out.transpose(tags), self.group, *splits)

    def arrived(self, tags: Tensor, *, there: bool) -> list[Tensor]:
        """Return the tags of each piece, sorted by member."""
        into = self.received if there else self.sent
        return list(into.T.transpose(tags).split(into.host.sum(1).tolist()))


class Tags:
    """The tags of all pieces on one level.

    Args:
        maps: of each piece, without tails.
        ways: where they go.
        waiting: adds up the time until they arrive.
    """

    def __init__(self, maps: Sequence[TokenMap], ways: Ways, waiting: Waiting) -> None:
        self._maps, self._ways, self._waiting = maps, ways, waiting
        self._flight: InFlight | None = None

    def start(self, weights: Sequence[Tensor]) -> Tensor:
        """Send them; return the token that `finish` wants."""
        return _Start.apply(self, *weights)

    def finish(self, token: Tensor) -> list[Pairs]:
        """Return the pairs of the rows that arrive, piece by piece."""
        weights = _Finish.apply(token, self)
        return [Pairs(ids, own, most) for ids, own, most in zip(self._ids, weights, self._ways.pairs, strict=True)]

    def begin(self, weights: Sequence[Tensor]) -> None:
        tags = [own.tags(weight) for own, weight in zip(self._maps, weights, strict=True)]
        self._dtype = weights[0].dtype
        both = [torch.cat([part.contiguous().view(torch.uint8) for part in piece], dim=1) for piece in tags]
        self._flight = self._ways.start(torch.cat(both), there=True)

    def end(self) -> tuple[Tensor, ...]:
        pieces = self._ways.arrived(self._arrived(), there=True)
        split = 4 * self._maps[0].width  # bytes of the numbers of experts, int32
        self._ids = [_numbers(piece[:, :split], torch.int32).to(torch.int64) for piece in pieces]
        return tuple(_numbers(piece[:, split:], self._dtype) for piece in pieces)

    def begin_back(self, grads: Sequence[Tensor]) -> None:
        self._flight = self._ways.start(torch.cat(list(grads)), there=False)

    def end_back(self) -> list[Tensor]:
        pieces = self._ways.arrived(self._arrived(), there=False)
        return [own.of_pairs(piece) for own, piece in zip(self._maps, pieces, strict=True)]

    def _arrived(self) -> Tensor:
        assert self._flight is not None, "tags were finished before they were started"
        flight, self._flight = self._flight, None
        return self._waiting.during(flight.wait)


def _numbers(some: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy, always: one row of a slice counts as contiguous, and may begin where no number of the dtype may.
    return some.clone(memory_format=torch.contiguous_format).view(dtype)


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, tags: Tags, *weights: Tensor) -> Tensor:
        ctx.tags = tags
        tags.begin(weights)
        return weights[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.tags.end_back()


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, tags: Tags) -> tuple[Tensor, ...]:
        ctx.tags = tags
        return tags.end()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.tags.begin_back(grads)
        return grads[0].new_zeros(0), None
