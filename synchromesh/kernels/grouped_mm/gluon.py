"""grouped_mm by warp-specialised Gluon kernels: bfloat16 and float16, widths that are multiples of 8.

They run where the measured table says that they are faster, or where somebody names them: `Local(kernels=GLUON)`.
What they do not take goes to Triton's kernels. Gluon is imported when it is asked for: not every Triton has it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import op
from synchromesh.kernels.grouped_mm.choice import Kind, Way, architecture_of, shipped
from synchromesh.kernels.grouped_mm.favoured import ProductShape, asked_rows, runs
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.tiles import Tiles, tiles_of

ARCHITECTURES = ("sm_90", "sm_100")
"""Each has kernels of its own: instructions of one are unknown to the other."""


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply each expert's rows by its matrix and add its bias; the tail is left as it is.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, (weight_, bias_) = autocast_alike(rows, [weight, bias])
    assert weight_ is not None
    if not takes(rows, weight_.shape):
        return _triton().grouped_mm(rows, weight_, ends, bias_)
    return _grouped_mm(rows, weight_, ends, bias_)


def takes(rows: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether the Gluon kernels have products of such rows and a shape [E, I, O] where the rows are."""
    whole = all(size > 0 and size % 8 == 0 for size in shape[1:]) and shape[0] > 0
    narrow = rows.dtype in (torch.bfloat16, torch.float16)
    return whole and narrow and architecture_of(rows.device) in ARCHITECTURES and _has_gluon()


def is_faster(kind: Kind, rows: Tensor, shape: Sequence[int], *, num_rows: int | None = None) -> bool:
    """Tell whether a measured cell says that the Gluon kernels are the fastest of all.

    num_rows: R, where rows are tokens that are gathered.
    """
    if not takes(rows, shape):
        return False
    experts, depth, width = shape
    each = asked_rows(len(rows) if num_rows is None else num_rows, experts)
    asked = ProductShape(kind, experts, each, depth, width, rows.dtype)
    return runs(asked, architecture_of(rows.device), shipped(), tuple(Way)) is Way.GLUON


def product(a: Tensor, w: Tensor, ends: Tensor, *, bias: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
    """Return a[r] · w[e] + bias[e] for the rows of each expert, [R, O]; the tail may hold anything.

    Args:
        a: [R, I].
        w: [E, I, O], any strides.
        ends: int32 [E], running sum of the rows of each expert.
        bias: [E, O].
        tiles: of the rows, 128 high, where they are known.
    """
    launch = _launch()
    tiles = tiles_of(ends, len(a), launch.ROWS) if tiles is None else tiles
    out = a.new_empty(len(a), w.shape[2])
    return launch.product(_aligned(a.contiguous()), launch.laid_out(w), tiles, out=out, bias=bias)


def rows_gradient(grad: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient of the rows of a product with weight [E, I, O]: [R, I], zero in the tail."""
    d_rows = product(grad, weight.mT, ends)
    tail = torch.arange(len(grad), device=ends.device) >= ends[-1:]
    return d_rows.masked_fill_(tail[:, None], 0)


def weight_gradient(left: Tensor, right: Tensor, ends: Tensor, *, like: Tensor) -> Tensor:
    """Return the sum over an expert's rows of left[r]ᵀ · right[r], laid out as `like` [E, M, N] is.

    Args:
        left: [R, M], contiguous.
        right: [R, N], contiguous.
        ends: int32 [E], running sum of the rows of each expert.
        like: [E, M, N]; only its layout is read.
    """
    out = torch.empty_like(like)
    return _launch().weight_gradient(_aligned(left), _aligned(right), ends, out=out)


@on_its_device
def _forward(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    return product(rows, weight, ends, bias=None if bias is None else bias.contiguous())


@on_its_device
def _backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    d_rows, d_weight, d_bias = (grad.new_empty(0) for _ in needs)
    if needs[0]:
        d_rows = rows_gradient(grad, weight, ends)
    if rows is not None:
        d_weight = weight_gradient(rows.contiguous(), grad, ends, like=weight)
    if needs[2]:
        d_bias = grad.new_empty(len(ends), grad.shape[1])
        _triton().column_sums(grad, ends, out=d_bias)
    return d_rows, d_weight, d_bias


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.cache
def _has_gluon() -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def _launch() -> ModuleType:
    from synchromesh.kernels.gluon import launch

    return launch


def _triton() -> ModuleType:
    from synchromesh.kernels.grouped_mm import triton

    return triton


_grouped_mm = op.define("gluon", _forward, _backward, device=None)
