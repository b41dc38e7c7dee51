"""SwinV2: a hierarchical vision transformer with shifted windows (arXiv 2111.09883; released under MIT by Microsoft).

- attention inside square windows, shifted by half a window in every second block, with log-spaced position bias;
- scaled cosine attention and normalisation at the end of each residual branch, or what another `BlockStyle` holds;
- any image size: patches, windows and merges pad with zeros on the right and at the bottom;
- the feed-forward of every block comes from a factory, so that mixtures of experts need no subclass;
- two styles of blocks: SwinV2's own, and the one in which Microsoft released Swin-MoE;
- four stage maps for dense tasks, mask token for masked image modelling, stochastic depth, gradient checkpointing.

Shape letters: B images, C D channels, H W rows and columns, G windows of a map, N positions of a window, L patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.features import BackboneConfig, FromData
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.initialize import initialize
from synchromesh.models.mixtures import FeedForwardFactory, feed_forwards
from synchromesh.models.pyramid import (
    Block,
    Counted,
    DropPath,
    Pyramid,
    Residual,
    Stage,
    drop_path_rate,
    post_norm,
    pre_norm,
    with_hidden,
)
from synchromesh.models.window_attention import (
    AttentionConfig,
    CosineAttention,
    DotAttention,
    PositionBias,
    WindowAttention,
    bounded,
    from_windows,
    pad_map,
    shift_mask,
    to_windows,
    unbounded,
)

# settings


class BlockStyle(Enum):
    """How a block attends and where it normalises."""

    SWIN_V2 = "swin_v2"
    SWIN_MOE = "swin_moe"  # of the released Swin-MoE: Swin's blocks, with SwinV2's position bias but not its limit

    @property
    def parts(self) -> BlockParts:
        """What such a block is made of."""
        return _PARTS[self]


SWIN_V2, SWIN_MOE = BlockStyle.SWIN_V2, BlockStyle.SWIN_MOE


@final
@dataclass(frozen=True)
class SwinV2Config(BackboneConfig):
    """What a SwinV2 is made of.

    Attributes:
        image_size: height and width, or both at once, that the windows are laid out for; forward takes any size.
        patch_size: side of a patch, pixels.
        in_channels: of the images.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window; a stage whose map is no higher than this uses one window and no shift.
        pretrained_window_sizes: side of the window of each stage in pre-training, 0 (or no values) for the same as now.
        mlp_ratio: hidden width of a feed-forward over its width.
        qkv_bias: whether queries and values have a bias.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        dropout: after the patch embedding and each feed-forward.
        attention_dropout: on attention weights and output.
        mask_token: whether there is a learned token for hidden patches (masked image modelling).
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        branch_norm_init: first value of the norm weights that end residual branches; Microsoft's release starts at 0.
        style: how a block attends and where it normalises.
        experts: the mixtures of experts in some blocks; none for a dense model.
    """

    image_size: Annotated[int | tuple[int, int], FromData] = 256
    patch_size: int = 4
    in_channels: Annotated[int, FromData] = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 8
    pretrained_window_sizes: tuple[int, ...] = ()
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.1
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask_token: Annotated[bool, FromData] = False
    checkpointed: bool = False
    init_std: float = 0.02
    branch_norm_init: float = 1.0
    style: BlockStyle = SWIN_V2

    def __post_init__(self) -> None:
        stages = len(self.depths)
        if len(self.num_heads) != stages or len(self.pretrained_window_sizes) not in (0, stages):
            raise ValueError(
                f"num_heads is {self.num_heads} and pretrained_window_sizes {self.pretrained_window_sizes}, "
                f"wanted one value for each of the {stages} stages of depths {self.depths}"
            )
        for name in ("patch_size", "in_channels", "embed_dim", "window_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted an integer >= 1")
        for name in ("drop_path", "dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a rate in [0, 1)")
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or self.width(stage) % heads:
                raise ValueError(f"stage {stage} has width {self.width(stage)}, which {heads} heads do not divide")
        if any(side < 0 or side == 1 for side in self.pretrained_window_sizes):
            raise ValueError(f"pretrained_window_sizes is {self.pretrained_window_sizes}, wanted 0 or >= 2 for each")
        if min(self.grid) < 1:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")

    def build(self, *, ffn: FeedForwardFactory | None = None) -> SwinV2:
        return SwinV2(self, ffn=ffn)

    def sized(self, *, image_size: int, channels: int) -> SwinV2Config:
        return dataclasses.replace(self, image_size=image_size, in_channels=channels)

    def hiding(self) -> SwinV2Config:
        return dataclasses.replace(self, mask_token=True)

    def ffn(self) -> FeedForwardFactory:
        """Return what makes the feed-forward of each block. Raises ValueError for experts in no block of it."""
        return feed_forwards(self.depths, self.mlp_ratio, experts=self.experts, dropout=self.dropout)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width of an image of the configured size."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def map_size(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's map for an image of the configured size; partial patches and squares count."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        unit = self.patch_size << stage
        return -(-height // unit), -(-width // unit)

    @property
    def num_features(self) -> int:
        """Width of the last stage."""
        return self.width(len(self.depths) - 1)

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.embed_dim * 2**stage

    def window(self, stage: int) -> int:
        """Side of the windows of a stage."""
        return max(1, min(self.window_size, self.grid[0] >> stage))  # the height decides, of wide maps too

    def shift(self, stage: int, block: int) -> int:
        """Positions by which the windows of a block are shifted."""
        return self.window_size // 2 if block % 2 and self.grid[0] >> stage > self.window_size else 0

    def attention(self, stage: int) -> AttentionConfig:
        """What the attention of a stage is made of."""
        return AttentionConfig(
            width=self.width(stage),
            num_heads=self.num_heads[stage],
            window=self.window(stage),
            pretrained_window=self.pretrained_window_sizes[stage] if self.pretrained_window_sizes else 0,
            kernel=self.style.parts.kernel,
            squash=self.style.parts.squash,
            qkv_bias=self.qkv_bias,
            key_bias=self.style.parts.key_bias,
            dropout=self.attention_dropout,
        )

    def drop_path_rate(self, stage: int, block: int) -> float:
        """Stochastic depth of one block."""
        return drop_path_rate(self.drop_path, self.depths, stage, block)


# block


class MergeThenNorm(Counted):
    """Halves a map: four neighbours side by side, projected to twice the width, then normalised (SwinV2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 C2"]:
        return self.norm(self.reduction(neighbours(x)))

    def multiply_adds(self, height: int, width: int) -> float:
        return float(height * width * (self.reduction.weight.numel() + self.reduction.out_features))


class NormThenMerge(Counted):
    """Halves a map: four neighbours side by side, normalised, then projected to twice the width (Swin)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 C2"]:
        return self.reduction(self.norm(neighbours(x)))

    def multiply_adds(self, height: int, width: int) -> float:
        return float(height * width * (self.reduction.weight.numel() + self.reduction.in_features))


def neighbours(x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 C4"]:
    """Lay the four positions of each 2 x 2 square side by side: top left, bottom left, top right, bottom right."""
    x = pad_map(x, 2)
    B, H, W, C = x.shape
    return x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)


@dataclass(frozen=True)
class BlockParts:
    """What the blocks of one style are made of.

    Attributes:
        residual: ends or begins a branch with its norm.
        kernel: (num_heads, head_width) -> attention module.
        squash: applied to the position bias.
        merge: width -> module that halves a map.
        key_bias: whether keys have a bias beside queries and values.
    """

    residual: Residual
    kernel: Callable[[int, int], nn.Module]
    squash: Callable[[Tensor], Tensor]
    merge: Callable[[int], nn.Module]
    key_bias: bool


_PARTS = {
    SWIN_V2: BlockParts(post_norm, CosineAttention, bounded, MergeThenNorm, key_bias=False),
    SWIN_MOE: BlockParts(pre_norm, DotAttention, unbounded, NormThenMerge, key_bias=True),
}


class SwinBlock(Block):
    """Window attention and feed-forward, each in a residual branch."""

    def __init__(self, config: SwinV2Config, stage: int, block: int, *, ffn: nn.Module) -> None:
        super().__init__()
        self.side, self.shift = config.window(stage), config.shift(stage, block)
        self.residual = config.style.parts.residual
        # Map size padded to whole windows; the mask of this size is kept, others are computed when they come.
        height, width = config.map_size(stage)
        self.size = (height + -height % self.side, width + -width % self.side)
        self.attention = WindowAttention(config.attention(stage))
        self.norm1 = nn.LayerNorm(config.width(stage))
        self.ffn = ffn
        self.norm2 = nn.LayerNorm(config.width(stage))
        self.layer_depth = 1 + sum(config.depths[:stage]) + block
        self.drop_path = DropPath(config.drop_path_rate(stage, block))
        count, positions = self.size[0] * self.size[1] // self.side**2, self.side**2
        self.mask = nn.Buffer(torch.empty(count, positions, positions), persistent=False) if self.shift else None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute what does not depend on weights (again, after `to_empty`)."""
        if self.mask is not None:
            self.mask.copy_(shift_mask(*self.size, self.side, self.shift))

    def mixing(self, height: int, width: int, channels: int) -> float:
        # Projections of q, k, v and output, and the two products of attention, over whole windows.
        padded = self.size[0] * self.size[1]
        return float(padded * (4 * channels**2 + 2 * self.side**2 * channels))

    def mix(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W _"]:
        """Return what each position takes from the others; wider where its projection has streams of tasks."""
        # Shifted windows: the map is rolled, attended in plain windows under the mask, and rolled back.
        height, width = x.shape[1:3]
        x = pad_map(x, self.side)
        size = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = from_windows(self.attention(to_windows(x, self.side), self._mask(*size)), *size)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, :height, :width]  # without the padding, which attention sees as zeros

    def _mask(self, height: int, width: int) -> Float[Tensor, "G N N"] | None:
        if self.mask is None or (height, width) == self.size:
            return self.mask
        return shift_mask(height, width, self.side, self.shift).to(self.mask)


# stage


class SwinStage(Stage):
    """Blocks of one width, then (but in the last stage) a merge that halves the map."""

    def __init__(self, config: SwinV2Config, stage: int, *, ffn: FeedForwardFactory) -> None:
        width = config.width(stage)
        blocks = [
            SwinBlock(config, stage, block, ffn=ffn(stage, block, width)) for block in range(config.depths[stage])
        ]
        merge = config.style.parts.merge(width) if stage < len(config.depths) - 1 else nn.Identity()
        depth = sum(config.depths[: stage + 1])
        super().__init__(blocks, merge, checkpointed=config.checkpointed, layer_depth=depth)


# model


class PatchEmbedding(Counted):
    """Cuts images into patches, projects and normalises them; hidden patches become the mask token."""

    layer_depth = 0
    undecayed = frozenset({"mask_token"})

    def __init__(self, config: SwinV2Config) -> None:
        super().__init__()
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(config.embed_dim)) if config.mask_token else None
        self.dropout = nn.Dropout(config.dropout)

    def initialize(self, std: float) -> None:
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=std)

    def forward(
        self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B H2 W2 D"]:
        if images.shape[1] != self.in_channels:
            raise ValueError(f"images have {images.shape[1]} channels, wanted {self.in_channels}: [B, C, H, W]")
        bottom, right = -images.shape[2] % self.patch_size, -images.shape[3] % self.patch_size
        images = F.pad(images, (0, right, 0, bottom)) if bottom or right else images
        x = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return self.dropout(x if hidden is None else with_hidden(x, hidden, self.mask_token))

    def multiply_adds(self, height: int, width: int) -> float:
        return float(height * width * (self.proj.weight.numel() + self.proj.out_channels))


@final
class SwinV2(Pyramid):
    """The backbone: images to features.

    Args:
        config: sizes, rates, style and experts.
        ffn: makes the feed-forward of each block from (stage, block, width), instead of what the config says.
    """

    optional = frozenset({"embed.mask_token"})

    def __init__(self, config: SwinV2Config, *, ffn: FeedForwardFactory | None = None) -> None:
        super().__init__()
        self.config, self.init_std, ffn = config, config.init_std, ffn or config.ffn()
        self.widths = tuple(config.width(stage) for stage in range(len(config.depths)))
        self.strides = tuple(config.patch_size << stage for stage in range(len(config.depths)))
        self.embed = PatchEmbedding(config)
        self.stages = nn.ModuleList(SwinStage(config, stage, ffn=ffn) for stage in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.num_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the release does: truncated normal weights, zero biases, final norms of branches as configured.

        Experts and linear routers count as weights and biases; other modules of a custom factory keep their own.
        """
        initialize(self, self.config.init_std)
        for module in self.modules():
            if isinstance(module, SwinBlock) and self.config.style is SWIN_V2:
                nn.init.constant_(module.norm1.weight, self.config.branch_norm_init)
                nn.init.constant_(module.norm2.weight, self.config.branch_norm_init)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute masks and coordinates again; needed after `to_empty` before a checkpoint is loaded."""
        for module in self.modules():
            if isinstance(module, PositionBias | SwinBlock):
                module.reset_buffers()

    def map_size(self, stage: int) -> tuple[int, int]:
        return self.config.map_size(stage)


# published sizes


def swin_v2_tiny(num_classes: int = 1000, *, image_size: int = 256, window_size: int = 8) -> Classifier:
    """Build SwinV2-T: width 96, depths 2-2-6-2."""
    return _classifier(96, (2, 2, 6, 2), image_size, window_size, num_classes)


def swin_v2_small(num_classes: int = 1000, *, image_size: int = 256, window_size: int = 8) -> Classifier:
    """Build SwinV2-S: width 96, depths 2-2-18-2."""
    return _classifier(96, (2, 2, 18, 2), image_size, window_size, num_classes)


def swin_v2_base(
    num_classes: int = 1000, *, image_size: int = 256, window_size: int = 8, pretrained: tuple[int, ...] = ()
) -> Classifier:
    """Build SwinV2-B: width 128, depths 2-2-18-2; `pretrained` are its `pretrained_window_sizes`."""
    return _classifier(128, (2, 2, 18, 2), image_size, window_size, num_classes, pretrained)


def swin_v2_large(
    num_classes: int = 21841, *, image_size: int = 192, window_size: int = 12, pretrained: tuple[int, ...] = ()
) -> Classifier:
    """Build SwinV2-L: width 192, depths 2-2-18-2; `pretrained` are its `pretrained_window_sizes`."""
    return _classifier(192, (2, 2, 18, 2), image_size, window_size, num_classes, pretrained)


def _classifier(
    embed_dim: int,
    depths: tuple[int, ...],
    image_size: int,
    window_size: int,
    num_classes: int,
    pretrained: tuple[int, ...] = (),
) -> Classifier:
    config = SwinV2Config(
        image_size=image_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(embed_dim * 2**stage // 32 for stage in range(len(depths))),
        window_size=window_size,
        pretrained_window_sizes=pretrained,
        drop_path=0.2,
        branch_norm_init=0.0,
    )
    return Classifier(SwinV2(config), num_classes)
