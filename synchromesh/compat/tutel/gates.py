"""Tutel's gates: tokens to logits, with the parameters, names and random numbers that Tutel's have."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.compat.tutel.arguments import number

OPTIONS = ("capacity_factor", "gate_noise")
COLDEST = 0.01  # the least temperature of a cosine gate


class _Gate(nn.Module):
    """A gate that keeps float32 parameters where fp32_gate is set, whatever its model is converted to."""

    def __init__(self, num_global_experts: int, k: int, fp32_gate: bool, options: Mapping[str, Any]) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"gate_type holds {unknown}, wanted 'k', 'fp32_gate' and {list(OPTIONS)} only")
        if int(k) < 1:
            raise ValueError(f"k of the gate is {k}, wanted at least 1")
        self.top_k, self.fp32_gate = min(num_global_experts, int(k)), fp32_gate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Gate:
        super()._apply(fn, recurse)
        if self.fp32_gate:
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        return self


class LinearTopKGate(_Gate):
    """logits = x W^T. Parameter: `wg.weight [E D]`.

    Args:
        model_dim: D.
        num_global_experts: E.
        k: choices, at most E.
        fp32_gate: compute in float32.
    """

    def __init__(
        self, model_dim: int, num_global_experts: int, k: int = 1, fp32_gate: bool = False, **options: Any
    ) -> None:
        super().__init__(num_global_experts, k, fp32_gate, options)
        dtype = torch.float32 if fp32_gate else None
        self.wg = nn.Linear(model_dim, num_global_experts, bias=False, dtype=dtype)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        return self.wg(x.to(self.wg.weight.dtype))


class CosineTopKGate(_Gate):
    """logits = cos(P x + b, M_e) / temperature, the temperature never below 0.01.

    Parameters: `temperature [1]` (the logarithm of its inverse), `cosine_projector`, `sim_matrix [proj_dim E]`.

    Args:
        proj_dim: width of the projection.
        init_t: the temperature at first. Others as for the linear gate.
    """

    def __init__(
        self,
        model_dim: int,
        num_global_experts: int,
        k: int = 1,
        fp32_gate: bool = False,
        proj_dim: int = 256,
        init_t: int | float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_global_experts, k, fp32_gate, options)
        self.temperature = nn.Parameter(torch.full([1], 1.0 / init_t).log())
        self.cosine_projector = nn.Linear(model_dim, proj_dim)
        directions = torch.randn(proj_dim, num_global_experts)  # Tutel draws them twice: the generator must move on
        self.sim_matrix = nn.Parameter(nn.init.normal_(directions, 0, 0.01))
        if fp32_gate:
            self.float()

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        projected = F.normalize(self.cosine_projector(x.to(self.cosine_projector.weight.dtype)), dim=1)
        scale = self.temperature.clamp(max=-math.log(COLDEST)).exp()
        return projected @ F.normalize(self.sim_matrix, dim=0) * scale


def build_gates(
    gate_type: str | dict[str, Any] | Sequence[dict[str, Any]],
    *,
    model_dim: int,
    num_experts: int,
    seed: int | None,
    capacity_factor: float,
) -> nn.ModuleList:
    """Build the gates of a layer, each with top_k, gate_noise and capacity_factor.

    Args:
        gate_type: as `moe_layer` takes it.
        seed: of the first gate, the next one adds 1.
        capacity_factor: of gates that name none.

    Raises:
        ValueError: an unknown type, or options that its gate does not know.
    """
    if isinstance(gate_type, str):
        gate_type = _of_a_name(gate_type)
    listed = [gate_type] if isinstance(gate_type, dict) else gate_type
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(settings, dict) for settings in listed):
        raise ValueError(
            f"gate_type is {gate_type!r}, wanted a dict such as {{'type': 'top', 'k': 2}}, or some in a list"
        )
    gates = nn.ModuleList()
    for index, settings in enumerate(listed):
        if seed is not None:
            torch.manual_seed(seed + index)
        gates.append(_build(dict(settings), model_dim, num_experts, capacity_factor))
    return gates


def _of_a_name(name: str) -> dict[str, Any]:
    found = re.fullmatch(r"Top(\d+)Gate", name)
    if found is None:
        raise ValueError(f"gate_type is {name!r}, wanted a dict such as {{'type': 'top', 'k': 2}}")
    settings = {"type": "top", "k": int(found[1])}
    warnings.warn(f"gate_type {name!r} is deprecated in Tutel: write {settings}", stacklevel=4)
    return settings


def _build(settings: dict[str, Any], model_dim: int, num_experts: int, capacity_factor: float) -> nn.Module:
    kind = settings.pop("type", None)
    kinds = {"top": LinearTopKGate, "cosine_top": CosineTopKGate, "custom": settings.get("module")}
    module = kinds.get(kind) if isinstance(kind, str) else None
    if module is None:
        raise ValueError(f"gate_type is of type {kind!r}, wanted 'top', 'cosine_top', or 'custom' with a 'module'")
    if kind == "custom":
        settings.pop("module")
    gate = module(model_dim=model_dim, num_global_experts=num_experts, **settings)
    if not hasattr(gate, "top_k"):
        raise ValueError(f"the custom gate {type(gate).__name__} has no top_k, wanted its choices per token")
    if not hasattr(gate, "gate_noise"):
        gate.gate_noise = settings.get("gate_noise", 0.0)
    if not hasattr(gate, "capacity_factor"):
        gate.capacity_factor = number("capacity_factor", settings.get("capacity_factor", capacity_factor))
    return gate
