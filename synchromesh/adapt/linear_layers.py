"""Linear layers of any model under one shape: torch's, and those that keep their matrix the other way round."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearLayer:
    """y = x W.T + b, however the module keeps W.

    Attributes:
        module: torch's `nn.Linear`, or transformers' `Conv1D` (GPT-2's), whose weight is [in, out].
    """

    module: nn.Module

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The parameter, or a view of it that writes reach."""
        own = self.module.get_parameter("weight")
        return own if isinstance(self.module, nn.Linear) else own.mT

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        return None if self.module.bias is None else self.module.get_parameter("bias")

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module is a linear layer."""
    return isinstance(module, nn.Linear) or (module is not None and _is_conv1d(module))


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' `Conv1D`, by what it has: the library does without transformers."""
    own = vars(module)
    return type(module).__name__ == "Conv1D" and "nf" in own and getattr(module, "weight", None) is not None
