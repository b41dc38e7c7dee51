"""select on a GPU: a block of tokens with all their experts in registers, forward and backward in one kernel each.

A program adds up scores and choices of its blocks, a second kernel adds up the programs in their order. The gradient of
the sums of scores is E numbers, which the backward adds to the gradient of every token's scores.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.select import reference
from synchromesh.kernels.select.reference import Selection

MOST_EXPERTS, MOST_CHOICES = 4096, 128  # that fit into registers; more go to the reference
BLOCK_NUMBERS = 1024  # logits of a block, tokens times experts
MOST_PROGRAMS = 512  # enough to fill a GPU, and few partial sums; further blocks are taken in turn
PART_COLUMNS, PART_ROWS = 32, 64  # experts and programs whose partial sums are added up at once
Results: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def select(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    gate: str,
    normalize: bool = False,
    bias: Float[Tensor, " E"] | None = None,
    sums: bool = True,
) -> Selection:
    """Compute what the reference does; of equal scores the first expert's comes first."""
    if logits.dtype != torch.float32 or logits.shape[1] > MOST_EXPERTS or k > MOST_CHOICES:
        return reference.select(logits, k, gate=gate, normalize=normalize, bias=bias, sums=sums)
    normalize = normalize and k > 1 and gate != "softmax_of_selected"
    scores, ids, weights, added, counted = _select_op(logits, bias, k, gate, normalize, sums)
    return (scores, ids, weights, added, counted) if sums else (scores, ids, weights, None, None)


