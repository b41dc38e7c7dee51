"""SwinV2-MoE: a SwinV2 whose feed-forward is a mixture of experts in some blocks (arXiv 2206.03382, section 5.3).

- experts in every other block of stage 3 and in the last block of stage 4, as published; any blocks by value;
- two block styles: `SWIN_MOE`, in which Microsoft released weights, and the true SwinV2 of `swin_v2.py`;
- router, capacity, losses and dropout are values of `ExpertsConfig`, with the released settings as default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from synchromesh.kernels import Products
from synchromesh.models.swin_v2 import (
    BlockStyle,
    FeedForward,
    FeedForwardFactory,
    NormThenMerge,
    SwinV2Classifier,
    SwinV2Config,
    pre_norm,
)
from synchromesh.models.window_attention import DotAttention
from synchromesh.moe.capacity import Capacity, Dropless, FixedCapacity, batch_prioritized
from synchromesh.moe.experts import MLPExperts
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import ImportanceLoad, LoadBalance, Loss
from synchromesh.moe.routing import CosineRouter, TopKRouter

# helpers

RouterFactory = Callable[[int, int, int], nn.Module]
"""(width, num_experts, k) -> router."""

PUBLISHED_BLOCKS = ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1,))


@dataclass(frozen=True)
class LinearGate:
    """Makes `TopKRouter`s. Attributes: noise on the logits while training, times E."""

    noise: float = 1.0

    def __call__(self, width: int, num_experts: int, k: int) -> nn.Module:
        return TopKRouter(width, num_experts, k=k, noise=self.noise)


@dataclass(frozen=True)
class CosineGate:
    """Makes `CosineRouter`s. Attributes: dim of the projection, first temperature, noise as for `LinearGate`."""

    dim: int = 256
    temperature: float = 0.5
    noise: float = 1.0

    def __call__(self, width: int, num_experts: int, k: int) -> nn.Module:
        return CosineRouter(width, num_experts, k=k, dim=self.dim, temperature=self.temperature, noise=self.noise)


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixtures of experts of a model.

    Attributes:
        blocks: for each stage, the blocks with experts.
        router: makes a router from (width, num_experts, k).
        dropout: on the activated hidden rows of experts.
        down_bias: whether feed-forwards, experts or not, have an output bias; the released ones keep it at zero.
        products: which 8-bit numbers the experts multiply; None for rows and weights themselves.
    """

    num_experts: int = 32
    k: int = 1
    blocks: tuple[tuple[int, ...], ...] = PUBLISHED_BLOCKS
    router: RouterFactory = field(default_factory=LinearGate)
    capacity: Capacity = field(default_factory=lambda: FixedCapacity(1.25, priority=batch_prioritized))
    losses: tuple[Loss, ...] = field(default_factory=lambda: (ImportanceLoad(0.01),))
    dropout: float = 0.1
    down_bias: bool = False
    products: Products | None = None


# block


def unbounded(x: Tensor) -> Tensor:
    """Take a position bias as it is."""
    return x


SWIN_MOE = BlockStyle(residual=pre_norm, kernel=DotAttention, squash=unbounded, merge=NormThenMerge, key_bias=True)
"""The blocks that Microsoft released as Swin-MoE: Swin's, with SwinV2's log-spaced position bias but not its limit."""


def moe_ffn(config: SwinV2Config, experts: ExpertsConfig) -> FeedForwardFactory:
    """Return the factory that puts experts into the chosen blocks and plain feed-forwards into the others.

    Raises:
        ValueError: a block that the model does not have.
    """
    if len(experts.blocks) != len(config.depths) or any(
        not 0 <= block < depth for blocks, depth in zip(experts.blocks, config.depths, strict=True) for block in blocks
    ):
        raise ValueError(f"experts in blocks {experts.blocks}, but the stages have {config.depths} blocks, from 0 on")

    def make(stage: int, block: int, width: int) -> nn.Module:
        hidden = int(config.mlp_ratio * width)
        if block not in experts.blocks[stage]:
            return FeedForward(width, hidden, down_bias=experts.down_bias, dropout=config.dropout)
        router = experts.router(width, experts.num_experts, experts.k)
        own = MLPExperts(
            experts.num_experts, width, hidden=hidden, down_bias=experts.down_bias, dropout=experts.dropout
        )
        own.products = experts.products
        return MoE(router, own, capacity=experts.capacity, losses=experts.losses)

    return make


# model


def swin_v2_moe(config: SwinV2Config, num_classes: int, *, experts: ExpertsConfig) -> SwinV2Classifier:
    """Build a classifier of any size and style with experts."""
    return SwinV2Classifier(config, num_classes, ffn=moe_ffn(config, experts))


# published sizes


def config_s(style: BlockStyle = SWIN_MOE) -> SwinV2Config:
    """Return the sizes of SwinV2-MoE-S: width 96, 192 x 192 pixels in windows of 12 x 12."""
    return _published(96, drop_path=0.2, style=style)


def config_b(style: BlockStyle = SWIN_MOE) -> SwinV2Config:
    """Return the sizes of SwinV2-MoE-B: width 128, 192 x 192 pixels in windows of 12 x 12."""
    return _published(128, drop_path=0.3, style=style)


def swin_v2_moe_s(
    num_classes: int = 21841, *, experts: ExpertsConfig = ExpertsConfig(), style: BlockStyle = SWIN_MOE
) -> SwinV2Classifier:
    """Build SwinV2-MoE-S as pre-trained on ImageNet-22K."""
    return swin_v2_moe(config_s(style), num_classes, experts=experts)


def swin_v2_moe_b(
    num_classes: int = 21841, *, experts: ExpertsConfig = ExpertsConfig(), style: BlockStyle = SWIN_MOE
) -> SwinV2Classifier:
    """Build SwinV2-MoE-B as pre-trained on ImageNet-22K."""
    return swin_v2_moe(config_b(style), num_classes, experts=experts)


def _published(embed_dim: int, *, drop_path: float, style: BlockStyle) -> SwinV2Config:
    return SwinV2Config(
        image_size=192,
        embed_dim=embed_dim,
        depths=(2, 2, 18, 2),
        num_heads=tuple(embed_dim * 2**stage // 32 for stage in range(4)),
        window_size=12,
        drop_path=drop_path,
        init_std=0.005,
        branch_norm_init=0.0,
        style=style,
    )


# demo sizes

DEMO = SwinV2Config(
    image_size=32,
    in_channels=1,
    embed_dim=48,
    depths=(2, 4),
    num_heads=(3, 6),
    window_size=8,
    drop_path=0.0,
    init_std=0.1,
    style=SWIN_MOE,
)
"""32 x 32 grey images: maps of 8 x 8 and 4 x 4 positions, a window each. What `synchromesh train demo` trains."""

DEMO_EXPERTS = ExpertsConfig(
    num_experts=8,
    blocks=((), (1, 3)),
    router=LinearGate(noise=0.0),
    capacity=Dropless(),
    losses=(LoadBalance(0.01),),
    dropout=0.0,
    down_bias=True,
)


def swin_v2_demo(num_classes: int = 10, *, config: SwinV2Config = DEMO) -> SwinV2Classifier:
    """Build the dense twin of `swin_v2_moe_demo`, of equal cost per image."""
    return SwinV2Classifier(config, num_classes)


def swin_v2_moe_demo(
    num_classes: int = 10, *, config: SwinV2Config = DEMO, experts: ExpertsConfig = DEMO_EXPERTS
) -> SwinV2Classifier:
    """Build a SwinV2-MoE small enough to learn digits on a laptop in minutes."""
    return swin_v2_moe(config, num_classes, experts=experts)
