"""SwinV2-MoE: a SwinV2 whose feed-forward is a mixture of experts in some blocks (arXiv 2206.03382, section 5.3).

- experts in every other block of stage 3 and in the last block of stage 4, as published; any blocks by value;
- two block styles: `SWIN_MOE`, in which Microsoft released weights, and the true SwinV2;
- router, capacity, losses and dropout are values of `ExpertsConfig`, with the released settings as default.
"""

from __future__ import annotations

import dataclasses

from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SWIN_MOE, BlockStyle, SwinV2Config
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.losses import LoadBalance

# model


def swin_v2_moe(config: SwinV2Config, num_classes: int, *, experts: ExpertsConfig) -> Classifier:
    """Build a classifier of any size and style with experts."""
    return Classifier(dataclasses.replace(config, experts=experts).build(), num_classes)


# published sizes


def config_s(style: BlockStyle = SWIN_MOE) -> SwinV2Config:
    """Return the sizes of SwinV2-MoE-S, still dense: width 96, 192 x 192 pixels in windows of 12 x 12."""
    return _published(96, drop_path=0.2, style=style)


def config_b(style: BlockStyle = SWIN_MOE) -> SwinV2Config:
    """Return the sizes of SwinV2-MoE-B, still dense: width 128, 192 x 192 pixels in windows of 12 x 12."""
    return _published(128, drop_path=0.3, style=style)


def swin_v2_moe_s(
    num_classes: int = 21841, *, experts: ExpertsConfig = ExpertsConfig(), style: BlockStyle = SWIN_MOE
) -> Classifier:
    """Build SwinV2-MoE-S as pre-trained on ImageNet-22K."""
    return swin_v2_moe(config_s(style), num_classes, experts=experts)


def swin_v2_moe_b(
    num_classes: int = 21841, *, experts: ExpertsConfig = ExpertsConfig(), style: BlockStyle = SWIN_MOE
) -> Classifier:
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

# The released block style, pre-norm, learns faster from few images than post-norm. At such small widths SwinV2's first
# weights (standard deviation 0.02) are so small that branches add almost nothing at first, and each step is relatively
# large; hence 0.1.
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
"""32 x 32 grey images: maps of 8 x 8 and 4 x 4 positions, a window each. Dense: the twin of the recipe `demo`."""

DEMO_EXPERTS = ExpertsConfig(
    num_experts=8,
    blocks=((), (1, 3)),
    router=LinearGate(noise=0.0),
    capacity=Dropless(),
    losses=(LoadBalance(0.01),),
    dropout=0.0,
    down_bias=True,
)


def swin_v2_demo(num_classes: int = 10, *, config: SwinV2Config = DEMO) -> Classifier:
    """Build the dense twin of `swin_v2_moe_demo`, of equal cost per image."""
    return Classifier(config.build(), num_classes)


def swin_v2_moe_demo(
    num_classes: int = 10, *, config: SwinV2Config = DEMO, experts: ExpertsConfig = DEMO_EXPERTS
) -> Classifier:
    """Build a SwinV2-MoE small enough to learn digits on a laptop in minutes."""
    return swin_v2_moe(config, num_classes, experts=experts)
