"""quantize_experts: the experts of a model become ones of 8 bits, for inference."""

from __future__ import annotations

import torch
from torch import nn

from synchromesh.adapt.adaptation import adapt
from synchromesh.moe.experts import StackedExperts
from synchromesh.moe.quantized import QuantizedExperts


def quantize_experts(model: nn.Module, dtype: torch.dtype = torch.int8) -> list[str]:
    """Replace the experts of every MoE layer of a model by quantized ones, in place; return their names.

    Args:
        model: any model with `MLPExperts` or `GatedMLPExperts` in it.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        ValueError: there are none; or as `QuantizedExperts`. The model is as before.

    >>> from synchromesh import MLPExperts, MoE, TopKRouter
    >>> moe = MoE(TopKRouter(8, 4), MLPExperts(4, 8, hidden=16))
    >>> quantize_experts(moe)
    ['experts']
    """
    if not any(isinstance(module, StackedExperts) for module in model.modules()):
        raise ValueError(f"quantize_experts found no MLPExperts or GatedMLPExperts in {type(model).__name__}")
    return list(adapt(model, _stacked, lambda name, experts: QuantizedExperts(experts, dtype)).names)  # pyright: ignore[reportArgumentType] - `_stacked` chooses none else


def _stacked(name: str, module: nn.Module) -> bool:
    return isinstance(module, StackedExperts)
