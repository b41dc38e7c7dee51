"""Routers: tokens to `Routing`. Any module whose forward(x, k) returns a `Routing` may stand in for one."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.kernels import Kernels, kernels_for
from synchromesh.kernels.select.reference import scores_of, weights_of
from synchromesh.types import Routing

Places: TypeAlias = Float[Tensor, "T 2"]
"""Row and column of each token in its map, as shares of the map's sides."""


@dataclass(frozen=True)
class Softmax:
    """Probabilities over all experts.

    Attributes:
        normalize: divide the weights of a token by their sum. Only where it has more than one choice: a single weight
            stays the probability, as divided by itself it would be 1 and carry no gradient to the router.
            transformers' families do divide it (docs/migration.md).
        after_selection: weights are the softmax of the selected logits alone; of a single choice that is 1, without a
            gradient to the router.
        dtype: of the whole gate, its matmul included, whatever the model's dtype.
    """

    normalize: bool = False
    after_selection: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def gate(self) -> str:
        """The name that the kernels know."""
        return "softmax_of_selected" if self.after_selection else "softmax"


@dataclass(frozen=True)
class Sigmoid:
    """Independent scores of the experts (DeepSeek-V3). The sigmoid is monotone: before or after the selection is one.

    Attributes: as those of `Softmax`; with `normalize`, a single choice is not divided here either.
    """

    normalize: bool = True
    dtype: torch.dtype = torch.float32
    gate: ClassVar[str] = "sigmoid"


@dataclass(frozen=True)
class Ones:
    """Probabilities over all experts choose, and each chosen expert has the weight 1 (EMoE, arXiv 2310.10908).

    Of a feed-forward that was split into experts, all of them then add up to it. No gradient reaches the router but
    that of its losses.

    Attributes:
        dtype: as that of `Softmax`.
    """

    dtype: torch.dtype = torch.float32
    gate: ClassVar[str] = "softmax"
    normalize: ClassVar[bool] = False


Scores: TypeAlias = Softmax | Sigmoid | Ones


