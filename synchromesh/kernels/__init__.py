"""The kernels: a folder per family; `reference.py` defines it, every other file is a faster way to the same numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synchromesh.kernels import composed
from synchromesh.kernels.direct_mlp import cpu as direct_mlp_cpu
from synchromesh.kernels.direct_mlp import reference as direct_mlp_reference
from synchromesh.kernels.fused_mlp import cpu as fused_mlp_cpu
from synchromesh.kernels.fused_mlp import reference as fused_mlp_reference
from synchromesh.kernels.gate import reference as gate_reference
from synchromesh.kernels.grouped_mm import cpu as grouped_mm_cpu
from synchromesh.kernels.grouped_mm import reference as grouped_mm_reference
from synchromesh.kernels.mark import reference as mark_reference
from synchromesh.kernels.mlp import Activation, MLPWeights, quantize
from synchromesh.kernels.permute import cpu as permute_cpu
from synchromesh.kernels.permute import reference as permute_reference
from synchromesh.kernels.positions import cpu as positions_cpu
from synchromesh.kernels.positions import reference as positions_reference
from synchromesh.kernels.quantized_mlp import cpu as quantized_mlp_cpu
from synchromesh.kernels.row_map import reference as row_map_reference
from synchromesh.kernels.scaled_mm import cpu as scaled_mm_cpu
from synchromesh.kernels.scaled_mm import reference as scaled_mm_reference
from synchromesh.kernels.scaled_mm.reference import Float8Products, MXFloat8Products, Products
from synchromesh.kernels.segment_map import reference as segment_map_reference
from synchromesh.kernels.select import reference as select_reference
from synchromesh.kernels.select.reference import Selection
from synchromesh.torch_private import transformed, vmapped
from synchromesh.types import RowMap

__all__ = [
    "CPU",
    "REFERENCE",
    "Activation",
    "Float8Products",
    "Kernels",
    "MLPWeights",
    "MXFloat8Products",
    "Products",
    "kernels_for",
    "quantize",
]


@dataclass(frozen=True)
class Kernels:
    """One implementation of every kernel family; two of them make an A/B test.

    Attributes:
        gate: (x, weight, dtype=) -> logits, a router's product.
        select: (logits, k, gate=, normalize=, bias=, sums=) -> scores, expert_ids, weights, score_sums, choice_counts.
        positions: (expert_ids, num_experts, priority=None) -> places, counts.
        row_map: (expert_ids, places, counts, num_rows=, capacity=) -> the RowMap.
        segment_map: (counts, num_rows=, part=, parts=) -> the RowMap of rows that came through an exchange.
        gather: (x, rowmap) -> rows.
        combine: (buffer, weights, rowmap) -> y.
        grouped_mm: (rows, weight, ends, bias=None) -> rows.
        scaled_mm: as grouped_mm, with products=, which 8-bit numbers are multiplied.
        fused_mlp: (x, weights, rowmap, mlp, activation) -> y, for any activation, and for 8-bit weights too.
        fuses: tells whether fused_mlp runs an activation inside its fused kernel; others it composes from the pieces.
        mark: (y, weights, expert_ids) -> y with NaN where a weight is no number; y may be written to.
        direct_mlp: (x, weights, expert_ids, mlp, activation) -> y, without gradient.
        prefers_direct: (pairs, experts, activation) -> whether direct_mlp is faster, where no gradient is wanted.
        marked_mlp: (x, weights, rowmap, expert_ids, mlp, activation) -> mark of fused_mlp, without a pass over y; None
            runs one after the other. Whoever replaces either of these replaces this too.
    """

    gate: Callable[..., Tensor]
    select: Callable[..., Selection]
    positions: Callable[..., tuple[Tensor, Tensor]]
    row_map: Callable[..., RowMap]
    segment_map: Callable[..., RowMap]
    gather: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    grouped_mm: Callable[..., Tensor]
    scaled_mm: Callable[..., Tensor]
    fused_mlp: Callable[..., Tensor]
    fuses: Callable[[Activation], bool]
    mark: Callable[..., Tensor]
    direct_mlp: Callable[..., Tensor]
    prefers_direct: Callable[[int, int, Activation], bool]
    marked_mlp: Callable[..., Tensor] | None = None


HAS_TRITON = importlib.util.find_spec("triton") is not None


def _fuses_nothing(activation: Activation) -> bool:
    return False


def _never(num_pairs: int, num_experts: int, activation: Activation) -> bool:
    return False


REFERENCE = Kernels(
    gate=gate_reference.gate,
    select=select_reference.select,
    positions=positions_reference.positions,
    row_map=row_map_reference.row_map,
    segment_map=segment_map_reference.segment_map,
    gather=permute_reference.gather,
    combine=permute_reference.combine,
    grouped_mm=grouped_mm_reference.grouped_mm,
    scaled_mm=scaled_mm_reference.scaled_mm,
    fused_mlp=fused_mlp_reference.fused_mlp,
    fuses=_fuses_nothing,
    mark=mark_reference.mark,
    direct_mlp=direct_mlp_reference.direct_mlp,
    prefers_direct=_never,
)
CPU = Kernels(
    gate=gate_reference.gate,
    select=select_reference.select,
    positions=positions_cpu.positions,
    row_map=row_map_reference.row_map,
    segment_map=segment_map_reference.segment_map,
    gather=permute_cpu.gather,
    combine=permute_cpu.combine,
    grouped_mm=grouped_mm_cpu.grouped_mm,
    scaled_mm=scaled_mm_cpu.scaled_mm,
    fused_mlp=quantized_mlp_cpu.fused_mlp,
    fuses=fused_mlp_cpu.fuses,
    mark=mark_reference.mark,
    direct_mlp=direct_mlp_cpu.direct_mlp,
    prefers_direct=direct_mlp_cpu.prefers_direct,
)


TRANSFORMABLE = dataclasses.replace(REFERENCE, scaled_mm=composed.scaled_mm)
COMPOSED = dataclasses.replace(TRANSFORMABLE, grouped_mm=composed.grouped_mm, fused_mlp=composed.fused_mlp)


def kernels_for(device: torch.device, given: Kernels | None = None) -> Kernels:
    """Return the given kernels, or else the fastest for a device; inside torch.func those that it can transform.

    On GPUs from sm_80 and on AMD's these are Triton's, where torch brought it.
    """
    if transformed():
        return COMPOSED if vmapped() else TRANSFORMABLE
    if given is not None:
        return given
    if device.type == "cpu":
        return CPU
    if device.type != "cuda" or not HAS_TRITON:
        return REFERENCE
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return REFERENCE
    from synchromesh.kernels.gpu import TRITON

    return TRITON
