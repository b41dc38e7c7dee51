"""Experts of 8 bits, for inference: a quarter of float32's bytes to hold, and to read for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels import Kernels, MLPWeights, quantize
from synchromesh.kernels.mlp import LARGEST
from synchromesh.moe.experts import Activation, Cut, Experts, StackedExperts
from synchromesh.types import RowMap


class QuantizedExperts(Experts):
    """Feed-forward experts whose matrices are int8 or float8 numbers, with a float32 scale for each channel.

        W[e, i, o] = numbers[e, i, o] * scale[e, o],   scale[e, o] = max_i |W[e, i, o]| / largest number

    They have no parameters, only buffers; gradients flow to the input. Their parts are not pooled: each rank holds
    whole experts. Dropout is left out.

    Args:
        experts: `MLPExperts` or `GatedMLPExperts`.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        ValueError: another dtype; weights that are not finite; a cut through experts.
    """

    def __init__(self, experts: StackedExperts, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        parts = experts.weights()
        if len(parts["up"]) * experts.cut.count != experts.num_experts:
            raise ValueError(f"got experts cut into shards ({experts.cut}), wanted whole ones: quantize before cutting")
        self.num_experts, self.width, self.hidden = experts.num_experts, experts.width, experts.hidden
        self.activation, self.cut = experts.activation, experts.cut
        mlp = quantize(MLPWeights.of({name: part.detach() for name, part in parts.items()}), dtype)
        for name, part in mlp.tensors()._asdict().items():
            self.register_buffer(name, part if part is None else part.clone())
        if experts.spread is not None:
            experts.spread.attach(self)

    def parts(self) -> dict[str, Tensor]:
        return {}

    def hold(self, cut: Cut) -> None:
        if cut == self.cut:
            return
        if self.cut.count > 1 or self.num_experts % cut.count:
            raise ValueError(
                f"got {cut} of {self.num_experts} quantized experts held as {self.cut}, wanted whole experts in equal "
                "numbers: take as many experts as ranks, or a multiple"
            )
        for name, part in self.named_buffers():
            setattr(self, name, part.chunk(cut.count)[cut.index].clone())
        self.cut = cut

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        rowmap = RowMap.of_rows(rows.shape[0], ends)
        return kernels.fused_mlp(rows, rows.new_ones(rows.shape[0], 1), rowmap, *self.mlp(weights))

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation]:
        return MLPWeights.of(dict(self.named_buffers())), self.activation

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Tensor], prefix: str, *others: Any
    ) -> None:
        """Refuse numbers of another kind, which would be cast: they mean nothing to these scales."""
        for name, own in self.named_buffers():
            given = state_dict.get(prefix + name, own)
            if given.dtype != own.dtype and own.dtype in LARGEST:
                *_, errors = others
                errors.append(
                    f"{prefix}{name} is {given.dtype}, wanted {own.dtype}: call quantize_experts with that dtype, or "
                    "load the weights before they are quantized"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        """Keep dtypes where a model is converted as a whole: numbers would widen, scales lose digits."""

        def moved(part: Tensor) -> Tensor:
            new = fn(part)
            return new if new.dtype == part.dtype else part.to(new.device)

        return super()._apply(moved, recurse)
