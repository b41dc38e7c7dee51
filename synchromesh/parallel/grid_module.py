"""Modules that look at the samples of all ranks: they are told of the ranks when a model is spread over them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.parallel.comm.grid import Grid


class GridModule(nn.Module):
    """A module that computes with what other ranks have, such as statistics of a batch; alone until it is told of them.

    Attributes:
        grid: the ranks; `parallelize` and `distribute` set it.
    """

    grid: Grid = Grid(None)

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, with a gradient; every rank comes here, with equal shapes."""
        return values if self.grid.group is None else cast(Tensor, _Summed.apply(values, self.grid))

    def gathered(self, rows: Float[Tensor, "N _"]) -> tuple[Float[Tensor, "M _"], int]:
        """Return the rows of all ranks in their order, with a gradient, and the number of the first own one.

        Ranks may have different numbers of rows, none among them. What every rank computes from the rows of others
        comes back to them as a sum over ranks, so that a loss that sums each rank's own rows has the gradient of one
        process that has them all.
        """
        if self.grid.group is None:
            return rows, 0
        counts = rows.new_zeros(self.grid.size, dtype=torch.long)
        counts[self.grid.rank] = len(rows)
        dist.all_reduce(counts, group=self.grid.group)
        sizes = counts.tolist()
        first = sum(sizes[: self.grid.rank])
        return cast(Tensor, _Placed.apply(rows, self.grid, first, sum(sizes))), first


class BatchNorm(GridModule):
    """Batch normalisation (arXiv 1502.03167) of rows by the statistics of all ranks' rows, by sums that may be uneven.

    As `nn.BatchNorm1d` on the rows of all ranks together; torch's SyncBatchNorm runs on GPUs alone.

    Args:
        width: channels.
        eps: added to the variance.
        momentum: share of a batch in the running statistics, which evaluation uses.
    """

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Raises ValueError where the ranks have one row between them in training: it has no variance."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean, variance = self._statistics(wide) if self.training else (self.running_mean, self.running_var)
        scaled = (wide - mean) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias, scaled, self.weight).to(rows.dtype)

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # The mean first, then squares around it: a difference of large sums would lose the digits of a small variance.
        count = float(self.summed(rows.new_full((1,), len(rows), dtype=torch.float64)))
        if count < 2:
            raise ValueError(
                f"a batch normalisation got {count:.0f} rows over all ranks in training, wanted 2 at least: take a "
                "larger batch"
            )
        mean = self.summed(rows.sum(0)) / count
        variance = self.summed((rows - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance


class _Summed(torch.autograd.Function):
    """A sum over ranks; each rank's gradient of the sum is added up over ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        total = values.clone()
        dist.all_reduce(total, group=grid.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.grid.group)
        return total, None


class _Placed(torch.autograd.Function):
    """Each rank's rows at their places among those of all; gradients of a place are added up over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grid: Grid, first: int, count: int) -> Tensor:
        ctx.grid, ctx.first, ctx.own = grid, first, len(rows)
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[first : first + len(rows)] = rows
        dist.all_reduce(whole, group=grid.group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grads[0].clone()
        dist.all_reduce(whole, group=ctx.grid.group)
        return whole[ctx.first : ctx.first + ctx.own].clone(), None, None, None
