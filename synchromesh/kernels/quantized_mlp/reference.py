"""quantized_mlp: fused_mlp with matrices of 8 bits, for inference where reading weights is all the time there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.export import register_dataclass

from synchromesh.kernels.fused_mlp import reference
from synchromesh.kernels.fused_mlp.reference import Activation, MLPWeights
from synchromesh.types import RowMap

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class QuantizedMLP:
    """MLPWeights whose matrices are 8-bit numbers times one scale for each number that comes out of the product.

    Matrices are int8 or float8_e4m3fn [E F D], scales float32; biases are not quantized.
    """

    up: Tensor
    down: Tensor
    up_scale: Float[Tensor, "E F"]
    down_scale: Float[Tensor, "E D"]
    gate: Tensor | None = None
    gate_scale: Float[Tensor, "E F"] | None = None
    up_bias: Float[Tensor, "E F"] | None = None
    gate_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None

    def dequantized(self, dtype: torch.dtype) -> MLPWeights:
        """Return the numbers that are meant."""
        biases = [None if b is None else b.to(dtype) for b in (self.up_bias, self.gate_bias, self.down_bias)]
        gate = None
        if self.gate is not None and self.gate_scale is not None:
            gate = _times(self.gate, self.gate_scale[:, :, None], dtype)
        up, down = (
            _times(self.up, self.up_scale[:, :, None], dtype),
            _times(self.down, self.down_scale[:, None, :], dtype),
        )
        return MLPWeights(up, down, gate, *biases)


register_dataclass(QuantizedMLP)


def quantize(mlp: MLPWeights, dtype: torch.dtype) -> QuantizedMLP:
    """Return the nearest 8-bit numbers; the largest of each channel is kept to the scale's rounding.

    Raises:
        ValueError: dtype is not torch.int8 or torch.float8_e4m3fn, or a matrix is not finite.
    """
    if dtype not in LARGEST:
        raise ValueError(f"got {dtype} to quantize to, wanted one of {', '.join(map(str, LARGEST))}")
    up, up_scale = _quantized(mlp.up, 2, dtype)
    down, down_scale = _quantized(mlp.down, 1, dtype)
    gate, gate_scale = (None, None) if mlp.gate is None else _quantized(mlp.gate, 2, dtype)
    return QuantizedMLP(up, down, up_scale, down_scale, gate, gate_scale, mlp.up_bias, mlp.gate_bias, mlp.down_bias)


def quantized_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    rowmap: RowMap,
    mlp: QuantizedMLP,
    activation: Activation,
    *,
    fused_mlp: Callable[..., Tensor] = reference.fused_mlp,
) -> Float[Tensor, "T D"]:
    """Compute `fused_mlp` with the dequantized matrices; x and weights may want gradients."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return fused_mlp(x.to(dtype), weights, rowmap, mlp.dequantized(dtype), activation)


def _times(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, scale.dtype)
    return (matrix.to(wide) * scale.to(wide)).to(dtype)


def _quantized(matrix: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 8-bit numbers and the scales; dim is summed over in the product."""
    wide = matrix.detach().float()
    if not wide.isfinite().all():
        raise ValueError("got experts with infinite weights or NaN, wanted finite ones: load or train them anew")
    largest = wide.abs().amax(dim, keepdim=True)
    scale = (torch.where(largest > 0, largest, 1.0) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = wide / scale
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale.squeeze(dim)
