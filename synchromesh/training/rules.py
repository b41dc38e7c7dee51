"""Rules of optimizers: how gradients become steps. A recipe chooses one as a value; kept libraries do the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from synchromesh.errors import InputError
from synchromesh.training.muon import ExpertMuon, hidden_matrices

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Adam:
    """What the rules know of AdamW's numbers.

    Attributes:
        betas: decay of the running means of gradients and of their squares.
        eps: added to the root of the mean square.
    """

    betas: tuple[float, float]
    eps: float


class UpdateRule(ABC):
    """How gradients become steps: a frozen dataclass of plain values."""

    @abstractmethod
    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        """Return an optimizer of groups of parameters; the learning rate is set before each step."""

    def orthogonal(self, model: nn.Module) -> frozenset[str]:
        """Return the parameters that stand in groups of their own, with `orthogonal` in them."""
        return frozenset()


@final
@dataclass(frozen=True)
class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101) of torch, with `optim.betas` and `optim.eps`."""

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        return torch.optim.AdamW(groups, betas=adam.betas, eps=adam.eps, fused=True)


@final
@dataclass(frozen=True)
class SGD(UpdateRule):
    """Stochastic gradient descent of torch, with weight decay added to the gradient.

    Attributes:
        momentum: decay of the running sum of gradients.
        nesterov: look ahead by one step.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=self.nesterov)


@final
@dataclass(frozen=True)
class Lion(UpdateRule):
    """Lion (arXiv 2302.06675) of pytorch_optimizer: signs of means. Wants a third to a tenth of AdamW's rate.

    Attributes:
        betas: decay of what a step is the sign of, and of the running mean.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        return _kept("Lion")(groups, lr=0.0, betas=self.betas)


@final
@dataclass(frozen=True)
class Lamb(UpdateRule):
    """LAMB (arXiv 1904.00962) of pytorch_optimizer: each tensor's step is as long as its weights.

    Experts of a layer are one tensor, and have one length together. Refused where they are spread over ranks.

    Attributes:
        betas: decay of the running means of gradients and of their squares.
        eps: added to the root of the mean square.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        # Without its correction of the first steps, which would lengthen them tenfold after their length was set.
        return _kept("Lamb")(groups, lr=0.0, betas=self.betas, eps=self.eps, adam_debias=True)


@final
@dataclass(frozen=True)
class Adafactor(UpdateRule):
    """Adafactor (arXiv 1804.04235) of torch: mean squares of rows and columns alone, of each expert by itself.

    Its clipping takes the experts of a layer together. Refused where they are spread over ranks.

    Attributes:
        beta2_decay: power of the step by which the mean of squares decays.
        clip: largest root mean square of a step, before the rate.
        least: step size of weights that are near 0, over the rate.
    """

    beta2_decay: float = -0.8
    clip: float = 1.0
    least: float = 1e-3

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        return torch.optim.Adafactor(groups, beta2_decay=self.beta2_decay, eps=(None, self.least), d=self.clip)


@final
@dataclass(frozen=True)
class Muon(UpdateRule):
    """Muon (arXiv 2502.16982): steps of hidden matrices are orthogonal, each expert's by itself; the rest is AdamW's.

    Takes AdamW's rates. Refused on ranks that hold parts of an expert.

    Attributes:
        momentum: decay of the running mean of gradients.
        nesterov: look ahead by one step.
        steps: of Newton-Schulz.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5

    def build(self, groups: Groups, adam: Adam) -> Optimizer:
        own = {"momentum": self.momentum, "nesterov": self.nesterov, "steps": self.steps}
        return ExpertMuon(groups, betas=adam.betas, eps=adam.eps, **own)

    def orthogonal(self, model: nn.Module) -> frozenset[str]:
        return hidden_matrices(model)


RULES = (AdamW, SGD, Lion, Lamb, Adafactor, Muon)


def _kept(name: str) -> Any:
    try:
        import pytorch_optimizer  # an extra
    except ImportError as error:
        raise InputError(
            f"--optim.rule {name.lower()} needs the package pytorch_optimizer: pip install 'synchromesh[optimizers]'"
        ) from error
    return getattr(pytorch_optimizer, name)
