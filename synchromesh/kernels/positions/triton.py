"""positions on a GPU: count the pairs of each expert in blocks, add up the blocks, place each pair. No host read.

Integers are added in whatever order and give the same; places follow from the order of the pairs alone.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.launch import on_its_device

BLOCK_PAIRS = 128  # each is compared with all others of its block
BLOCK_EXPERTS = 8  # whose counts a program adds up


def positions(
    expert_ids: Int[Tensor, "T K"], num_experts: int, priority: Float[Tensor, " T"] | None = None
) -> tuple[Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Compute the reference's places and counts. Ids outside of -1 .. E-1 are taken for absent pairs."""
    return _positions(expert_ids, num_experts, priority)


@torch.library.custom_op(
    "synchromesh::positions_triton",
    mutates_args=(),
    schema="(Tensor expert_ids, int num_experts, Tensor? priority) -> (Tensor, Tensor)",
)
@on_its_device
def _positions(expert_ids: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    expert_ids = expert_ids.contiguous()
    tokens, choices = expert_ids.shape
    if not expert_ids.numel():
        return torch.empty_like(expert_ids), expert_ids.new_zeros(num_experts)
    if priority is None:
        order = expert_ids  # not read
    else:
        known = priority.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = known.argsort(descending=True, stable=True)
    blocks = triton.cdiv(tokens * choices, BLOCK_PAIRS)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=expert_ids.device)
    bins = max(2, triton.next_power_of_2(num_experts))
    sizes = {"BLOCK": BLOCK_PAIRS, "ORDERED": priority is not None}
    _count_block[(blocks,)](expert_ids, order, counts, tokens, choices, num_experts, BINS=bins, **sizes)
    places, totals = torch.empty_like(expert_ids), expert_ids.new_empty(num_experts)
    grid = (triton.cdiv(num_experts, BLOCK_EXPERTS),)
    _add_blocks[grid](counts, totals, blocks, num_experts, ROWS=128, COLUMNS=BLOCK_EXPERTS)
    _place_block[(blocks,)](expert_ids, order, counts, places, tokens, choices, num_experts, **sizes)
    return places, totals


@_positions.register_fake
def _(expert_ids: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert_ids, memory_format=torch.contiguous_format), expert_ids.new_empty(num_experts)


@triton.jit
def _pairs_of_block(ids, order, tokens, choices, experts, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """Return place in memory, expert (-1: none) and presence of each pair of a block, in choice-major order."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # in choice-major order: k * T + t
    inside = number < tokens * choices
    token = number % tokens
    if ORDERED:
        token = tl.load(order + token, mask=inside, other=0)
    at = token.to(tl.int64) * choices + number // tokens
    expert = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < experts), expert, -1)
    return at, expert, inside


@triton.jit
def _count_block(
    ids, order, counts, tokens, choices, experts, BINS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr
):
    _, expert, _ = _pairs_of_block(ids, order, tokens, choices, experts, BLOCK, ORDERED)
    e = tl.arange(0, BINS)
    found = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0).to(tl.int64) * experts + e, found, mask=e < experts)


@triton.jit
def _add_blocks(counts, totals, blocks, experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Turn the pairs of each expert in each block into those in all earlier blocks, and write their sum."""
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = counts + block.to(tl.int64)[:, None] * experts + e[None, :]
        mask = (block < blocks)[:, None] & (e < experts)[None, :]
        n = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(n, 0) - n, mask=mask)
        total += tl.sum(n, 0)
    tl.store(totals + e, total, mask=e < experts)


@triton.jit
def _place_block(ids, order, before, places, tokens, choices, experts, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    at, expert, inside = _pairs_of_block(ids, order, tokens, choices, experts, BLOCK, ORDERED)
    mine = tl.arange(0, BLOCK)
    # A pair's place: those of its expert in earlier blocks, and those before it in its own.
    earlier = (expert[:, None] == expert[None, :]) & (mine[None, :] < mine[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    base = tl.load(before + tl.program_id(0).to(tl.int64) * experts + expert, mask=expert >= 0, other=0)
    tl.store(places + at, tl.where(expert >= 0, base + rank, -1), mask=inside)
