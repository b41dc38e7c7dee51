"""The feed-forward networks of experts as one value, and as the tensors that custom ops take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.export import register_dataclass

Activation = Callable[[Tensor], Tensor]

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The 8-bit numbers that matrices may be, and the largest of each kind."""


@dataclass(frozen=True)
class MLPWeights:
    """The feed-forward networks of E experts: a = act(x·upᵀ), or act(x·gateᵀ) * (x·upᵀ) if gated; y = a·down.

    A hidden unit is one row of up, of gate and of down. Biases are added to each product where they are given. Where
    matrices are int8 or float8_e4m3fn, each number that comes out of a product is multiplied by its scale.

    Attributes:
        up: U = F; or 2 F where gate and up lie in one tensor, the rows of gate first.
        down: of the second product.
        gate: None where there is none, or where it lies in up.
        up_bias: of up, and of gate where that lies in up.
        gate_bias: of gate.
        down_bias: of the output.
        up_scale: float32; None where up is no 8-bit matrix.
        gate_scale: float32, as gate.
        down_scale: float32, as down.
        joint: whether up holds gate too.

    Raises:
        ValueError: a gate's bias without the gate, a gate beside a joint one, or a scale too few or too many.
    """

    up: Shaped[Tensor, "E U D"]
    down: Shaped[Tensor, "E F D"]
    gate: Shaped[Tensor, "E F D"] | None = None
    up_bias: Float[Tensor, "E U"] | None = None
    gate_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None
    up_scale: Float[Tensor, "E F"] | None = None
    gate_scale: Float[Tensor, "E F"] | None = None
    down_scale: Float[Tensor, "E D"] | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        if self.gate is None and self.gate_bias is not None:
            raise ValueError("got a gate_bias without a gate, wanted both or neither: pass gate too")
        if self.joint and self.gate is not None:
            raise ValueError("got joint weights with a gate of their own, wanted its rows in up, or joint=False")
        hidden, wanted = self.up.shape[1], self.down.shape[1] * (2 if self.joint else 1)
        if hidden != wanted:
            raise ValueError(f"got up with {hidden} rows, wanted {wanted}; joint=True says that up holds gate too")
        scaled = [self.up_scale is not None, self.down_scale is not None, self.gate_scale is not None]
        if scaled not in ([False] * 3, [True, True, self.gate is not None]):
            raise ValueError("got scales for some matrices, wanted one for each of up, down and gate, or none")

    @classmethod
    def of(cls, parts: Mapping[str, Tensor | None], *, joint: bool = False) -> MLPWeights:
        """Return those of tensors by their names."""
        return cls(**cast(Any, parts), joint=joint)

    @property
    def quantized(self) -> bool:
        """Whether matrices are 8-bit numbers."""
        return self.up_scale is not None

    def tensors(self) -> Net:
        """Return the tensors alone."""
        biases, scales = (
            (self.up_bias, self.gate_bias, self.down_bias),
            (self.up_scale, self.gate_scale, self.down_scale),
        )
        return Net(self.up, self.down, self.gate, *biases, *scales)

    def apart(self) -> MLPWeights:
        """Return the same weights with gate and up as separate tensors: views of a joint one."""
        return MLPWeights.of(self.tensors().apart(joint=True)._asdict()) if self.joint else self

    def dequantized(self, dtype: torch.dtype) -> MLPWeights:
        """Return the weights that 8-bit numbers and their scales stand for, in a dtype; others as they are."""
        if self.up_scale is None or self.down_scale is None:
            return self
        gate = None
        if self.gate is not None and self.gate_scale is not None:
            gate = _times(self.gate, self.gate_scale[:, :, None], dtype)
        up = _times(self.up, self.up_scale[:, :, None], dtype)
        down = _times(self.down, self.down_scale[:, None, :], dtype)
        up_bias, gate_bias, down_bias = (
            None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.gate_bias, self.down_bias)
        )
        return MLPWeights(up, down, gate, up_bias, gate_bias, down_bias)


register_dataclass(MLPWeights)


class Net(NamedTuple):
    """The tensors of `MLPWeights`, of all experts or of one; or their gradients, None where none is wanted."""

    up: Any
    down: Any
    gate: Any = None
    up_bias: Any = None
    gate_bias: Any = None
    down_bias: Any = None
    up_scale: Any = None
    gate_scale: Any = None
    down_scale: Any = None

    def apart(self, *, joint: bool) -> Net:
        """Return them with gate and up as separate tensors: views, where they were joint."""
        if not joint:
            return self
        gate, up = (None, None) if self.up is None else self.up.chunk(2, 1)
        gate_bias, up_bias = (None, None) if self.up_bias is None else self.up_bias.chunk(2, 1)
        return self._replace(up=up, gate=gate, up_bias=up_bias, gate_bias=gate_bias)

    def of_each(self, num_experts: int) -> list[Net]:
        """Return the tensors of each expert, one net an expert."""
        each = ([None] * num_experts if part is None else part.unbind(0) for part in self)
        return [Net(*own) for own in zip(*each, strict=True)]


MATRICES = 3
"""How many of a net's tensors, from the first on, are matrices."""

LEARNABLE = 6
"""How many of a net's tensors, from the first on, may want a gradient: all but the scales."""


def quantize(mlp: MLPWeights, dtype: torch.dtype) -> MLPWeights:
    """Return the nearest 8-bit numbers; the largest of each channel is kept to the scale's rounding.

    Raises:
        ValueError: dtype is not torch.int8 or torch.float8_e4m3fn, or a matrix is not finite.
    """
    if dtype not in LARGEST:
        raise ValueError(f"got {dtype} to quantize to, wanted one of {', '.join(map(str, LARGEST))}")
    mlp = mlp.apart()
    up, up_scale = _quantized(mlp.up, 2, dtype)
    down, down_scale = _quantized(mlp.down, 1, dtype)
    gate, gate_scale = (None, None) if mlp.gate is None else _quantized(mlp.gate, 2, dtype)
    return dataclasses.replace(
        mlp, up=up, down=down, gate=gate, up_scale=up_scale, gate_scale=gate_scale, down_scale=down_scale
    )


def _times(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, scale.dtype)
    return (matrix.to(wide) * scale.to(wide)).to(dtype)


def _quantized(matrix: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 8-bit numbers and the scales; dim is summed over in the product."""
    wide = matrix.detach().float()
    if not wide.isfinite().all():
        raise ValueError("got experts with infinite weights or NaN, wanted finite ones: load or train them again")
    largest = wide.abs().amax(dim, keepdim=True)
    # A channel of zeros gets scale 1; no other scale is so small that a division by it gives infinity.
    scale = (torch.where(largest > 0, largest, 1.0) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = wide / scale
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale.squeeze(dim)
