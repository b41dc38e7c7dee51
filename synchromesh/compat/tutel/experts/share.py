"""What one rank holds of a Tutel layer's experts: a part of this library's identical layout, and Tutel's gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from synchromesh.moe.experts import Cut, Experts


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer.

    Attributes:
        model_dim: D.
        num_experts: E.
        cut: this rank's of all ranks.
    """

    model_dim: int
    num_experts: int
    cut: Cut

    @property
    def local_experts(self) -> int:
        return max(1, self.num_experts // self.cut.count)

    @property
    def sharded_count(self) -> int:
        return max(1, self.cut.count // self.num_experts)


class TutelExperts(Experts):
    """Experts that are created as one rank's share.

    Tutel sums the gradients of an expert over the ranks' losses where this library takes their mean; `_summed` makes up
    for it.

    Attributes:
        splits: whether a part of an expert computes a part of its output; else experts are pooled whole.
        output_dim: width of what they return.
        row_dim: of the rows that travel, the wider of model_dim and output_dim; what is not used is 0.
    """

    splits: bool = True
    output_dim: int

    def __init__(self, share: Share, output_dim: int | None = None) -> None:
        super().__init__()
        self.share, self.num_experts, self.cut = share, share.num_experts, share.cut
        self.model_dim, self.sharded_count = share.model_dim, share.sharded_count
        self.output_dim = output_dim or share.model_dim
        self.width = self.row_dim = max(self.model_dim, self.output_dim)

    def hold(self, cut: Cut) -> None:
        if cut != self.cut:
            raise ValueError(f"got {cut}, these experts were created as {self.cut}: build the layer in its group")

    def _summed(self, part: Tensor) -> Tensor:
        """Return a view of a parameter whose gradient is the sum over ranks, given their mean."""
        part = part.view(part.shape)
        if self.cut.count > 1 and part.requires_grad:
            part.register_hook(lambda grad: grad * self.cut.count)
        return part
