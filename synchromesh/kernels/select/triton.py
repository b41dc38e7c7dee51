"""select on a GPU: a block of tokens with all their experts in registers, forward and backward in one kernel each."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.select import reference

MOST_EXPERTS, MOST_CHOICES = 4096, 128  # whose numbers fit into registers
NUMBERS = 2048  # of a block


def select(
    logits: Float[Tensor, "T E"], k: int, *, gate: str, normalize: bool = False, bias: Float[Tensor, " E"] | None = None
) -> tuple[Float[Tensor, "T E"], Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Compute the reference's scores, ids and weights; of equal scores the first expert's comes first."""
    if logits.dtype != torch.float32 or logits.shape[1] > MOST_EXPERTS or k > MOST_CHOICES:
        return reference.select(logits, k, gate=gate, normalize=normalize, bias=bias)
    return _select_op(logits, bias, k, gate, normalize and k > 1 and gate != "softmax_of_selected")


@torch.library.custom_op(
    "synchromesh::select_triton",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, int k, str gate, bool normalize) -> (Tensor, Tensor, Tensor)",
)
@on_its_device
def _select_op(
    logits: Tensor, bias: Tensor | None, k: int, gate: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    scores, ids, weights = _results(logits, k)
    if len(logits):
        grid, sizes = _shape(logits, k)
        _select[grid](
            logits, given_or(bias, logits), scores, ids, weights, *logits.shape,
            GATE=gate, NORMALIZE=normalize, BIASED=bias is not None, **sizes,
        )  # fmt: skip
    return scores, ids, weights


@torch.library.custom_op(
    "synchromesh::select_backward_triton",
    mutates_args=(),
    schema="(Tensor scores, Tensor ids, Tensor weights, Tensor? d_scores, Tensor? d_weights, str gate, bool normalize)"
    " -> Tensor",
)
@on_its_device
def _select_backward_op(
    scores: Tensor, ids: Tensor, weights: Tensor, d_scores: Tensor | None, d_weights: Tensor | None, gate: str,
    normalize: bool,
) -> Tensor:  # fmt: skip
    d_logits = torch.empty_like(scores)
    if len(scores):
        grid, sizes = _shape(scores, ids.shape[1])
        d_scores, d_weights = (None if d is None else d.contiguous() for d in (d_scores, d_weights))
        _select_backward[grid](
            scores, ids, weights, given_or(d_scores, scores), given_or(d_weights, scores), d_logits, *scores.shape,
            GATE=gate, NORMALIZE=normalize, BY_SCORES=d_scores is not None, BY_WEIGHTS=d_weights is not None, **sizes,
        )  # fmt: skip
    return d_logits


def _results(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(logits.shape), logits.new_empty(tokens, k, dtype=torch.int64), logits.new_empty(tokens, k)


def _shape(logits: Tensor, k: int) -> tuple[tuple[Any], dict[str, Any]]:
    bins = max(2, triton.next_power_of_2(logits.shape[1]))
    block = max(1, min(64, NUMBERS // bins))
    sizes = {"K": k, "CHOICES": max(2, triton.next_power_of_2(k)), "BINS": bins, "BT": block}
    return (-(-len(logits) // block),), sizes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, ctx.gate, ctx.normalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _gradients(ctx: Any, d_scores: Tensor | None, _: None, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_scores is None and d_weights is None:
        return (None,) * 5
    d_logits = _select_backward_op(*ctx.saved_tensors, d_scores, d_weights, ctx.gate, ctx.normalize)
    return d_logits, None, None, None, None


_select_op.register_fake(lambda logits, bias, k, gate, normalize: _results(logits, k))
_select_backward_op.register_fake(lambda scores, *_: scores.new_empty(scores.shape))
_select_op.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _select(
    logits, bias, scores, ids, weights, tokens, experts,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    K: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e, c = tl.arange(0, BINS), tl.arange(0, CHOICES)
    mask = (t < tokens)[:, None] & (e < experts)[None, :]
    at = t[:, None] * experts + e[None, :]
    x = tl.load(logits + at, mask=mask, other=float("-inf"))
    broken = tl.sum((mask & ((x - x) != 0.0)).to(tl.int32), 1) > 0  # infinite, or NaN
    if GATE == "sigmoid":
        s = tl.sigmoid(x)
    else:
        z = tl.exp(x - tl.max(x, 1)[:, None])
        s = z / tl.sum(z, 1)[:, None]
    tl.store(scores + at, s, mask=mask)
    preference = s
    if BIASED:
        preference += tl.load(bias + e, mask=e < experts, other=0.0)[None, :]
    preference = tl.where(preference != preference, float("inf"), preference)  # as torch: NaN before all others
    free = mask  # an expert is taken once, whatever its bias
    w = tl.zeros((BT, CHOICES), tl.float32)
    i = tl.zeros((BT, CHOICES), tl.int64)
    for k in range(K):
        best = tl.max(tl.where(free, preference, float("-inf")), 1)
        index = tl.min(tl.where(free & (preference == best[:, None]), e[None, :], BINS), 1)
        taken = e[None, :] == index[:, None]
        of_it = tl.sum(tl.where(taken, x if GATE == "softmax_of_selected" else s, 0.0), 1)
        now = (c == k)[None, :]
        w = tl.where(now, of_it[:, None], w)
        i = tl.where(now, index[:, None].to(tl.int64), i)
        free = free & (e[None, :] != index[:, None])
    chosen = (c < K)[None, :]
    if GATE == "softmax_of_selected":
        w = tl.where(chosen, w, float("-inf"))
        w = tl.exp(w - tl.max(w, 1)[:, None])
        w = w / tl.sum(w, 1)[:, None]
    if NORMALIZE:
        w = w / tl.maximum(tl.sum(w, 1), 1.1754943508222875e-38)[:, None]
    w = tl.where(broken[:, None], float("nan"), w)
    to = t[:, None] * K + c[None, :]
    own = (t < tokens)[:, None] & chosen
    tl.store(weights + to, w, mask=own)
    tl.store(ids + to, i, mask=own)


@triton.jit
def _select_backward(
    scores, ids, weights, d_scores, d_weights, d_logits, tokens, experts,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, BY_SCORES: tl.constexpr, BY_WEIGHTS: tl.constexpr,
    K: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e, c = tl.arange(0, BINS), tl.arange(0, CHOICES)
    mask = (t < tokens)[:, None] & (e < experts)[None, :]
    at = t[:, None] * experts + e[None, :]
    s = tl.load(scores + at, mask=mask, other=0.0)
    d = tl.zeros((BT, BINS), tl.float32)
    if BY_SCORES:
        d += tl.load(d_scores + at, mask=mask, other=0.0)
    d_chosen = tl.zeros((BT, BINS), tl.float32)
    if BY_WEIGHTS:
        of = t[:, None] * K + c[None, :]
        own = (t < tokens)[:, None] & (c < K)[None, :]
        i = tl.load(ids + of, mask=own, other=-1)
        w = tl.load(weights + of, mask=own, other=0.0)
        dw = tl.load(d_weights + of, mask=own, other=0.0)
        dw = tl.where(w != w, 0.0, dw)  # a token without finite logits learns nothing from its NaN
        w = tl.where(w != w, 0.0, w)
        if NORMALIZE or GATE == "softmax_of_selected":
            dw -= tl.sum(dw * w, 1)[:, None]
        if GATE == "softmax_of_selected":
            dw *= w
        total = tl.zeros((BT,), tl.float32)
        for k in range(K):
            now = (c == k)[None, :]
            taken = e[None, :] == tl.sum(tl.where(now, i, 0), 1)[:, None]
            d_chosen += tl.where(taken, tl.sum(tl.where(now, dw, 0.0), 1)[:, None], 0.0)
            total += tl.sum(tl.where(taken, s, 0.0), 1)
        if NORMALIZE:
            d_chosen = d_chosen / tl.maximum(total, 1.1754943508222875e-38)[:, None]
    if GATE != "softmax_of_selected":
        d += d_chosen
    d = d * s * (1.0 - s) if GATE == "sigmoid" else s * (d - tl.sum(s * d, 1)[:, None])
    if GATE == "softmax_of_selected":
        d += d_chosen
    tl.store(d_logits + at, d, mask=mask)
