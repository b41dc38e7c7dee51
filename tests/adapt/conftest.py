"""Blocks and models that the tests of this folder share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh.models.features import Backbone
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import BlockStyle, SwinV2Config
from synchromesh.moe.capacity import Dropless


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


def backbone(*, experts: bool = False, style: BlockStyle = BlockStyle.SWIN_V2) -> Backbone:
    """Return two stages of one and two blocks, the last ones shifted, in float64."""
    torch.manual_seed(0)
    mixtures = ExpertsConfig(num_experts=4, k=2, blocks=((0,), (1,)), capacity=Dropless(), dropout=0.0, down_bias=True)
    config = SwinV2Config(
        image_size=32, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=2, drop_path=0.0, style=style,
        experts=mixtures if experts else None, init_std=0.3,
    )  # fmt: skip
    return config.build().double().eval()


@pytest.fixture(params=["dense", "experts", "pre-norm"])
def trunk(request) -> nn.Module:
    """A model with a backbone inside."""
    style = BlockStyle.SWIN_MOE if request.param == "pre-norm" else BlockStyle.SWIN_V2
    model = nn.Module()
    model.backbone = backbone(experts=request.param == "experts", style=style)
    return model


@torch.no_grad()
def moved(parameters) -> None:
    """Give parameters numbers that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
