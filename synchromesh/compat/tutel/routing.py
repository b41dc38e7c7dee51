"""Tutel's routing in two calls: scores to choices, and choices to places in the experts' queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.compat.tutel.losses import gshard_loss, load_importance_loss
from synchromesh.compat.tutel.parallel import aligned, grid_of, rows_per_expert
from synchromesh.kernels import kernels_for
from synchromesh.types import Routing

# E, and of each choice: expert [T], place in its queue [T], weight [T]; capacity; pairs of each expert before dropping.
Critical: TypeAlias = tuple[int, list[Tensor], list[Tensor], list[Tensor], int, Tensor]


def choose(
    scores: Float[Tensor, "T E"], top_k: int, *, normalize: bool
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Return the experts of highest score, at most all of them, and their weights; 0 choices are one absent pair."""
    if top_k == 0:
        return scores.new_full((len(scores), 1), -1, dtype=torch.int64), scores[:, :1] * 0
    ids = scores.topk(min(top_k, scores.shape[1]), dim=1).indices
    weights = scores.gather(1, ids)
    if normalize and weights.shape[1] > 1:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return ids, weights


def route(
    gate: Any, x: Float[Tensor, "T D"], top_k: int, *, noisy: bool, normalize: bool, gshard: bool
) -> tuple[Routing, Float[Tensor, ""]]:
    """Return what a gate decides, and its auxiliary loss; a gate computes in the dtype of its parameters.

    Args:
        gate: tokens to logits; has gate_noise.
        top_k: choices, 0 is none.
        noisy: whether the noise is added.
        normalize: see `choose`.
        gshard: `gshard_loss`, else `load_importance_loss`.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = next(gate.parameters(), None)
        logits = used = gate(x if weight is None else x.to(weight.dtype))
        experts = logits.shape[1]
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}, wanted 1 to {experts}, or 0 for no expert")
        if noisy and gate.gate_noise > 0:
            used = logits + gate.gate_noise * torch.randn_like(logits) / experts
        scores = used.softmax(1)
        ids, weights = choose(scores, top_k, normalize=normalize)
        if top_k == 0:
            l_aux = scores.sum() * 0
        elif gshard:
            l_aux = gshard_loss(scores, ids)
        else:
            l_aux = load_importance_loss(logits.softmax(1), used.gather(1, ids), gate.gate_noise)
    return Routing(ids, weights, scores, logits), l_aux


def agree_max(number: int, group: ProcessGroup | None, device: torch.device) -> int:
    """Return the largest of the ranks' numbers."""
    grid = grid_of(group)
    if grid.size == 1:
        return number
    agreed = torch.tensor(number, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=grid.group)
    return int(agreed)


def extract_critical(
    scores: Float[Tensor, "T E"],
    top_k: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = gshard_loss,
    capacity_factor: int | float = 1.0,
    batch_prioritized_routing: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
    group: ProcessGroup | None = None,
    inequivalent_tokens: bool = False,
) -> tuple[Critical, Tensor]:
    """Return what `fast_encode` and `fast_decode` want, and the loss of the scores.

    Args:
        scores: probabilities.
        top_k: choices, 1 to E; more are taken for E.
        loss_fn: (scores, experts [T K]) -> loss.
        capacity_factor: f > 0: k * int(f * ceil(T/E)) rows; 0: as many as any rank's fullest expert needs; f < 0: as
            many, at most what -f gives.
        alignment: rows are a multiple of it.
        batch_prioritized_routing: serve tokens by their best score.
        inequivalent_tokens: take the largest T of all ranks.

    Raises:
        ValueError: top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, wanted at least 1")
    ids, weights = choose(scores, top_k, normalize=normalize_gate)
    experts, choices = scores.shape[1], ids.shape[1]
    priority = scores.detach().amax(1) if batch_prioritized_routing else None
    places, counts = kernels_for(ids.device).positions(ids, experts, priority)
    tokens = agree_max(len(scores), group, scores.device) if inequivalent_tokens else len(scores)
    rows = rows_per_expert(capacity_factor, tokens=tokens, choices=choices, experts=experts)
    if capacity_factor <= 0:
        needed = agree_max(int(counts.max()), group, scores.device)
        rows = min(needed, rows) if capacity_factor < 0 else needed
    indices, locations, gates = ([one.contiguous() for one in pairs.unbind(1)] for pairs in (ids, places, weights))
    critical = (experts, _short(indices), _short(locations), gates, aligned(rows, alignment), counts)
    return critical, loss_fn(scores, ids)


def _short(columns: list[Tensor]) -> list[Tensor]:
    return [column.int() for column in columns]


def weights_at_the_entry(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """Apply the weights before the experts: one weighted token for each pair, and a routing of these by weight 1.

    The RowMap of the pairs, seen as [T * K, 1], is theirs.
    """
    pairs = (x[:, None] * routing.weights[..., None].to(x.dtype)).flatten(0, 1)
    ids = routing.expert_ids.reshape(-1, 1)
    scores = routing.scores[:1].detach().expand(len(ids), -1) if len(ids) else routing.scores
    return pairs, Routing(ids, x.new_ones(ids.shape), scores, scores)
