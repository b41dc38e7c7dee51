"""Muon for models with experts: every expert's matrix is orthogonalised by itself, those of a layer at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from synchromesh.models.twin import gate_names
from synchromesh.moe.experts import Experts
from synchromesh.moe.layer import MoE
from synchromesh.training.traits import traits

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, by Keller Jordan, as torch.optim.Muon has them
SMALLEST_NORM = 1e-7


def orthogonalized(x: Float[Tensor, "*batch M N"], steps: int = 5) -> Float[Tensor, "*batch M N"]:
    """Return U V^T of each matrix U S V^T, roughly: singular values come between 0.5 and 1.5 (Newton-Schulz).

    Products are of bfloat16 numbers, as in torch.optim.Muon.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    shape, y = y.shape, y.reshape(-1, *y.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(shape)
    return (y.mT if tall else y).to(x.dtype)


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Return the parameters that Muon trains: matrices of layers, and of each expert in them.

    Not gates, which name experts as a head names classes, nor what stands before the first layer or behind the last.

    Raises:
        ValueError: there are none.
    """
    known, gates, stacked = traits(model), gate_names(model), _of_experts(model)
    inside = {name for name, trait in known.items() if trait.decays and trait.depth and name not in gates}
    shaped = {name for name, p in model.named_parameters() if p.ndim == 2 or (p.ndim == 3 and name in stacked)}
    if not inside & shaped:
        raise ValueError(
            f"Muon found no matrices in layers of {type(model).__name__}: its blocks need a `layer_depth`, from 1 on"
        )
    return frozenset(inside & shaped)


class ExpertMuon(Optimizer):
    """Muon (Keller Jordan; arXiv 2502.16982) where a group has `orthogonal`, AdamW for other groups.

    A parameter [E M N] is E matrices, one of each expert. Updates have the root mean square of AdamW's: rates and
    weight decay that suit AdamW suit it.

    Args:
        params: groups of parameters.
        lr: learning rate.
        momentum: decay of the running mean of gradients.
        nesterov: look ahead by one step.
        steps: of Newton-Schulz.
        betas, eps: of AdamW.
    """

    needs_whole_experts: ClassVar[bool] = True  # on ranks that hold parts of an expert it is refused

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        own = {"momentum": momentum, "nesterov": nesterov, "steps": steps}
        super().__init__(
            params, {"lr": lr, "weight_decay": 0.0, "orthogonal": False, "betas": betas, "eps": eps, **own}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            own = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["orthogonal"]:
                self._orthogonal(group, own)
            elif own:
                self._adamw(group, own)
        return loss

    def _orthogonal(self, group: dict[str, Any], own: list[nn.Parameter]) -> None:
        for parameter in own:
            # A plain tensor: gradients of spread experts speak for all ranks when they are asked for a norm.
            grad, state = _grad(parameter), self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
            size = 0.2 * math.sqrt(max(parameter.shape[-2:]))  # arXiv 2502.16982, section 2.2
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(orthogonalized(update, group["steps"]), alpha=-group["lr"] * size)

    def _adamw(self, group: dict[str, Any], own: list[nn.Parameter]) -> None:
        for parameter in own:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(zeros, step=torch.zeros((), device=parameter.device))
        means, squares, steps = ([self.state[p][name] for p in own] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            list(own), [_grad(p) for p in own], means, squares, [], steps, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, fused=True,
        )  # fmt: skip


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.as_subclass(Tensor)


def _of_experts(model: nn.Module) -> set[str]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    return {
        f"{name}.experts.{own}" if name else f"experts.{own}"
        for name, layer in layers
        for own, _ in layer.experts.named_parameters()
        if any(isinstance(module, Experts) for module in layer.experts.modules())
    }
