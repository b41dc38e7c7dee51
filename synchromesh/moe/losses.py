"""Losses that keep the experts in use: `Routing` to a scalar, already weighted.

Each is called with `agree_sum`: the identity, so that every rank balances its own tokens, or inside `OverRanks` the
strategy's sum over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.types import Routing

AgreeSum = Callable[[Tensor], Tensor]


class Loss(ABC):
    """A scalar of one layer's routing."""

    @abstractmethod
    def __call__(self, routing: Routing, agree_sum: AgreeSum) -> Float[Tensor, ""]:
        """Return the weighted loss, 0 without tokens."""


@dataclass(frozen=True)
class LoadBalance(Loss):
    """weight * E * sum_e (mean score of e) * (fraction of tokens whose choice is e); 1 * weight when balanced.

    Source: GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961), as in Tutel.

    Attributes:
        weight: usual value 0.01.
        choices: leading choices that count; None counts all of them.
    """

    weight: float
    choices: int | None = 1

    def __call__(self, routing: Routing, agree_sum: AgreeSum) -> Float[Tensor, ""]:
        leading = self.choices if routing.mean_choices is None else None  # columns without order all count
        counts = routing.tokens_per_expert(leading).to(routing.scores.dtype)
        tokens, scores, counts = _agreed(agree_sum, routing, routing.scores_per_expert(), counts)
        return self.weight * routing.num_experts * (scores / tokens * counts / counts.sum().clamp(min=1)).sum()


@dataclass(frozen=True)
class ImportanceLoad(Loss):
    """weight * (CV²(importance) + CV²(load)) / 2, CV = standard deviation over mean, over the experts.

        importance_e = sum_t softmax(logits)[t, e]
        load_e       = sum_t P(e is among the k of t when its noise is drawn again)
                     = sum_t Phi((logits[t, e] - threshold_t) / noise_std)

    threshold_t is the k-th largest noisy logit of the token, so logits meet logits. (Tutel compares the softmax of the
    clean logits with it.) Source: V-MoE (arXiv 2106.05974), appendix A.

    Attributes:
        weight: usual value 0.01.
    """

    weight: float

    def __call__(self, routing: Routing, agree_sum: AgreeSum) -> Float[Tensor, ""]:
        if routing.noisy_logits is None or routing.noise_std is None:
            raise ValueError(
                "ImportanceLoad got a routing without noise, wanted noisy logits: give the router noise=1.0 "
                "(and train()), or use LoadBalance"
            )
        k = routing.expert_ids.shape[1]
        threshold = routing.noisy_logits.topk(k, dim=1).values[:, -1:]
        chance = torch.special.ndtr((routing.logits - threshold) / routing.noise_std)
        importance = routing.logits.softmax(dim=1).sum(dim=0)
        _, importance, load = _agreed(agree_sum, routing, importance, chance.sum(dim=0))
        return self.weight * (_cv_squared(importance) + _cv_squared(load)) / 2


@dataclass(frozen=True)
class ZLoss(Loss):
    """weight * mean_t (log sum_e exp logits[t, e])²: keeps the logits small (ST-MoE, arXiv 2202.08906).

    Attributes:
        weight: usual value 0.001.
    """

    weight: float

    def __call__(self, routing: Routing, agree_sum: AgreeSum) -> Float[Tensor, ""]:
        tokens, squares = _agreed(agree_sum, routing, routing.logits.logsumexp(dim=1).square().sum(dim=0, keepdim=True))
        return self.weight * squares[0] / tokens


@dataclass(frozen=True)
class OverRanks(Loss):
    """A loss of the tokens of all ranks together, at the price of one small all-reduce per layer, forward and backward.

    Attributes:
        loss: the other loss.

    >>> OverRanks(LoadBalance(0.01)).loss.weight
    0.01
    """

    loss: Loss

    def __call__(self, routing: Routing, agree_sum: AgreeSum) -> Float[Tensor, ""]:
        return self.loss(routing, agree_sum)


def _agreed(agree_sum: AgreeSum, routing: Routing, *sums: Tensor) -> list[Tensor]:
    """Return the number of tokens, at least 1, and some sums over them, of all ranks: agreed in one message."""
    tokens = sums[0].new_full((1,), len(routing.expert_ids))  # filled on the device: nothing is sent there
    total, *agreed = agree_sum(torch.cat([tokens, *sums])).split([1, *(len(one) for one in sums)])
    return [total[0].clamp(min=1), *agreed]


def _cv_squared(load: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    if load.numel() == 1:
        return load.sum() * 0
    mean = load.mean()
    return load.var() / (mean.square() + torch.finfo(load.dtype).eps)
