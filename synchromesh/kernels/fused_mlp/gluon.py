"""fused_mlp with every product by Gluon kernels, for sm_90 and sm_100: what is saved is as in `triton.py` beside it.

Sums over a token's rows stay with Triton; with one choice products store to tokens, and nothing is summed. Sums over an
expert's rows, for biases, are products with one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.fused_mlp.few import is_few, rows_of_few
from synchromesh.kernels.fused_mlp.op import define, pre_activations, run, wanted
from synchromesh.kernels.grouped_mm import gluon
from synchromesh.kernels.grouped_mm.choice import Kind
from synchromesh.kernels.grouped_mm.triton import Scatter
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.triton import sum_rows, whole_tokens
from synchromesh.kernels.tiles import tiles_of
from synchromesh.types import RowMap

ALIGNED = 8  # numbers of 16 bits in 16 bytes


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y; what Gluon's kernels do not take goes to Triton's.

    Raises ValueError where x and the expert weights are not of one dtype.
    """
    experts, hidden, width = mlp.down.shape
    name = known_name(activation)
    if mlp.quantized or name is None or not gluon.takes(x, (experts, width, hidden)):
        from synchromesh.kernels.quantized_mlp import triton

        return triton.fused_mlp(x, weights, rowmap, mlp, activation)
    return run(_fused_mlp, x, weights, rowmap, name, mlp, more=[rowmap.token_of_rows()])


def is_faster(x: Tensor, pairs: Tensor, down: Tensor) -> bool:
    """Tell whether opening, closing and the gradients of matrices were all measured to be fastest by Gluon's kernels.

    Args:
        x: [T, D].
        pairs: [R].
        down: [E, F, D].
    """
    experts, hidden, width = down.shape
    asked = (
        (Kind.OPENING, (experts, width, hidden)),
        (Kind.PRODUCT, (experts, hidden, width)),
        (Kind.WEIGHTS, (experts, hidden, width)),
    )
    return all(gluon.is_faster(kind, x, shape, num_rows=len(pairs)) for kind, shape in asked)


@on_its_device
def forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Do what `define` wants of a forward."""
    net, x, rows, weights = _net(mlp, joint=joint), aligned(x), rows.contiguous(), weights.contiguous()
    pre_up, pre_gate = (x.new_empty(shape) for shape in pre_activations(pairs, mlp, save=save))
    if not save and is_few(len(pairs), len(ends)):
        out = rows_of_few(x, pairs, ends, activation, net, rows.shape[1])
        return sum_rows(out, rows, weights, dtype=x.dtype), pre_up, pre_gate
    launch = _launch()
    pre = _pre(pre_up, pre_gate, joint=joint) if save else None
    tiles = tiles_of(ends, len(pairs), launch.ROWS)
    hidden = x.new_empty(len(pairs), net.up.shape[1])
    biases = (net.up_bias, net.gate_bias)
    launch.opening(x, net.up, net.gate, tiles, tokens, activation, hidden=hidden, biases=biases, pre=pre)
    if rows.shape[1] == 1:
        y = whole_tokens(x, rows)
        to = Scatter(tokens, weights)
        launch.product(hidden, net.down, tiles, out=y, bias=net.down_bias, scatter=to)
        return y, pre_up, pre_gate
    out = gluon.product(hidden, net.down, ends, bias=net.down_bias, tiles=tiles)
    return sum_rows(out, rows, weights, dtype=x.dtype), pre_up, pre_gate


@on_its_device
def backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Do what `define` wants of a backward."""
    x, weights, pairs, rows, ends, tokens, *kept = saved
    launch, net = _launch(), _net(mlp, joint=joint)
    grad, x, weights, rows = aligned(grad.contiguous()), aligned(x), weights.contiguous(), rows.contiguous()
    d_mlp = wanted(mlp, needs, torch.empty_like)
    into = Net(*(d if d.numel() else None for d in d_mlp)).apart(joint=joint)
    tiles = tiles_of(ends, len(pairs), launch.ROWS)
    pre_up, pre_gate = _pre(*kept, joint=joint)
    pre = (pre_up, None if net.gate is None else pre_gate)
    by = (pairs, tokens)
    # hidden, d_up and d_gate arrive multiplied by s, so that every product below is a plain grouped one.
    hidden, d_up, d_gate, partial = launch.closing_gradient(grad, net.down, weights, tiles, by, activation, pre)
    for d, left, right in ((into.down, hidden, grad), (into.up, d_up, x), (into.gate, d_gate, x)):
        if d is not None:
            launch.weight_gradient(left, right, ends, out=d, tokens=tokens, turn=tiles.turn)
    _bias_gradients(into, (d_up, d_gate, grad), weights, ends, by)
    d_weights = torch.zeros_like(weights)
    if needs[1] and len(pairs):
        d_weights = _weights_gradient(partial.sum(0), grad, weights, net.down_bias, ends, by)
    if not needs[0]:
        return x.new_empty(0), d_weights, d_mlp
    second = None if net.gate is None else (d_gate, net.gate)
    if rows.shape[1] == 1:
        d_x = whole_tokens(x, rows)
        launch.product(d_up, net.up, tiles, out=d_x, second=second, scatter=Scatter(tokens))
        return d_x, d_weights, d_mlp
    d_rows = launch.product(d_up, net.up, tiles, out=x.new_empty(len(pairs), x.shape[1]), second=second)
    return sum_rows(d_rows, rows, None, dtype=x.dtype), d_weights, d_mlp


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps but between its first dim's parts, at addresses that are multiples of 16 bytes."""
    whole = tensor[:1].is_contiguous() and tensor.stride(0) % ALIGNED == 0 and tensor.data_ptr() % 16 == 0
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _net(mlp: Sequence[Tensor | None], *, joint: bool) -> Net:
    """Return the weights with gate and up as separate tensors, as the kernels read them."""
    up, down, gate, *biases = Net(*mlp).apart(joint=joint)[:6]
    matrices = (None if part is None else aligned(part) for part in (up, down, gate))
    return Net(*matrices, *(None if bias is None else bias.contiguous() for bias in biases))


