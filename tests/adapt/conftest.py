"""Blocks and models that the tests of this folder share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """As Llama's, with a bias on demand."""

    def __init__(self, width: int = 8, hidden: int = 24, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24, bias=False), nn.ReLU(), nn.Linear(24, 8, bias=False))


def gated() -> nn.Module:
    return SwiGLU()


def gated_with_bias() -> nn.Module:
    return SwiGLU(bias=True)


@pytest.fixture(params=[plain, without_bias, gated, gated_with_bias], ids=lambda make: make.__name__)
def block(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().double()