@dataclass(frozen=True)
class NodeLimit:
    """Let a token choose inside its best groups of experts only (DeepSeek-V3, section 2.1.2).

    A group's score is the sum of its two best experts.

    Attributes:
        groups: equal parts the experts are cut into, in order.
        selected: groups a token may choose from.
    """

    groups: int
    selected: int

    def __post_init__(self) -> None:
        if not 1 <= self.selected <= self.groups:
            raise ValueError(
                f"NodeLimit selects {self.selected} of {self.groups} groups, wanted 1 <= selected <= groups"
            )

    def mask(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the scores, -inf outside the best groups of each token."""
        grouped = scores.unflatten(1, (self.groups, -1))
        # A group is as good as the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2).topk(self.selected, dim=1).indices
        outside = (best[:, :, None] != torch.arange(self.groups, device=best.device)).all(dim=1)
        return grouped.masked_fill(outside[:, :, None], -math.inf).flatten(1)


class BiasBalance(nn.Module):
    """Balance by a bias on the selection instead of a loss (DeepSeek-V3, arXiv 2408.15664).

    The bias of an expert grows by `rate` at each `update_balance` if it had fewer tokens than the mean, and falls if it
    had more. It decides who is selected, never the weights.
    """

    steps: Tensor
    tokens_per_expert: Tensor

    def __init__(self, num_experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError(f"the rate of BiasBalance is {rate}, wanted a positive number such as 0.001")
        self.rate = rate
        self.register_buffer("steps", torch.zeros(num_experts, dtype=torch.int64))  # exact in a model of any dtype
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64))

    def observe(self, tokens_per_expert: Int[Tensor, " E"]) -> None:
        """Add the load of one training forward."""
        self.tokens_per_expert += tokens_per_expert

    @property
    def bias(self) -> Float[Tensor, " E"]:
        """What is added to the scores for the selection."""
        return self.rate * self.steps.to(torch.float32)

    def update(self) -> None:
        """Move the bias against the load seen since the last update."""
        load = self.tokens_per_expert
        self.steps += (load.sum() - load * load.numel()).sign()  # of mean - load, in integers: exact
        self.tokens_per_expert.zero_()


def update_balance(model: nn.Module) -> None:
    """Update every `BiasBalance` in a model; call it once after each optimizer step."""
    for module in model.modules():
        if isinstance(module, BiasBalance):
            module.update()


class Router(nn.Module, ABC):
    """Decides which experts each token goes to.

    Attributes:
        takes_kernels: whether `forward` has an argument `kernels`, and is given those of its layer.
        takes_places: whether it has an argument `places`, and is given where each token lies in its map.
    """

    takes_kernels: ClassVar[bool] = False
    takes_places: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        arguments = inspect.signature(cls.forward).parameters
        cls.takes_kernels, cls.takes_places = "kernels" in arguments, "places" in arguments

    @abstractmethod
    def forward(self, x: Float[Tensor, "T D"], k: int | None = None) -> Routing:
        """Route tokens of width D; k overrides the number of choices for this call."""


def routed(
    router: nn.Module, x: Float[Tensor, "T D"], k: int | None, kernels: Kernels | None, places: Places | None = None
) -> Any:
    """Call a router of any kind, and return what it returns; it is given kernels and places where it takes them."""
    named = {"kernels": kernels} if getattr(router, "takes_kernels", False) else {}
    return router(x, k, **named, places=places) if getattr(router, "takes_places", False) else router(x, k, **named)


class TopKRouter(Router):
    """Linear gate: each token goes to the k experts of highest score.

        logits = x W^T,  scores = softmax or sigmoid (logits + noise),  ids = top k of scores (+ bias)

    Args:
        width: D.
        num_experts: E.
        k: choices per token, 1 to E.
        scores: `Softmax(...)`, `Sigmoid(...)` or `Ones()`.
        noise: standard deviation of the Gaussian noise on the logits while training, times E (V-MoE: 1).
        balance: `BiasBalance(num_experts)` to balance without a loss.
        limit: `NodeLimit(...)` to keep a token's experts on few nodes.

    Raises:
        ValueError: k outside 1..E, or more than the groups of `limit` hold.

    >>> TopKRouter(16, 4, k=2)(torch.randn(3, 16)).expert_ids.shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 1,
        scores: Scores = Softmax(),
        noise: float = 0.0,
        balance: BiasBalance | None = None,
        limit: NodeLimit | None = None,
    ) -> None:
        super().__init__()
        _check_gate(width, num_experts, noise)
        if balance is not None and len(balance.steps) != num_experts:
            raise ValueError(f"BiasBalance has {len(balance.steps)} experts, wanted {num_experts}, as the router")
        if limit is not None and num_experts % limit.groups:
            raise ValueError(f"NodeLimit cuts {num_experts} experts into {limit.groups} groups, wanted equal groups")
        self.width, self.num_experts, self.noise = width, num_experts, noise
        self.scores, self.balance, self.limit = scores, balance, limit
        self.k = _checked_k(k, self.selectable)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    @property
    def selectable(self) -> int:
        """The most experts that one token can choose."""
        return self.num_experts if self.limit is None else self.num_experts // self.limit.groups * self.limit.selected

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def initialize(self, std: float) -> None:
        """Draw the weights as Swin's release does."""
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None, *, kernels: Kernels | None = None) -> Routing:
        k = self.k if k is None else _checked_k(k, self.selectable)
        with torch.autocast(x.device.type, enabled=False):
            logits = (kernels or kernels_for(x.device)).gate(x, self.weight, dtype=self.scores.dtype)
            noise = self.noise if self.training else 0.0
            bias = None if self.balance is None else self.balance.bias
            made = Selecting(noise, bias, self.limit, sums=self.training)
            return _selected(logits, k, self.scores, made, kernels)


