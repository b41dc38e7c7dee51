"""TaskLinear: a frozen linear layer with an update of low rank that all tasks share, and one of each task.

    y = W x + b + A x          y_t = W x + b + A_t x_t          A, A_t of low rank, zero at first

The product with W is computed once, of the shared input, as in MTLoRA's code (arXiv 2403.20320).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.adapt.adaptation import Adapted
from synchromesh.adapt.low_rank import Factors


@final
class TaskLinear(Adapted):
    """A frozen linear layer of several streams, side by side in the columns: the shared one, then one of each task.

    Args:
        layer: copied.
        shared: the update of the shared stream.
        own: that of each task.
        with_shared: whether tasks get the shared update, of the shared input, too.

    Attributes:
        layer: frozen.
    """

    def __init__(
        self, layer: nn.Linear, shared: Factors, own: Mapping[str, Factors], *, with_shared: bool = False
    ) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        self.shared, self.own, self.with_shared = shared, nn.ModuleDict(dict(own)), with_shared

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T F"]:
        """Run all streams.

        Args:
            x: of width D (1 + tasks); or of width D, the same for all streams.
        """
        first, *others = x.split(self.layer.in_features, dim=-1)
        others = others or [first] * len(self.own)
        frozen = self.layer(first)
        update = self.shared(first)
        base = frozen + update if self.with_shared else frozen
        own = [base + factors(x_t) for factors, x_t in zip(self.own.children(), others, strict=True)]
        return torch.cat((frozen + update, *own), dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a linear layer with the shared update; what tasks have learned is not in it."""
        layer = copy.deepcopy(self.layer)
        layer.weight.add_(self.shared.product())
        return layer.requires_grad_(True)
