"""Tutel's experts of type 'llama_ffn'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.compat.tutel.experts.share import Share, TutelExperts
from synchromesh.kernels import Kernels
from synchromesh.moe.experts import Activation


class LlamaExperts(TutelExperts):
    """y = (act(x W1) * (x W2)) W3: Tutel's type 'llama_ffn'.

    Parameters: `W_fc1`, `W_fc2` ([L D F], cut into s flat pieces), `W_fc3` ([L F D], so too). Such a piece is no set of
    hidden rows, so an expert is always pooled whole.

    Args:
        hidden_size_per_expert: F.
        activation_fn: silu unless given.
    """

    matrices, splits = 3, False

    def __init__(self, share: Share, *, hidden_size_per_expert: int, activation_fn: Activation = F.silu) -> None:
        super().__init__(share)
        self.hidden, self.activation_fn = hidden_size_per_expert, activation_fn
        numbers = -(-share.local_experts * share.model_dim * hidden_size_per_expert // share.sharded_count)
        self.W_fc1 = nn.Parameter(torch.empty(numbers))
        self.W_fc2 = nn.Parameter(torch.empty(numbers))
        self.W_fc3 = nn.Parameter(torch.empty(numbers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all numbers from N(0, 0.01²)."""
        for parameter in (self.W_fc1, self.W_fc2, self.W_fc3):
            nn.init.normal_(parameter, 0, 0.01)

    def parts(self) -> dict[str, Tensor]:
        return {name: self._summed(p) for name, p in (("gate", self.W_fc1), ("up", self.W_fc2), ("down", self.W_fc3))}

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        gate, up, down = (weights[name][:, : self.model_dim * self.hidden] for name in ("gate", "up", "down"))
        shape = (self.model_dim, self.hidden)
        opened = self.activation_fn(kernels.grouped_mm(rows, gate.unflatten(1, shape), ends))
        hidden = opened * kernels.grouped_mm(rows, up.unflatten(1, shape), ends)
        return kernels.grouped_mm(hidden, down.unflatten(1, shape[::-1]), ends)
