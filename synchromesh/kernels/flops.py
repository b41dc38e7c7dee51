"""How many floating-point operations the matrix products make. Import it before torch's FlopCounterMode counts them.

It is not part of `import synchromesh`: torch's counter takes 0.2 s to import, and warns where there is no Triton.
Counted are rows of the buffer, which without a capacity are all pairs; 2 operations for each multiply and add.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from synchromesh import kernels, torch_private

Shape = Sequence[int]


def _grouped_mm(rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _grouped_mm_backward(
    grad: Shape, rows: Shape | None, weight: Shape, ends: Shape, needs: list[bool], **_: Any
) -> int:
    # The gradients of rows and of the weight cost one product each; that of a bias costs none.
    return sum(needs[:2]) * 2 * grad[0] * weight[1] * weight[2]


def _fused_mlp(*shapes: Any, **_: Any) -> int:
    # The third argument is pairs [R]; the last six are a Net without scales, whose matrices come first.
    return 2 * shapes[2][0] * sum(map(_numbers, shapes[-6:-3]))


def _fused_mlp_backward(
    grad: Shape, saved: list[Shape], net: list[Shape | None], activation: str, joint: bool, needs: list[bool], **_: Any
) -> int:
    up, down, gate = map(_numbers, net[:3])
    own = sum(numbers for numbers, need in zip((up, down, gate), needs[2:5], strict=True) if need)
    return 2 * saved[2][0] * (down + (up + gate) * needs[0] + own)  # dA', d_x, and each matrix's own gradient


def _direct_mlp(
    x: Shape, weights: Shape, expert_ids: Shape, activation: str, joint: bool, net: list[Shape | None], **_: Any
) -> int:
    return 2 * expert_ids[0] * expert_ids[1] * sum(map(_numbers, net[:3]))


def _quantized_mlp(
    x: Shape, weights: Shape, pairs: Shape, rows: Shape, ends: Shape, activation: str, net: list[Shape | None], **_: Any
) -> int:
    return 2 * pairs[0] * sum(map(_numbers, net[:3]))


def _onednn_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _numbers(matrix: Shape | None) -> int:
    """Return the numbers of one expert's matrix."""
    return 0 if matrix is None else matrix[1] * matrix[2]


def _register(device: str) -> None:
    formulas = {
        **{f"grouped_mm{kind}": _grouped_mm for kind in ("", "_float8", "_mxfloat8")},
        **{f"grouped_mm_backward{kind}": _grouped_mm_backward for kind in ("", "_float8", "_mxfloat8")},
        "fused_mlp": _fused_mlp,
        "fused_mlp_backward": _fused_mlp_backward,
        "direct_mlp": _direct_mlp,
        "quantized_mlp": _quantized_mlp,
    }
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.synchromesh, f"{name}_{device}"))(formula)


_register("cpu")
if torch_private.ONEDNN_LINEAR is not None:
    register_flop_formula(torch_private.ONEDNN_LINEAR)(_onednn_linear)
if kernels.HAS_TRITON:
    importlib.import_module("synchromesh.kernels.gpu")  # defines the ops of GPUs
    _register("triton")
