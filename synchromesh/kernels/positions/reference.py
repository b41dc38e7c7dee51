"""positions: the place of each (token, choice) pair within its expert."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def positions(
    expert_ids: Int[Tensor, "T K"], num_experts: int, priority: Float[Tensor, " T"] | None = None
) -> tuple[Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Count each present pair's place in its expert, and the pairs of each expert.

    All first choices come before all second ones; inside a choice, tokens of higher priority come first, equal ones
    in token order. NaN counts as the lowest priority. Batch-prioritised routing: arXiv 2206.03382, section 3.

    Args:
        expert_ids: int64; -1 is an absent pair.
        num_experts: E.
        priority: of each token; None means token order.

    Returns:
        places (-1 where absent) and counts, both int64.
    """
    order_T = torch.arange(expert_ids.shape[0], device=expert_ids.device)
    if priority is not None:
        order_T = priority.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(
            descending=True, stable=True
        )
    ids = expert_ids[order_T].T.reshape(-1)  # choice-major: all first choices before all second ones
    counts = ids.new_zeros(num_experts + 1).scatter_add(0, ids + 1, torch.ones_like(ids))  # absent pairs lead
    by_expert = ids.argsort(stable=True)
    # A stable sort by expert keeps that order inside each expert: a pair's place is its index among the sorted pairs,
    # less the index of its expert's first one.
    first = (counts.cumsum(0) - counts)[ids[by_expert] + 1]
    places = torch.empty_like(ids).scatter(0, by_expert, torch.arange(ids.shape[0], device=ids.device) - first)
    places_TK = places.masked_fill(ids < 0, -1).view(expert_ids.T.shape).T
    return torch.empty_like(expert_ids).index_copy(0, order_T, places_TK), counts[1:]
