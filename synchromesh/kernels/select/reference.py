"""select: the logits of a gate to scores, chosen experts and their weights, and what balance asks of all tokens."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

# By name, because custom ops take no functions. The last one's weights are the softmax of the selected logits alone.
GATES = ("softmax", "sigmoid", "softmax_of_selected")
# scores, ids, weights; and over all tokens the sums of scores and the counts of choices, or None.
Selection: TypeAlias = tuple[
    Float[Tensor, "T E"],
    Int[Tensor, "T K"],
    Float[Tensor, "T K"],
    Float[Tensor, " E"] | None,
    Int[Tensor, "2 E"] | None,
]


def select(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    gate: str,
    normalize: bool = False,
    bias: Float[Tensor, " E"] | None = None,
    sums: bool = True,
) -> Selection:
    """Return scores, the k experts of highest score (+ bias) in falling order, their weights, and two sums over tokens.

    Args:
        logits: of each token and expert.
        k: K, experts per token.
        gate: one of GATES.
        normalize: divide the weights of a token by their sum, where k > 1.
        bias: added to the scores for the selection only; weights do not see it.
        sums: whether the two sums over tokens are wanted; else they are None.

    Returns:
        scores [T, E], ids [T, K], weights [T, K], sums of the scores [E], and counts [2, E]: for each expert the tokens
        of which it is the first choice, and those of which it is any choice.
    """
    scores = scores_of(logits, gate)
    ids = (scores if bias is None else scores + bias).topk(k, dim=1).indices
    weights = weights_of(logits, scores, ids, gate=gate, normalize=normalize)
    if not sums:
        return scores, ids, weights, None, None
    return scores, ids, weights, scores.sum(dim=0), counts_of(ids, scores.shape[1])


def scores_of(logits: Float[Tensor, "T E"], gate: str) -> Float[Tensor, "T E"]:
    """Return probabilities over all experts, or independent ones."""
    return logits.sigmoid() if gate == "sigmoid" else logits.softmax(dim=1)


def weights_of(
    logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], ids: Int[Tensor, "T K"], *, gate: str, normalize: bool
) -> Float[Tensor, "T K"]:
    """Return the weights of chosen experts; NaN for a token whose logits are not all finite."""
    weights = logits.gather(1, ids).softmax(dim=1) if gate == "softmax_of_selected" else scores.gather(1, ids)
    if normalize and gate != "softmax_of_selected" and ids.shape[1] > 1:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.masked_fill(~logits.isfinite().all(dim=1, keepdim=True), math.nan)


def counts_of(ids: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "2 E"]:
    """Count for each expert the tokens of which it is the first choice, and those of which it is any choice."""
    by_choice_KE = ids.new_zeros(ids.shape[1], num_experts).scatter_add(1, ids.T, torch.ones_like(ids.T))
    return torch.stack([by_choice_KE[0], by_choice_KE.sum(dim=0)])
