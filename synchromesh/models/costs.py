"""What a model costs, counted as the tables of the SwinV2 papers count it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from synchromesh.models.features import Backbone
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import choices_of
from synchromesh.moe.layer import MoE


@dataclass(frozen=True)
class Costs:
    """The costs of a model.

    Attributes:
        parameters: all of them.
        active_parameters: those that one token passes: k of E experts, without routers.
        router_parameters: what the routers add to both.
        multiply_adds: for one image of the configured size; of a `Classifier` with its head, of others the backbone's.
    """

    parameters: int
    active_parameters: int
    router_parameters: int
    multiply_adds: int

    @property
    def gflops(self) -> float:
        """Thousand millions of multiply-adds, which the papers call GFLOPs."""
        return self.multiply_adds / 1e9


def costs(model: nn.Module) -> Costs:
    """Count the parameters and multiply-adds of a model on any device, meta too; its backbone is in `backbone`.

    Linear layers, convolution, the two products of attention and one multiplication per normalised number count; the
    position bias, softmax, activations, residual sums and routers do not.
    """
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    parameters = _size(model)
    routers = sum(_size(moe.router) for moe in moes)
    idle = sum(
        _size(moe.experts) * (moe.experts.num_experts - choices_of(moe)) // moe.experts.num_experts for moe in moes
    )
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    work = backbone.multiply_adds()
    if isinstance(model, Classifier):  # see has_whole_costs
        work += model.head.in_features * model.head.out_features
    return Costs(parameters, parameters - idle - routers, routers, round(work))


def has_whole_costs(model: nn.Module) -> bool:
    """Tell whether the multiply-adds of `costs` are those of the model, and not of its backbone alone."""
    return isinstance(model, Classifier)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
