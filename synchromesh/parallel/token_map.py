"""Token map: where the one row of a token for each of its destinations lies, and what is said of it there.

One of W = 4 ranks with two experts each (a b, c d, e f, g h), three choices of each token:

    token           0      1      2        rows for rank 0   0 1     experts a b, a -
    its experts     a b e  c d a  g h c             rank 1   1 2             c d, c -
    rows without    3      3      3                 rank 2   0               e -
    rows with       2      2      2                 rank 3   2               g h

With a row travel its *tags*: which experts of the host it is for, and their combine weights. So what arrives is for the
host what a batch of tokens is for a layer, each with the choices that it has there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from synchromesh.kernels import Kernels
from synchromesh.parallel.dispatch import SendMap, inverse
from synchromesh.parallel.hosts import Hosts


@dataclass(frozen=True)
class Pairs:
    """The experts of some tokens, numbered as a level numbers them.

    Attributes:
        ids: int64; -1 where there is none, also where a capacity has dropped it.
        weights: of the combine; not read where there is none.
        most: bound on the number of pairs; None is T * K.
    """

    ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    most: int | None = None


@dataclass(frozen=True)
class TokenMap:
    """Where the rows of some tokens lie, sorted by member.

    Attributes:
        send: a row for each (token, member), in the column of the token's first choice that goes there.
        rows: int64, for each pair the rows of its r copies, shared with others of its token; -1 where there is none.
        column: int64, the column of each pair in the tags of its rows.
        place: int64, number of each pair's expert at its host.
        width: Q, columns of tags: min(K, N).
        to_each: [2, X], rows and pairs that go to each member.
    """

    send: SendMap
    rows: Int[Tensor, "T K r"]
    column: Int[Tensor, "T K"]
    place: Int[Tensor, "T K"]
    width: int
    to_each: Int[Tensor, "2 X"]

    def cut(self, num_rows: int) -> TokenMap:
        """Return the map without the tail, once it is known how many rows there are."""
        send = SendMap(self.send.rows, self.send.pairs[:num_rows], self.send.ends)
        return dataclasses.replace(self, send=send)

    def tags(self, weights: Float[Tensor, "T K"]) -> tuple[Int[Tensor, "R Q"], Float[Tensor, "R Q"]]:
        """Return, for each row, the experts at its host and the weights of each; -1 and 0 where there are fewer."""
        shape = (len(self.send.pairs), self.width)
        at = self._at(shape[0]).flatten()
        ids = torch.full((shape[0] * shape[1] + 1,), -1, dtype=torch.int32, device=at.device)
        ids = ids.scatter(0, at, self._of_copies(self.place).to(torch.int32))[:-1]
        own = self._of_copies(weights.detach())
        # Where a token has chosen an expert twice, they may share a column: the sum of their weights is the same to it.
        numbers = own.new_zeros(shape[0] * shape[1] + 1).scatter_add(0, at, own)[:-1]
        return ids.view(shape), numbers.view(shape)

    def of_pairs(self, grad: Float[Tensor, "R Q"]) -> Float[Tensor, "T K"]:
        """Return the gradients of the weights from those of the tags: the sum over the copies of a pair."""
        numbers = torch.cat([grad.flatten(), grad.new_zeros(1)])  # the last one is of pairs that are not there
        return numbers[self._at(len(self.send.pairs))].sum(dim=-1)

    def _at(self, num_rows: int) -> Int[Tensor, "T K r"]:
        nobody = num_rows * self.width
        return torch.where(self.rows >= 0, self.rows * self.width + self.column[..., None], nobody)

    def _of_copies(self, numbers: Tensor) -> Tensor:
        return numbers[..., None].expand(self.rows.shape).reshape(-1)

    def gather(self, x: Float[Tensor, "T D"], kernels: Kernels) -> Float[Tensor, "R D"]:
        """Copy tokens to their rows."""
        return self.send.gather(x, kernels)

    def add(self, rows: Float[Tensor, "R D"], kernels: Kernels) -> Float[Tensor, "T D"]:
        """Return the sum of each token's rows. Nothing is kept for backward, which copies gradients to the rows."""
        return _Add.apply(rows, self.send, kernels)


class _Add(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: SendMap, kernels: Kernels) -> Tensor:
        ctx.send, ctx.kernels = send, kernels
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return send.combine(rows, rows.new_ones(send.rows.shape, dtype=dtype), kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.send.gather(grad.contiguous(), ctx.kernels), None, None


def map_tokens(pairs: Pairs, hosts: Hosts, kernels: Kernels) -> TokenMap:
    """Map tokens to rows: one for each member of each host that has some of a token's experts."""
    ids = pairs.ids.clamp(min=0)
    kept, choices = pairs.ids >= 0, pairs.ids.shape[1]
    host = torch.where(kept, hosts.host[ids], hosts.count)  # nobody's pairs last
    leading = leading_columns(host)
    first = kept & (leading == torch.arange(choices, device=ids.device))
    places, counts = kernels.positions(torch.where(first, host, -1), hosts.count)
    to_each = counts[hosts.host_of_member]
    ends = to_each.cumsum(0)
    starts = (ends - to_each)[hosts.members[host.clamp(max=hosts.count - 1)]]
    rows = torch.where(first[..., None], starts + places[..., None], -1)
    shared = torch.where(kept[..., None], rows.gather(1, leading[..., None].expand(rows.shape)), -1)
    bound = len(ids) * min(choices, hosts.count) * hosts.copies
    sent = SendMap(rows.flatten(1), inverse(rows.flatten(1), bound), ends.to(torch.int32))
    place = hosts.place[ids]
    dense = hosts.local_experts < choices  # then a column for each expert of the host is less than one for each choice
    column = place if dense else torch.arange(choices, device=ids.device).expand(ids.shape)
    num_pairs = _count(host, hosts.count)[hosts.host_of_member]
    width = min(choices, hosts.local_experts)
    return TokenMap(sent, shared, column, place, width, torch.stack([to_each, num_pairs]))


def leading_columns(keys: Int[Tensor, "T K"]) -> Int[Tensor, "T K"]:
    """Return, for each number, the first column of its row that holds the same number."""
    ordered, columns = keys.sort(dim=1, stable=True)
    number = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = torch.where(begins, number, 0).cummax(dim=1).values
    return torch.empty_like(keys).scatter(1, columns, columns.gather(1, start))


def _count(host: Int[Tensor, "T K"], count: int) -> Int[Tensor, " H"]:
    numbers = host.flatten()
    return numbers.new_zeros(count + 1).scatter_add(0, numbers, torch.ones_like(numbers))[:count]
