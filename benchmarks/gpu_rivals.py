"""Other libraries' experts on the same weights and routing: transformers as shipped, Liger-Kernel, SonicMoE.

A rival has copies of the weights in its own layout, whose gradients it computes too. One that is not installed, does
not take the shape, or has no room says so. `gpu_wheels.py` fetches those that a machine lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpu_problem import Problem

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A way to compute a problem.

    Attributes:
        forward: the output [T, D].
        own: copies of weights that it differentiates in place of the problem's.
    """

    forward: Forward
    own: tuple[Tensor, ...] = ()


Weights = tuple[Tensor, Tensor]


def _joined(p: Problem) -> Weights:
    """Return copies: gate and up in one [E, 2 F, D], and down as [E, D, F]."""
    if p.mlp.gate is None:
        raise ValueError("takes gated experts only")
    both = torch.cat([p.mlp.gate.detach(), p.mlp.up.detach()], 1)
    return both.requires_grad_(), p.mlp.down.detach().mT.contiguous().requires_grad_()


def transformers_grouped(p: Problem, own: Weights) -> Contestant:
    """Mixtral's experts by the backend that transformers chooses itself."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = SimpleNamespace(
        num_local_experts=p.shape.experts, hidden_size=p.shape.width, intermediate_size=p.shape.hidden,
        hidden_act="silu", _experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = map(torch.nn.Parameter, own)
    ids, leaves = p.routing.expert_ids.long(), (experts.gate_up_proj, experts.down_proj)
    return Contestant(lambda: experts(p.x, ids, p.routing.weights.bfloat16()), leaves)


def liger(p: Problem, own: Weights) -> Contestant:
    """Liger-Kernel's fused experts, in Triton (0.8.5)."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    gate_up, down = own
    ids = p.routing.expert_ids.int()
    return Contestant(lambda: LigerFusedMoEFunction.apply(p.x, gate_up, down, ids, p.routing.weights), own)


def sonic(p: Problem, own: Weights) -> Contestant:
    """SonicMoE (0.1.2), whose weights are views with the expert last."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    gate_up, down = own
    tokens, choices = p.routing.expert_ids.shape
    token_ids = torch.arange(tokens, device=p.x.device, dtype=torch.int32).repeat_interleave(choices)
    ids, stream = p.routing.expert_ids.flatten().int(), torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        y, _ = moe_general_routing_inputs(
            p.x, p.routing.weights.flatten(), token_ids, ids, gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0),
            None, p.shape.experts, stream, ActivationType.SWIGLU, not torch.is_grad_enabled(), concat_layout=True,
        )  # fmt: skip
        return y

    return Contestant(forward, own)


LIBRARIES: Mapping[str, Callable[[Problem, Weights], Contestant]] = {
    "transformers": transformers_grouped,
    "liger": liger,
    "sonicmoe": sonic,
}


def libraries(p: Problem) -> dict[str, Contestant | str]:
    """Return each library's contestant, or why there is none; all share one copy of the weights."""
    try:
        own = _joined(p)
    except (ValueError, torch.OutOfMemoryError) as error:
        return dict.fromkeys(LIBRARIES, told(error))
    return {name: contestant_of(lambda p, make=make: make(p, own), p) for name, make in LIBRARIES.items()}


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"


def contestant_of(make: Callable[[Problem], Contestant], p: Problem) -> Contestant | str:
    """Return a contestant that has run once, forward and backward, or one line that says why there is none."""
    try:
        made = make(p)
        p.run(made, backward=True)
    except Exception as error:  # noqa: BLE001  another library may fail in any way, and is then no contestant
        torch.cuda.empty_cache()
        return told(error)
    return made
