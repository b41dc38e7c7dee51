"""Tutel's auxiliary losses: of one rank's own tokens, unweighted; the script multiplies and adds them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gshard_loss(scores: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"]) -> Float[Tensor, ""]:
    """Return E * sum_e (mean score of e) * (fraction of tokens whose first choice is e); 0 without tokens."""
    tokens, experts = scores.shape
    first = torch.zeros_like(scores).scatter_(1, expert_ids[:, :1].long(), 1.0)
    return experts * (scores.sum(0) / max(1, tokens) * (first.sum(0) / max(1, tokens))).sum()


def load_importance_loss(
    scores: Float[Tensor, "T E"], noisy_logits: Float[Tensor, "T K"], gate_noise: int | float
) -> Float[Tensor, ""]:
    """Return (CV²(importance) + CV²(load)) / 2 over the experts, CV = standard deviation over mean.

        importance_e = sum_t scores[t, e]
        load_e       = sum_t Phi((scores[t, e] - last of noisy_logits[t]) * E / gate_noise)

    A score meets a logit here, as Tutel has it; `synchromesh.ImportanceLoad` compares logits with logits.

    Args:
        scores: softmax of the logits without noise.
        noisy_logits: of the choices, the last one is the threshold.

    Raises:
        ValueError: gate_noise is 0.
    """
    if gate_noise <= 0:
        raise ValueError(
            f"is_gshard_loss=False got gate_noise {gate_noise}, wanted more than 0: its load is a probability over "
            "the noise; set 'gate_noise': 1.0 in gate_type, or take is_gshard_loss=True"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, experts = scores.to(dtype), scores.shape[1]
    load = torch.special.ndtr((scores - noisy_logits[:, -1:].to(dtype)) * experts / gate_noise).sum(0)
    return (_cv_squared(scores.sum(0)) + _cv_squared(load)) / 2


def _cv_squared(values: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    if len(values) == 1:
        return values.sum() * 0  # one expert is balanced
    return values.var() / (values.mean().square() + 1e-10)