def _pre(pre_up: Tensor, pre_gate: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Return memory [R, F] for the pre-activations of up and of gate; where they are joint, both lie in pre_up."""
    if not joint:
        return pre_up, pre_gate
    gate, up = pre_up.view(2, len(pre_up), pre_up.shape[1] // 2)
    return up, gate


def _bias_gradients(
    into: Net, grads: tuple[Tensor, Tensor | None, Tensor], weights: Tensor, ends: Tensor, by: tuple[Tensor, Tensor]
) -> None:
    """Write the gradients of biases: sums over an expert's rows, as products with one column, eight times over."""
    (d_up, d_gate, grad), launch, experts = grads, _launch(), len(ends)
    ones = grad.new_ones(len(d_up), ALIGNED)
    for d, sums in ((into.up_bias, d_up), (into.gate_bias, d_gate)):
        if d is not None and sums is not None:
            d.copy_(launch.weight_gradient(ones, sums, ends, out=sums.new_empty(experts, ALIGNED, d.shape[1]))[:, 0])
    if into.down_bias is not None:
        scale = weights.view(-1)[by[0].clamp(min=0)].to(grad.dtype)[:, None].expand(-1, ALIGNED).contiguous()
        out = grad.new_empty(experts, ALIGNED, grad.shape[1])
        into.down_bias.copy_(launch.weight_gradient(scale, grad, ends, out=out, tokens=by[1])[:, 0])


def _weights_gradient(
    dots: Tensor, grad: Tensor, weights: Tensor, bias: Tensor | None, ends: Tensor, by: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the gradient of the weights: <dA', A> of each row, and <dy, bias> where the output has a bias."""
    pairs, tokens = by
    if bias is not None:
        number = torch.arange(len(pairs), dtype=ends.dtype, device=ends.device)
        owner = torch.searchsorted(ends, number, right=True).clamp_(max=len(ends) - 1)
        every = grad.float() @ bias.float().t()  # [T, E]: narrower than the rows of bias beside those of dy
        dots = dots + every[tokens.clamp(min=0), owner]
    found = weights.new_zeros(weights.numel() + 1)
    found[pairs] = dots.to(found.dtype)  # the tail's -1 is the last number, which nobody reads
    return found[:-1].view(weights.shape)


def _launch() -> ModuleType:
    from synchromesh.kernels.gluon import launch

    return launch


_fused_mlp = define("gluon", forward, backward, device=None, more=("tokens",))