class CosineRouter(Router):
    """Cosine gate (Tutel paper, eq. 2): logits = cos(W x, M_e) / temperature.

    Args:
        width: D.
        num_experts: E.
        k: choices per token, 1 to E.
        dim: width of the projection W x.
        temperature: its initial value; learnable, never below 0.01.
        noise, scores: as for `TopKRouter`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 1,
        dim: int = 256,
        temperature: float = 0.5,
        noise: float = 0.0,
        scores: Scores = Softmax(),
    ) -> None:
        super().__init__()
        _check_gate(width, num_experts, noise)
        if dim < 1 or not temperature >= self.floor:
            raise ValueError(
                f"dim is {dim} and temperature {temperature}, wanted dim >= 1, temperature >= {self.floor}"
            )
        self.width, self.num_experts, self.noise, self.scores = width, num_experts, noise, scores
        self.k = _checked_k(k, num_experts)
        self.initial_temperature = temperature
        self.projector = nn.Linear(width, dim)
        self.directions = nn.Parameter(torch.empty(num_experts, dim))
        self.log_scale = nn.Parameter(torch.empty(()))  # log(1 / temperature): positive whatever the optimizer does
        self.reset_parameters()

    floor = 0.01
    undecayed = frozenset({"projector", "directions", "log_scale"})

    def reset_parameters(self) -> None:
        self.projector.reset_parameters()
        nn.init.normal_(self.directions, std=0.01)
        nn.init.constant_(self.log_scale, -math.log(self.initial_temperature))

    def initialize(self, std: float) -> None:
        """Draw the weights again, by the rule of the release."""
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None, *, kernels: Kernels | None = None) -> Routing:
        k = self.k if k is None else _checked_k(k, self.num_experts)
        dtype = self.scores.dtype
        with torch.autocast(x.device.type, enabled=False):
            projected = (kernels or kernels_for(x.device)).gate(x, self.projector.weight, dtype=dtype)
            projected = projected + self.projector.bias.to(dtype)
            cosine = F.normalize(projected, dim=1) @ F.normalize(self.directions.to(dtype), dim=1).T
            logits = cosine * self.log_scale.to(dtype).clamp(max=-math.log(self.floor)).exp()
            noise = self.noise if self.training else 0.0
            return _selected(logits, k, self.scores, Selecting(noise, sums=self.training), kernels)


class ExpertChoiceRouter(Router):
    """Each expert takes its ceil(k T / E) best tokens (Zhou et al., arXiv 2202.09368); k is the mean choices per token.

    The Routing has one column per expert, with holes; every expert has the same load. A token's experts depend on the
    other tokens of the batch: not for autoregressive models.
    """

    def __init__(self, width: int, num_experts: int, *, k: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _check_gate(width, num_experts)
        self.width, self.num_experts, self.dtype = width, num_experts, dtype
        self.k = _checked_k(k, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None, *, kernels: Kernels | None = None) -> Routing:
        k = self.k if k is None else _checked_k(k, self.num_experts)
        with torch.autocast(x.device.type, enabled=False):
            logits = (kernels or kernels_for(x.device)).gate(x, self.weight, dtype=self.dtype)
            scores = logits.softmax(dim=1)
            tokens, experts = scores.shape
            share = min(tokens, -(-k * tokens // experts))
            broken = ~logits.isfinite().all(dim=1, keepdim=True)
            # A token with a broken gate is chosen last, so that it takes nobody's place; expert 0 then carries its NaN.
            chosen = scores.detach().masked_fill(broken, -1.0).topk(share, dim=0).indices
            column = torch.arange(experts, device=x.device).expand(tokens, experts)
            ids = torch.full_like(column, -1).scatter(0, chosen, column[:share])
            ids = torch.where(broken, torch.where(column == 0, 0, -1), ids)
            weights = scores.masked_fill(broken, math.nan)
            return Routing(ids, weights, scores, logits, max_pairs=share * experts + tokens, mean_choices=k)


def _checked_k(k: int, most: int) -> int:
    if not (isinstance(k, int) and 1 <= k <= most):
        raise ValueError(f"k is {k}, wanted an integer 1 <= k <= {most}, the experts that one token can choose")
    return k


def _check_gate(width: int, num_experts: int, noise: float = 0.0) -> None:
    for name, got in (("width", width), ("num_experts", num_experts)):
        if got < 1:
            raise ValueError(f"{name} of the router is {got}, wanted at least 1")
    if not 0 <= noise < math.inf:
        raise ValueError(f"the noise is {noise}, wanted 0 (none) or a positive number")


@dataclass(frozen=True)
class Selecting:
    """What a selection depends on besides the logits.

    Attributes:
        noise: standard deviation of the noise on them, times E; 0 for none.
        bias: what is added to the scores for the selection.
        limit: keeps a token's experts on few nodes.
        sums: whether a loss or statistics will ask for sums over the tokens, as in training.
    """

    noise: float = 0.0
    bias: Float[Tensor, " E"] | None = None
    limit: NodeLimit | None = None
    sums: bool = False


def _selected(logits: Float[Tensor, "T E"], k: int, kind: Scores, by: Selecting, kernels: Kernels | None) -> Routing:
    std = by.noise / logits.shape[1] if by.noise > 0 else None
    noisy = None if std is None else logits + std * torch.randn_like(logits)
    used, bias, limit = logits if noisy is None else noisy, by.bias, by.limit
    if limit is None:
        select = (kernels or kernels_for(logits.device)).select
        made = select(used, k, gate=kind.gate, normalize=kind.normalize, bias=bias, sums=by.sums)
        scores, ids, weights, score_sums, choice_counts = made
        return Routing(ids, _weighed(weights, kind), scores, logits, noisy, std).with_sums(score_sums, choice_counts)
    scores = scores_of(used, kind.gate)
    ids = limit.mask(scores if bias is None else scores + bias).topk(k, dim=1).indices
    weights = weights_of(used, scores, ids, gate=kind.gate, normalize=kind.normalize)
    return Routing(ids, _weighed(weights, kind), scores, logits, noisy, std)


def _weighed(weights: Float[Tensor, "T K"], kind: Scores) -> Float[Tensor, "T K"]:
    return weights.detach() * 0 + 1 if isinstance(kind, Ones) else weights  # NaN, of a broken gate, stays