@torch.library.custom_op(
    "synchromesh::select_triton",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, int k, str gate, bool normalize, bool sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@on_its_device
def _select_op(logits: Tensor, bias: Tensor | None, k: int, gate: str, normalize: bool, sums: bool) -> Results:
    logits = logits.contiguous()
    results, experts = _results(logits, k, sums), logits.shape[1]
    *of_tokens, added, counted = results
    if not len(logits):
        added.zero_()
        counted.zero_()
        return results
    (blocks,), sizes = _shape(logits, k)
    # Without sums a program takes one block. With them it takes `turns` blocks one after the other and keeps their sums
    # in registers; the partial sums are then added in the order of programs, so that every run gives the same.
    turns = triton.cdiv(blocks, MOST_PROGRAMS) if sums else 1
    programs = triton.cdiv(blocks, turns)
    parts = [added, counted]
    if sums and programs > 1:
        parts = [added.new_empty(programs, experts), counted.new_empty(programs, 2, experts, dtype=torch.int32)]
    _select[(programs,)](
        logits, given_or(bias, logits), *of_tokens, *parts, *logits.shape, turns,
        GATE=gate, NORMALIZE=normalize, BIASED=bias is not None, SUMS=sums, **sizes,
    )  # fmt: skip
    if sums and programs > 1:
        grid = (triton.cdiv(experts, PART_COLUMNS),)
        _add_programs[grid](*parts, added, counted, programs, experts, ROWS=PART_ROWS, COLUMNS=PART_COLUMNS)
    return results


@torch.library.custom_op(
    "synchromesh::select_backward_triton",
    mutates_args=(),
    schema="(Tensor scores, Tensor ids, Tensor weights, Tensor?[] gradients, str gate, bool normalize) -> Tensor",
)
@on_its_device
def _select_backward_op(
    scores: Tensor, ids: Tensor, weights: Tensor, gradients: list[Tensor | None], gate: str, normalize: bool
) -> Tensor:
    """Return the gradient of the logits; gradients are those of scores, weights and sums."""
    d_logits = torch.empty_like(scores)
    if len(scores):
        grid, sizes = _shape(scores, ids.shape[1])
        d_scores, d_weights, d_sums = given = [None if d is None else d.contiguous() for d in gradients]
        _select_backward[grid](
            scores, ids, weights, *(given_or(d, scores) for d in given), d_logits, *scores.shape,
            GATE=gate, NORMALIZE=normalize, BY_SCORES=d_scores is not None, BY_WEIGHTS=d_weights is not None,
            BY_SUMS=d_sums is not None, **sizes,
        )  # fmt: skip
    return d_logits


def _results(logits: Tensor, k: int, sums: bool) -> Results:
    """Return room for what select makes; sums that nobody wants are of no expert."""
    tokens, experts = logits.shape
    summed = experts if sums else 0
    ids, counts = (logits.new_empty(shape, dtype=torch.int64) for shape in ((tokens, k), (2, summed)))
    return logits.new_empty(tokens, experts), ids, logits.new_empty(tokens, k), logits.new_empty(summed), counts


def _shape(logits: Tensor, k: int) -> tuple[tuple[Any], dict[str, Any]]:
    bins = max(2, triton.next_power_of_2(logits.shape[1]))
    block = max(1, min(64, BLOCK_NUMBERS // bins))
    sizes = {"K": k, "CHOICES": max(2, triton.next_power_of_2(k)), "BINS": bins, "BT": block}
    sizes["num_warps"] = 8 if bins >= BLOCK_NUMBERS else 4
    return (-(-len(logits) // block),), sizes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *_, ctx.gate, ctx.normalize, _sums = inputs
    scores, ids, weights, _, counts = output
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, ids, weights)


def _gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    d_scores, _, d_weights, d_sums, _ = gradients
    given = [d_scores, d_weights, d_sums]
    if all(d is None for d in given):
        return (None,) * 6
    return _select_backward_op(*ctx.saved_tensors, given, ctx.gate, ctx.normalize), *(None,) * 5


_select_op.register_fake(lambda logits, bias, k, gate, normalize, sums: _results(logits, k, sums))
_select_backward_op.register_fake(lambda scores, *_: scores.new_empty(scores.shape))
_select_op.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _select(
    logits, bias, scores, ids, weights, part_sums, part_counts, tokens, experts, turns,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, SUMS: tl.constexpr,
    K: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    r, e, c = tl.arange(0, BT), tl.arange(0, BINS), tl.arange(0, CHOICES)
    at, to = r[:, None] * experts + e[None, :], r[:, None] * K + c[None, :]
    extra = tl.zeros((BINS,), tl.float32)
    if BIASED:
        extra = tl.load(bias + e, mask=e < experts, other=0.0)
    sums = tl.zeros((BINS,), tl.float32)
    firsts, all_choices = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for turn in range(turns):
        before = (tl.program_id(0).to(tl.int64) * turns + turn) * BT
        inside = r < tokens - before
        mask = inside[:, None] & (e < experts)[None, :]
        # Columns past the last expert are -inf: they change neither a maximum nor a sum of exponentials.
        x = tl.load(logits + before * experts + at, mask=mask, other=float("-inf"))
        broken = tl.sum((mask & ((x - x) != 0.0)).to(tl.int32), 1) > 0  # infinite, or NaN
        if GATE == "sigmoid":
            s = tl.sigmoid(x)
        else:
            z = tl.exp(x - tl.max(x, 1)[:, None])
            s = z / tl.sum(z, 1)[:, None]
        tl.store(scores + before * experts + at, s, mask=mask)
        if SUMS:  # rows past the last token are NaN here, hence the mask
            sums += tl.sum(tl.where(mask, s, 0.0), 0)
        preference = s
        if BIASED:
            preference += extra[None, :]
        preference = tl.where(preference != preference, float("inf"), preference)  # as torch: NaN before all others
        values = x if GATE == "softmax_of_selected" else s
        w, i, first, free = _choose(preference, values, mask, K, CHOICES, BINS, BT)
        if SUMS:
            firsts += tl.sum((e[None, :] == first[:, None]).to(tl.int32), 0)  # BINS, where there is no token
            all_choices += tl.sum(mask.to(tl.int32) - free.to(tl.int32), 0)
        chosen = (c < K)[None, :]  # CHOICES is K rounded up to a power of two
        if GATE == "softmax_of_selected":
            w = tl.where(chosen, w, float("-inf"))
            w = tl.exp(w - tl.max(w, 1)[:, None])
            w = w / tl.sum(w, 1)[:, None]
        if NORMALIZE:
            w = w / tl.maximum(tl.sum(w, 1), 1.1754943508222875e-38)[:, None]  # float32's smallest normal
        w = tl.where(broken[:, None], float("nan"), w)
        own = inside[:, None] & chosen
        tl.store(weights + before * K + to, w, mask=own)
        tl.store(ids + before * K + to, i, mask=own)
    if SUMS:
        part = tl.program_id(0) * experts  # 32 bits will do: at most MOST_PROGRAMS * MOST_EXPERTS
        tl.store(part_sums + part + e, sums, mask=e < experts)
        tl.store(part_counts + 2 * part + e, firsts, mask=e < experts)
        tl.store(part_counts + 2 * part + experts + e, all_choices, mask=e < experts)


@triton.jit
def _choose(preference, values, free, K: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, BT: tl.constexpr):
    """Return each token's values and indices of its K best, the index of the best (BINS: none), and who is left."""
    e, c = tl.arange(0, BINS), tl.arange(0, CHOICES)
    first = tl.zeros((BT,), tl.int32)
    w = tl.zeros((BT, CHOICES), tl.float32)
    i = tl.zeros((BT, CHOICES), tl.int32)
    # K passes over registers rather than a sort: K is small. `free` is false for taken experts, and past the last one.
    for k in range(K):
        best = tl.max(tl.where(free, preference, float("-inf")), 1)
        index = tl.min(tl.where(free & (preference == best[:, None]), e[None, :], BINS), 1)
        taken = e[None, :] == index[:, None]
        now = (c == k)[None, :]
        w = tl.where(now, tl.sum(tl.where(taken, values, 0.0), 1)[:, None], w)
        i = tl.where(now, index[:, None], i)
        first = tl.where(k == 0, index, first)
        free = free & (e[None, :] != index[:, None])  # an expert is taken once, whatever its bias
    return w, i, first, free


@triton.jit
def _add_programs(part_sums, part_counts, sums, counts, programs, experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    firsts, all_choices = tl.zeros((ROWS, COLUMNS), tl.int32), tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, programs, ROWS):
        p = start + tl.arange(0, ROWS)
        mask = (p < programs)[:, None] & (e < experts)[None, :]
        total += tl.load(part_sums + p[:, None] * experts + e[None, :], mask=mask, other=0.0)
        at = p[:, None] * (2 * experts) + e[None, :]
        firsts += tl.load(part_counts + at, mask=mask, other=0)
        all_choices += tl.load(part_counts + at + experts, mask=mask, other=0)
    tl.store(sums + e, tl.sum(total, 0), mask=e < experts)
    tl.store(counts + e, tl.sum(firsts, 0), mask=e < experts)
    tl.store(counts + experts + e, tl.sum(all_choices, 0), mask=e < experts)


@triton.jit
def _select_backward(
    scores, ids, weights, d_scores, d_weights, d_sums, d_logits, tokens, experts,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    BY_SCORES: tl.constexpr, BY_WEIGHTS: tl.constexpr, BY_SUMS: tl.constexpr,
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
    if BY_SUMS:
        d += tl.load(d_sums + e, mask=e < experts, other=0.0)[None, :]
    d_chosen = tl.zeros((BT, BINS), tl.float32)
    if BY_WEIGHTS:
        of = t[:, None] * K + c[None, :]
        own = (t < tokens)[:, None] & (c < K)[None, :]
        i = tl.load(ids + of, mask=own, other=-1)
        w = tl.load(weights + of, mask=own, other=0.0)
        dw = tl.load(d_weights + of, mask=own, other=0.0)
        # Below, d_chosen is the gradient of the value that each weight was made of: the expert's score, or its logit
        # for softmax_of_selected. Both normalize and the softmax give dw - <dw, w>, divided by the sum of scores or
        # multiplied by w.
        dw = tl.where(w != w, 0.0, dw)  # a token without finite logits learns nothing from its NaN
        w = tl.where(w != w, 0.0, w)
        if NORMALIZE or GATE == "softmax_of_selected":
            dw -= tl.sum(dw * w, 1)[:, None]
        if GATE == "softmax_of_selected":
            dw *= w
        total = tl.zeros((BT,), tl.float32)
        for k in range(K):  # scatters [BT, CHOICES] to [BT, BINS]
            now = (c == k)[None, :]
            taken = e[None, :] == tl.sum(tl.where(now, i, 0), 1)[:, None]
            d_chosen += tl.where(taken, tl.sum(tl.where(now, dw, 0.0), 1)[:, None], 0.0)
            total += tl.sum(tl.where(taken, s, 0.0), 1)
        if NORMALIZE:
            d_chosen = d_chosen / tl.maximum(total, 1.1754943508222875e-38)[:, None]
    if GATE != "softmax_of_selected":
        d += d_chosen
    # From scores to logits: s (1 - s) for the sigmoid; s (d - <s, d>) for the softmax over all experts.
    d = d * s * (1.0 - s) if GATE == "sigmoid" else s * (d - tl.sum(s * d, 1)[:, None])
    if GATE == "softmax_of_selected":
        d += d_chosen
    tl.store(d_logits + at, d, mask=mask)
