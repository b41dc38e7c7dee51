"""What a training loop does to gradients that lie on several ranks, and to the losses that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import expert_parameters


def split_by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split parameters into plain tensors and DTensors, which no foreach or fused optimizer takes in one group."""
    plain: list[Tensor] = []
    spread: list[Tensor] = []
    for parameter in parameters:
        (spread if isinstance(parameter, DTensor) else plain).append(parameter)
    return [kind for kind in (plain, spread) if kind]


def clip_grad_norm(model: nn.Module, grid: Grid, max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients so that their norm over all ranks is at most max_norm; return the norm before.

    Each expert counts once. All ranks get the same number: NaN or infinite everywhere if it is so on any rank, and
    then nobody should step.
    """
    experts = {id(p) for p in expert_parameters(model).values()}
    own = [p.grad.as_subclass(Tensor) for p in model.parameters() if p.grad is not None and id(p) in experts]
    rest = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in experts]
    plain = [grad for grad in rest if not isinstance(grad, DTensor)]
    sharded = [grad for grad in rest if isinstance(grad, DTensor)]
    spread = [grad.to_local() for grad in sharded]
    device = next(model.parameters()).device
    square = _squared_norm(own, device)
    if grid.group is not None:
        dist.all_reduce(square, group=grid.group)
    if sharded:
        part = _squared_norm(spread, device)
        dist.all_reduce(part, group=sharded[0].device_mesh.get_group())
        square += part
    total = (square + _squared_norm(plain, device)).sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*own, *plain, *spread):
        grad.mul_(scale)
    return total.to(torch.float32)


def token_mean_loss(total: Float[Tensor, ""], count: Tensor | int, grid: Grid) -> Float[Tensor, ""]:
    """Return the loss of this rank whose mean over ranks is the mean over all tokens, sum total_i / sum count_i.

    Args:
        total: sum of the losses of this rank's tokens.
        count: their number; 0 is allowed, on some ranks.
    """
    counted = torch.as_tensor(count, device=total.device, dtype=total.dtype).clone()
    if grid.group is not None:
        dist.all_reduce(counted, group=grid.group)
    return total * (grid.size / counted.clamp(min=1))


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Leave gradients of shared parameters on their ranks while the block runs: for all micro-steps but the last."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares in float64; 0 of nothing."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(grads).to(torch.float64).square()
